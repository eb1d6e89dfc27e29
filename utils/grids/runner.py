"""The loop that works through a grid: several runs at a time, stopped by a signal."""

import signal
import sys
import time
from types import FrameType

from tqdm import tqdm

from utils.errors import DataError
from utils.grids.grid import Grid, distinct_notes, share_text
from utils.grids.grid_run import GridRun
from utils.grids.mps import Sharing, shared_gpus
from utils.grids.process import RunProcess

POLL_SECONDS = 0.2  # between two checks of the processes
SECOND_SIGNAL_SECONDS = 1.0  # an echo of the first signal comes sooner, a person's second one later


class GridRunner:
    """Starts the unfinished runs of a grid, watches them and passes signals on to them.

    Attributes:
        notes: whether to print the runs' notes: not where no user has chosen their options.
        running: {slot: the run in it}.
        failed: names of the runs that failed.
        stopping: the signal that stops the grid; 0 while there is none.
    """

    def __init__(self, grid: Grid, terminal: bool, notes: bool = True):
        self.grid, self.terminal, self.notes = grid, terminal, notes
        self.running: dict[int, RunProcess] = {}
        self.failed: list[str] = []
        self.stopping, self.stopped_at = 0, 0.0

    def run(self) -> int:
        """Run everything that is not finished; return the exit status."""
        runs = self.grid.runs
        print(f"run_grid: {share_text(self.grid)}; {self.grid.parallel} at a time", flush=True)
        # Each run also logs its own, but nobody reads the log of a run that works.
        for note in distinct_notes(runs) if self.notes else ():
            _print_note(note)
        waiting = [run for run in runs if not run.finished]
        tqdm.monitor_interval = 0  # tqdm's monitor thread would make forking unsafe
        previous = {signum: signal.signal(signum, self._note) for signum in (signal.SIGINT, signal.SIGTERM)}
        try:
            with shared_gpus(self.grid, min(self.grid.parallel, len(waiting)), _print_note) as sharing:
                if sharing.message:
                    print(f"run_grid: {sharing.message}", flush=True)
                self._work(waiting, sharing)
        finally:
            for signum, handler in previous.items():
                signal.signal(signum, handler)
        return self._end()

    def _work(self, waiting: list[GridRun], sharing: Sharing) -> None:
        """Start the waiting runs, each as soon as a slot is free, and watch them until the last one has ended."""
        done, count = len(self.grid.runs) - len(waiting), len(self.grid.runs)
        total = tqdm(total=count, initial=done, desc="grid", unit="run", file=sys.stdout, disable=not self.terminal)
        try:
            while (waiting and not self.stopping) or self.running:
                free = [slot for slot in range(self.grid.parallel) if slot not in self.running]
                while free and not self.stopping and (run := self._next(waiting)):
                    self._begin(run, free.pop(0), sharing)
                time.sleep(POLL_SECONDS)
                total.update(self._collect())
        finally:
            for active in self.running.values():  # not empty only if this loop failed
                active.kill()
            total.close()

    def _begin(self, run: GridRun, slot: int, sharing: Sharing) -> None:
        try:
            active = RunProcess(run, self.grid, slot, self.terminal, sharing.environment(slot))
        except DataError as error:  # the fault of this run: the others go on
            self.failed.append(run.name)
            self._say(f"{run.name}: FAILED, {error}")
            return
        self.running[slot] = active
        if self.stopping:  # a signal came during the start, before `_note` knew this process
            active.stop(self.stopping)

    def _next(self, waiting: list[GridRun]) -> GridRun | None:
        """Take the next run out of `waiting` that can start; None if all of them wait for runs in progress.

        Those whose source failed are taken out and fail.
        """
        while lost := next((run for run in waiting if run.after in self.failed), None):
            waiting.remove(lost)
            self.failed.append(lost.name)
            self._say(f"{lost.name}: FAILED, {lost.after}, which it starts from, failed")
        unfinished = {run.name for run in waiting} | {active.run.name for active in self.running.values()}
        ready = next((run for run in waiting if run.after not in unfinished), None)
        if ready:
            waiting.remove(ready)
        return ready

    def _collect(self) -> int:
        """Show the progress of running processes and remove ended ones; return how many runs have just finished."""
        finished = 0
        for slot, active in list(self.running.items()):
            if active.process.poll() is None:
                active.look()
                continue
            del self.running[slot]
            fault = active.close()
            minutes = (time.monotonic() - active.started) / 60
            if not fault:
                finished += 1
                self._say(f"{active.run.name}: done in {minutes:.1f} min: {active.describe()}")
            elif self.stopping:
                self._say(f"{active.run.name}: stopped: {active.describe()}")
            else:
                self.failed.append(active.run.name)
                self._say(f"{active.run.name}: FAILED, {fault} (log: {active.log})")
        return finished

    def _end(self) -> int:
        if self.stopping:
            left = sum(not _finished(run) for run in self.grid.runs)
            name = signal.Signals(self.stopping).name
            left_of = f"{left} of {len(self.grid.runs)} runs left"
            print(f"run_grid: stopped by {name} with {left_of}; the same command continues")
            return 128 + self.stopping
        if self.failed:
            print(f"run_grid: {len(self.failed)} of {len(self.grid.runs)} runs failed: {', '.join(self.failed)}")
            return 1
        print(f"run_grid: all {len(self.grid.runs)} runs are finished")
        return 0

    def _say(self, line: str) -> None:
        if self.terminal:
            tqdm.write(line, file=sys.stdout)
        else:
            print(line, flush=True)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        """Signal handler: the first signal stops all runs, a second one kills them."""
        now = time.monotonic()
        if self.stopping:
            if now - self.stopped_at > SECOND_SIGNAL_SECONDS:
                for active in self.running.values():
                    active.kill()
            return
        self.stopping, self.stopped_at = signum, now
        for active in self.running.values():
            active.stop(signum)


def _print_note(note: str) -> None:
    print(f"run_grid: note: {note}", file=sys.stderr, flush=True)


def _finished(run: GridRun) -> bool:
    """Whether a run is finished; not if its CSVs are damaged."""
    try:
        return run.finished
    except DataError:
        return False
