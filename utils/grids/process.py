"""One run of a grid in progress: harness.py as a child process, its log and its progress."""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from utils.errors import DataError
from utils.grids.grid import Grid
from utils.grids.grid_run import GridRun
from utils.output import say
from utils.processes.place import available_cores
from utils.processes.tasks import TASK_VARIABLES
from utils.status_lines import bar_line, clock
from utils.wording import density_text

HARNESS = Path(__file__).parents[2] / "harness.py"
READ_SECONDS = 1.0  # between two readings of a run's CSVs
# Without a terminal, seconds between two lines about one run: where a level has ended, and where none has.
LINE_SECONDS, QUIET_SECONDS = 60.0, 600.0
PR_SET_PDEATHSIG = 1
# Environment variables that torchrun sets for its workers, besides TORCHELASTIC_*.
TORCHRUN = (
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK", "ROLE_NAME",
    "ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
)  # fmt: skip


def environment(grid: Grid, slot: int, processes: int = 1, sharing: Mapping[str, str] | None = None) -> dict[str, str]:
    """Environment variables of a run: its threads and its GPU.

    Args:
        slot: which of the grid's parallel slots the run takes.
        processes: number of processes that the run starts.
        sharing: variables of the slot that win over the others: those of MPS.
    """
    # If torchrun or srun started this grid, a run must not take itself for one of their tasks.
    foreign = TASK_VARIABLES.union(TORCHRUN)
    env = {k: v for k, v in os.environ.items() if k not in foreign and not k.startswith("TORCHELASTIC_")}
    # Per process. Where the run sets dist_params.threads, torch follows that instead.
    env["OMP_NUM_THREADS"] = str(max(1, (grid.threads or available_cores() // grid.parallel) // processes))
    if grid.gpus:
        env["CUDA_VISIBLE_DEVICES"] = grid.gpus[slot % len(grid.gpus)]
    return env | dict(sharing or {})


class RunProcess:
    """One run in progress: its process, its log and its progress.

    Args:
        slot: which of the grid's parallel slots it takes.
        terminal: whether its progress is a line that changes in place (`line`); otherwise lines are printed.
        sharing: further environment variables.
    """

    def __init__(self, run: GridRun, grid: Grid, slot: int, terminal: bool, sharing: Mapping[str, str] | None = None):
        self.run, self.terminal = run, terminal
        self.log = run.path.parent / ".logs" / f"{run.name}.log"
        self.progress = run.progress()
        self.process = self._start(environment(grid, slot, run.processes, sharing))
        self.started = self.read_at = self.printed_at = time.monotonic()
        if not terminal:
            say(f"{run.name}: {'resumed' if self.progress.epochs else 'started'}")

    def _start(self, env: dict[str, str]) -> subprocess.Popen[bytes]:
        """Start harness.py, with stderr appended to the log."""
        libc, parent = ctypes.CDLL(None), os.getpid()

        def stop_with_parent() -> None:
            """Ask the kernel to send SIGTERM when the grid dies, even by kill -9, so that no run is left alone."""
            if sys.platform == "linux":
                libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
                if os.getppid() != parent:
                    os._exit(1)

        self.log.parent.mkdir(parents=True, exist_ok=True)
        with open(self.log, "ab") as log:
            self.log_start = log.tell()  # what earlier starts of this run wrote is kept: their failures matter
            # A session of its own: a terminal's Ctrl-C reaches only the grid, which passes it on once.
            return subprocess.Popen(
                [sys.executable, str(HARNESS), *self.run.words], env=env, stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL, stderr=log, start_new_session=True, preexec_fn=stop_with_parent,
            )  # fmt: skip

    def look(self) -> None:
        """Read the run's progress, at most once per READ_SECONDS, and show it."""
        now = time.monotonic()
        if now - self.read_at < READ_SECONDS:
            return
        before, self.read_at = self.progress, now
        with contextlib.suppress(DataError):  # `close` reports a CSV that is damaged
            self.progress = self.run.progress()
        since = LINE_SECONDS if self.progress.levels > before.levels else QUIET_SECONDS
        if not self.terminal and now - self.printed_at >= since:
            self.printed_at = now
            epochs = f"{self.progress.epochs} of {self.progress.total} epochs"
            left = clock(self.progress.seconds_left)
            say(f"{self.run.name}: {epochs}, {self.describe()}, {left} left")

    def line(self, columns: int) -> str:
        """Progress on a terminal: a line of at most `columns`."""
        p, left = self.progress, f"{clock(self.progress.seconds_left)} left"
        share = f"{p.epochs / p.total:4.0%} {left}"
        before = f"{self.run.name} {p.levels}/{self.run.cfg.prune_params.num_levels} levels"
        richer = [] if p.accuracy is None else [f"{share}, accuracy {p.accuracy:.2f}%"]
        return bar_line(before, p.epochs / p.total, [*richer, share, left], columns, sys.stdout)

    def describe(self) -> str:
        """Progress in words."""
        p = self.progress
        parts = [f"{p.levels} of {self.run.cfg.prune_params.num_levels} levels"]
        parts += [] if p.density is None else [f"density {density_text(p.density)}"]
        parts += [] if p.accuracy is None else [f"test accuracy {p.accuracy:.2f}%"]
        return ", ".join(parts)

    def last_line(self) -> str:
        """Last line of stderr since this start."""
        text = self.log.read_bytes()[self.log_start :].decode(errors="replace")
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        return lines[-1] if lines else "no output on stderr"

    def close(self) -> str:
        """Return why the run failed, or "" if it finished."""
        status = self.process.returncode
        try:
            self.progress = self.run.progress()
            if status == 0 and self.run.finished:
                return ""
        except DataError as error:
            return str(error)
        if status < 0:
            return f"killed by {signal.Signals(-status).name}"
        return f"exit {status}: {self.last_line()}"

    def stop(self, signum: int) -> None:
        """Ask the run to save its state and end. It ignores a second request that follows at once, as an echo."""
        if self.process.poll() is None:
            self.process.send_signal(signum)

    def kill(self) -> None:
        """Kill the run and all its workers."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
