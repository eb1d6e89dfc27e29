"""The loop that works through a grid: several runs at a time, stopped by a signal."""

import contextlib
import signal
import sys
import time
from types import FrameType

from utils.errors import DataError
from utils.grids.grid import Grid, distinct_notes, share_text
from utils.grids.grid_run import GridRun
from utils.grids.mps import Sharing, shared_gpus
from utils.grids.process import RunProcess
from utils.output import note, say
from utils.processes.signals import installed
from utils.runs.remaining import Progress, seconds_left_of_all
from utils.status_lines import StatusLines, bar_line, clock, room_for_line

POLL_SECONDS = 0.2  # between two checks of the processes
SECOND_SIGNAL_SECONDS = 1.0  # an echo of the first signal comes sooner, a person's second one later


class GridRunner:
    """Starts the unfinished runs of a grid, watches them and passes signals on to them.

    Attributes:
        notes: whether to print the runs' notes: not where no user has chosen their options.
        running: {slot: the run in it}.
        progress: {name: how far the run is}.
        failed: names of the runs that failed.
        stopping: the signal that stops the grid; 0 while there is none.
    """

    def __init__(self, grid: Grid, terminal: bool, notes: bool = True):
        self.grid, self.terminal, self.notes = grid, terminal, notes
        self.running: dict[int, RunProcess] = {}
        self.progress: dict[str, Progress] = {}
        self.lines = StatusLines(sys.stdout)
        self.failed: list[str] = []
        self.stopping, self.stopped_at = 0, 0.0

    def run(self) -> int:
        """Run everything that is not finished; return the exit status."""
        runs = self.grid.runs
        say(f"run_grid: {share_text(self.grid)}; {self.grid.parallel} at a time")
        # Each run also logs its own, but nobody reads the log of a run that works.
        note(*(distinct_notes(runs) if self.notes else ()))
        waiting = [run for run in runs if not run.finished]
        with (
            installed(self._note, (signal.SIGINT, signal.SIGTERM)),
            shared_gpus(self.grid, min(self.grid.parallel, len(waiting)), note) as sharing,
        ):
            if sharing.message:
                say(f"run_grid: {sharing.message}")
            self._work(waiting, sharing)
        return self._end()

    def _work(self, waiting: list[GridRun], sharing: Sharing) -> None:
        """Start the waiting runs, each as soon as a slot is free, and watch them until the last one has ended."""
        self.progress = {run.name: run.progress() for run in self.grid.runs}
        try:
            with self.lines if self.terminal else contextlib.nullcontext():
                while (waiting and not self.stopping) or self.running:
                    free = [slot for slot in range(self.grid.parallel) if slot not in self.running]
                    while free and not self.stopping and (run := self._next(waiting)):
                        self._begin(run, free.pop(0), sharing)
                    time.sleep(POLL_SECONDS)
                    self._collect()
                    if self.terminal:
                        self._draw()
        finally:
            for active in self.running.values():  # not empty only if this loop failed
                active.kill()

    def _draw(self) -> None:
        """Show on a terminal how far the grid and its runs in progress are."""
        columns = room_for_line(sys.stdout)
        going = [progress for name, progress in self.progress.items() if name not in self.failed]
        done, epochs = sum(run.epochs for run in going), sum(run.total for run in going)
        finished = sum(run.total > 0 and run.epochs >= run.total for run in going)
        share = done / epochs if epochs else 0.0
        left = f"{clock(seconds_left_of_all(going, self.grid.parallel))} left"
        before = f"grid {finished}/{len(self.grid.runs)} runs"
        whole = bar_line(before, share, [f"{share:4.0%} {left}", left], columns, sys.stdout)
        self.lines.show([whole, *(self.running[slot].line(columns) for slot in sorted(self.running))])

    def _begin(self, run: GridRun, slot: int, sharing: Sharing) -> None:
        try:
            active = RunProcess(run, self.grid, slot, self.terminal, sharing.environment(slot))
        except DataError as error:  # the fault of this run: the others go on
            self.failed.append(run.name)
            say(f"{run.name}: FAILED, {error}")
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
            say(f"{lost.name}: FAILED, {lost.after}, which it starts from, failed")
        unfinished = {run.name for run in waiting} | {active.run.name for active in self.running.values()}
        ready = next((run for run in waiting if run.after not in unfinished), None)
        if ready:
            waiting.remove(ready)
        return ready

    def _collect(self) -> None:
        """Look at running processes, and remove ended ones."""
        for slot, active in list(self.running.items()):
            if active.process.poll() is None:
                active.look()
                self.progress[active.run.name] = active.progress
                continue
            del self.running[slot]
            fault = active.close()
            self.progress[active.run.name] = active.progress
            minutes = (time.monotonic() - active.started) / 60
            if not fault:
                say(f"{active.run.name}: done in {minutes:.1f} min: {active.describe()}")
            elif self.stopping:
                say(f"{active.run.name}: stopped: {active.describe()}")
            else:
                self.failed.append(active.run.name)
                say(f"{active.run.name}: FAILED, {fault} (log: {active.log})")

    def _end(self) -> int:
        if self.stopping:
            left = sum(not _finished(run) for run in self.grid.runs)
            name = signal.Signals(self.stopping).name
            left_of = f"{left} of {len(self.grid.runs)} runs left"
            say(f"run_grid: stopped by {name} with {left_of}; the same command continues")
            return 128 + self.stopping
        if self.failed:
            say(f"run_grid: {len(self.failed)} of {len(self.grid.runs)} runs failed: {', '.join(self.failed)}")
            return 1
        say(f"run_grid: all {len(self.grid.runs)} runs are finished")
        return 0

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


def _finished(run: GridRun) -> bool:
    """Whether a run is finished; not if its CSVs are damaged."""
    try:
        return run.finished
    except DataError:
        return False
