"""Runs a grid of configs x seeds: several at a time, resumable, one progress line each.

    python -m utils.run_grid GRID.yaml [--jobs=N] [--threads=N] [--section.key=value ...]

A grid file:

    config: configs/fashionmnist_lenet_fast.yaml   # of every run, unless a run names its own
    base_dir: experiments/fashionmnist_lenet       # the runs' directory
    seeds: [0, 1, 2]
    jobs: 2                                        # runs at a time (default 1, or one for each of gpus)
    threads: 1                                     # of each run, all its processes together, unless the run sets
                                                   # dist_params.threads; 0 (default) = its share of the cores
    gpus: [0, 1]                                   # each run sees one, in turn; counted in CUDA_VISIBLE_DEVICES where
                                                   # that is set; default: every run sees all GPUs
    set: {prune_params.num_levels: 18}             # options of every run
    runs:
      imp: {experiment_params.training_type: imp}  # becomes imp_seed0, imp_seed1, imp_seed2
      snip:
        prune_params.er_method: snip
        each: {prune_params.er_init: [0.5, 0.1]}   # one run for each value: snip_0.5_seed0, snip_0.1_seed0, ...
      other: {config: configs/another.yaml}

Options on the command line win over those of `set`; what a run sets itself, in `each` too, they may not change. Paths
are relative to the current directory.

The whole grid is checked before anything starts. Started again, it skips finished runs and resumes half-done ones. A
run that fails is named with its last line of stderr and stops no other; what a run writes to stderr, in all its starts,
is kept in BASE_DIR/.logs/NAME.log. SIGINT or SIGTERM stops all runs, which save their state; a second one kills them.

Exit status: 0 all runs are finished; 1 a run failed; 2 faults in the grid, nothing started; 130 or 143 stopped.
"""

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from tqdm import tqdm

from harness_params import ConfigError
from utils.grids.grid import Grid, Job, distinct_notes, read_grid, summary
from utils.processes.place import available_cores

HARNESS = Path(__file__).parent.parent / "harness.py"
POLL_SECONDS = 0.2  # between two looks at the processes
READ_SECONDS = 1.0  # between two looks at a run's CSVs
LINE_SECONDS = 10.0  # between two lines of one run, without a terminal
SECOND_SIGNAL_SECONDS = 1.0  # an echo of the first comes sooner, a person's second one later
PR_SET_PDEATHSIG = 1
# What torchrun tells its workers, besides TORCHELASTIC_*.
TORCHRUN = (
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK", "ROLE_NAME",
    "ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
)  # fmt: skip


def parse(words: Sequence[str]) -> tuple[str, dict[str, str]]:
    """(grid file, {grid key or section.key: text}).

    Raises:
        ConfigError: naming every word that is neither.
    """
    paths = [word for word in words if not word.startswith("--")]
    faults = [] if len(paths) == 1 else [f"one grid file is expected, not {len(paths)} (--help tells more)"]
    options: dict[str, str] = {}
    for word in words:
        name, equals, value = word.removeprefix("--").partition("=")
        if word in paths:
            continue
        if not equals or not (name in ("jobs", "threads", "base_dir") or "." in name):
            faults.append(f"{word!r}: --jobs=N, --threads=N, --base_dir=PATH or --section.key=value is expected")
        elif name in options:
            faults.append(f"--{name}: given twice on the command line (again as {value!r}); keep one")
        options[name] = value
    if faults:
        raise ConfigError(faults)
    return paths[0], options


def environment(grid: Grid, place: int, processes: int = 1) -> dict[str, str]:
    """The environment of a run of so many processes in one of the grid's parallel places: its threads, and its GPU."""
    # A run must not take itself for a worker of a launcher that this grid happens to be started by.
    env = {k: v for k, v in os.environ.items() if k not in TORCHRUN and not k.startswith("TORCHELASTIC_")}
    # Of each process; dist_params.threads, where the run has it, is what torch goes by.
    env["OMP_NUM_THREADS"] = str(max(1, (grid.threads or available_cores() // grid.parallel) // processes))
    if grid.gpus:
        env["CUDA_VISIBLE_DEVICES"] = grid.gpus[place % len(grid.gpus)]
    return env


class Child:
    """One run in progress: its process, its log and its progress line.

    Args:
        place: which of the parallel places it takes; its line on a terminal.
    """

    def __init__(self, job: Job, grid: Grid, place: int, terminal: bool):
        self.job, self.place, self.terminal = job, place, terminal
        self.log = job.path.parent / ".logs" / f"{job.name}.log"
        self.log.parent.mkdir(parents=True, exist_ok=True)
        libc, parent = ctypes.CDLL(None), os.getpid()

        def stop_with_parent() -> None:
            """Has the kernel send SIGTERM when the grid dies, even by kill -9, so that no run is left alone."""
            if sys.platform == "linux":
                libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
                if os.getppid() != parent:
                    os._exit(1)

        with open(self.log, "ab") as log:
            self.said_before = log.tell()  # by earlier starts of this run, whose failures are worth keeping
            # A session of its own: a terminal's Ctrl-C reaches the grid alone, which hands it on once.
            self.process = subprocess.Popen(
                [sys.executable, str(HARNESS), *job.words], env=environment(grid, place, job.processes),
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=log, start_new_session=True,
                preexec_fn=stop_with_parent,
            )  # fmt: skip
        self.started = self.read_at = self.told_at = time.monotonic()
        self.progress = job.progress()
        self.bar = tqdm(
            total=job.epochs, initial=self.progress.epochs, desc=job.name, unit="epoch", position=1 + place,
            leave=False, file=sys.stdout, disable=not terminal,
        )  # fmt: skip
        if not terminal:
            print(f"{job.name}: {'resumed' if self.progress.epochs else 'started'}", flush=True)

    def look(self) -> None:
        """Reads how far it is, now and then, and shows it."""
        now = time.monotonic()
        if now - self.read_at < READ_SECONDS:
            return
        before, self.progress, self.read_at = self.progress, self.job.progress(), now
        self.bar.n = self.progress.epochs
        self.bar.set_postfix_str(self.describe())
        if not self.terminal and self.progress.levels > before.levels and now - self.told_at >= LINE_SECONDS:
            self.told_at = now
            epochs = f"{self.progress.epochs} of {self.job.epochs} epochs"
            print(f"{self.job.name}: {epochs}, {self.describe()}", flush=True)

    def describe(self) -> str:
        """Where it stands, in words."""
        p = self.progress
        parts = [f"{p.levels} of {self.job.cfg.prune_params.num_levels} levels"]
        parts += [] if p.density is None else [f"density {p.density:.4g}"]
        parts += [] if p.accuracy is None else [f"test accuracy {p.accuracy:.2f}%"]
        return ", ".join(parts)

    def last_line(self) -> str:
        """The last line of its stderr, in this start."""
        said = self.log.read_bytes()[self.said_before :].decode(errors="replace")
        lines = [line.strip() for line in said.splitlines() if line.strip()]
        return lines[-1] if lines else "it said nothing"

    def close(self) -> str:
        """Ends the progress line; returns what became of the run, '' when all is well."""
        self.bar.close()
        self.progress = self.job.progress()
        status = self.process.returncode
        if status == 0 and self.job.finished:
            return ""
        if status < 0:
            return f"killed by {signal.Signals(-status).name}"
        return f"exit {status}: {self.last_line()}"

    def stop(self, signum: int) -> None:
        """Asks it to save its state and end; it takes a second request that follows at once for an echo."""
        if self.process.poll() is None:
            self.process.send_signal(signum)

    def kill(self) -> None:
        """Ends it and all its workers at once."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)


class Runner:
    """Runs what a grid has left to do."""

    def __init__(self, grid: Grid, terminal: bool):
        self.grid, self.terminal = grid, terminal
        self.children: dict[int, Child] = {}
        self.failed: list[str] = []
        self.stopping, self.stopped_at = 0, 0.0

    def run(self) -> int:
        """Runs all that is not finished; returns the exit status."""
        jobs = self.grid.jobs
        print(f"run_grid: {summary(jobs)}; {self.grid.parallel} at a time", flush=True)
        for note in distinct_notes(jobs):  # each run's own go to its log, where nobody looks while all is well
            print(f"run_grid: note: {note}", file=sys.stderr, flush=True)
        waiting = [job for job in jobs if not job.finished]
        done = len(jobs) - len(waiting)
        tqdm.monitor_interval = 0  # its thread would make forking unsafe
        previous = {signum: signal.signal(signum, self._note) for signum in (signal.SIGINT, signal.SIGTERM)}
        total = tqdm(total=len(jobs), initial=done, desc="grid", unit="run", file=sys.stdout, disable=not self.terminal)
        try:
            while (waiting and not self.stopping) or self.children:
                free = [place for place in range(self.grid.parallel) if place not in self.children]
                while free and waiting and not self.stopping:
                    place = free.pop(0)
                    self.children[place] = child = Child(waiting.pop(0), self.grid, place, self.terminal)
                    if self.stopping:  # a signal came while it was being started, when `_note` did not know it yet
                        child.stop(self.stopping)
                time.sleep(POLL_SECONDS)
                total.update(self._collect())
        finally:
            for child in self.children.values():  # only when this loop itself failed
                child.kill()
            total.close()
            for signum, handler in previous.items():
                signal.signal(signum, handler)
        return self._end()

    def _collect(self) -> int:
        """Shows the running ones' progress and takes out the ended ones; returns how many finished well."""
        well = 0
        for place, child in list(self.children.items()):
            if child.process.poll() is None:
                child.look()
                continue
            del self.children[place]
            fault = child.close()
            minutes = (time.monotonic() - child.started) / 60
            if not fault:
                well += 1
                self._say(f"{child.job.name}: done in {minutes:.1f} min: {child.describe()}")
            elif self.stopping:
                self._say(f"{child.job.name}: stopped: {child.describe()}")
            else:
                self.failed.append(child.job.name)
                self._say(f"{child.job.name}: FAILED, {fault} (log: {child.log})")
        return well

    def _end(self) -> int:
        left = sum(not job.finished for job in self.grid.jobs)
        if self.stopping:
            name = signal.Signals(self.stopping).name
            print(
                f"run_grid: stopped by {name} with {left} of {len(self.grid.jobs)} runs left; the same command goes on"
            )
            return 128 + self.stopping
        if self.failed:
            print(f"run_grid: {len(self.failed)} of {len(self.grid.jobs)} runs failed: {', '.join(self.failed)}")
            return 1
        print(f"run_grid: all {len(self.grid.jobs)} runs are finished")
        return 0

    def _say(self, line: str) -> None:
        if self.terminal:
            tqdm.write(line, file=sys.stdout)
        else:
            print(line, flush=True)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.stopping:
            if now - self.stopped_at > SECOND_SIGNAL_SECONDS:
                for child in self.children.values():
                    child.kill()
            return
        self.stopping, self.stopped_at = signum, now
        for child in self.children.values():
            child.stop(signum)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs ``python -m utils.run_grid``; returns its exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    if "--help" in words or "-h" in words or not words:
        print(__doc__, file=sys.stdout if words else sys.stderr)
        return 0 if words else 2
    try:
        path, options = parse(words)
        grid = read_grid(path, options)
    except ConfigError as error:
        for fault in error.faults:
            print(f"run_grid: {fault}", file=sys.stderr)
        return 2
    return Runner(grid, terminal=sys.stdout.isatty()).run()


if __name__ == "__main__":
    sys.exit(main())
