"""Runs of the harness that cost no start: forked from a server that has torch imported, each in a session of its own.

They are whole runs of `harness.main`, on their own files and with their own processes; only the seconds of importing
torch are saved, so that a test can kill and resume one a hundred times.
"""

import contextlib
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tests.conftest import SMALL, Finished
from tests.traps import UNMET, unmet
from utils.runs.environment import git_commit

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["harness", "sklearn.datasets", "tests.processes"])

Trap = Callable[[], None]


# Asked for once, by the server: a commit made while tests run would be noted as other code at the next resume.
git_commit()


class Forks:
    """Starts runs below one folder, with what they print in files in `logs`, another one if asked for."""

    def __init__(self, folder: Path, logs: Path | None = None):
        self.folder, self.logs = folder, logs or folder
        self.count = 0

    def start(
        self,
        name: str,
        resume: bool = False,
        trap: Trap | None = None,
        env: dict | None = None,
        words: Sequence[str] | None = None,
        **options,
    ):
        """A run called `name`, or its continuation.

        Args:
            words: the whole command line after harness.py, in place of that of `name` and `options`.
            trap: called in the new process before the harness is, to lay a fault.
            env: variables of the new process; RANK and WORLD_SIZE make it one rank of several.
        """
        self.count += 1
        key = "resume_expt_name" if resume else "expt_name"
        values = {**SMALL, "experiment_params.base_dir": self.folder, f"experiment_params.{key}": name, **options}
        argv = [f"--{k}={v}" for k, v in values.items() if v is not None] if words is None else list(words)
        logs = [self.logs / f"{name}.{self.count}.{stream}" for stream in ("out", "err")]
        os.environ["OMP_NUM_THREADS"] = "1"  # of the server, once it starts
        process = _CONTEXT.Process(target=_run, args=(argv, [str(log) for log in logs], trap, env or {}))
        process.start()
        return Forked(self.folder / name, process, logs)

    def __call__(self, name: str, status: int | None = 0, timeout: float = 120, **more) -> Finished:
        return self.start(name, **more).finish(status, timeout)

    def ranks(self, name: str, world: int, **more) -> list["Forked"]:
        """The same run as `world` ranks, started here as torchrun would."""
        import socket

        with socket.socket() as sock:
            sock.bind(("localhost", 0))
            port = sock.getsockname()[1]
        shared = {"WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
        return [self.start(name, env={**shared, "RANK": r, "LOCAL_RANK": r}, **more) for r in range(world)]


class Forked:
    """A run in progress."""

    def __init__(self, path: Path, process, logs: list[Path]):
        self.path, self.process, self.logs = path, process, logs

    @property
    def pid(self) -> int:
        return self.process.pid

    def kill(self, signum: int = signal.SIGKILL) -> None:
        """Sends a signal; nothing happens when the run has ended."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signum)

    def finish(self, status: int | None = 0, timeout: float = 120) -> Finished:
        """Waits for its end; `status` is what it must exit with, None anything."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            os.killpg(self.pid, signal.SIGKILL)
            pytest.fail(f"{self.path.name} did not end within {timeout} s: {self.output()}")
        done = Finished(self.path, self.process.exitcode, *(log.read_text() for log in self.logs))
        assert status is None or done.status == status, f"exit {done.status}\n{done.out}\n{done.err}"
        return done

    def output(self) -> str:
        return "\n".join(log.read_text() for log in self.logs if log.exists())

    def wait_for(self, what: Callable[[], object], timeout: float = 60) -> None:
        """Until `what` is true; fails when the run ends first."""
        end = time.monotonic() + timeout
        while not what():
            if self.process.exitcode is not None or time.monotonic() > end:
                pytest.fail(f"{self.path.name}: waited in vain: {self.output()}")
            time.sleep(0.002)

    def wait_for_rows(self, rows: int, level: int = 0) -> None:
        """Until `rows` epochs of `level` are in its CSV."""
        self.wait_for(lambda: rows_of(self.path, level) >= rows)


def rows_of(path: Path, level: int) -> int:
    """Rows of a level's CSV of epochs; 0 without one."""
    file = path / "metrics" / "epochwise_metrics" / f"level_{level}_metrics.csv"
    try:
        return len(file.read_text().splitlines()) - 1
    except FileNotFoundError:
        return 0


def _run(argv: list[str], logs: list[str], trap: Trap | None, env: dict) -> None:
    os.setsid()
    for number, log in enumerate(logs, start=1):
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(handle, number)
        os.close(handle)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    os.environ.update({key: str(value) for key, value in env.items()})
    tempfile.tempdir = None  # what TMPDIR says now
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may have been started by nohup
    import harness
    from utils import launcher as workers

    workers.START_METHOD = "fork"
    sys.argv = ["harness.py", *argv]
    if trap:
        trap()
    status = harness.main(argv)
    for name in unmet(trap):
        print(f"the trap {name} was laid and never met", file=sys.stderr)
        status = UNMET
    workers.end_at_once(status)


def in_ranks(world: int, work: Callable, *args, timeout: float = 60) -> None:
    """Runs ``work(context, *args)`` as `world` ranks of one group over gloo; fails where a rank does."""
    import socket

    with socket.socket() as sock:
        sock.bind(("localhost", 0))
        port = sock.getsockname()[1]
    ranks = [_CONTEXT.Process(target=_rank, args=(rank, world, port, work, args)) for rank in range(world)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(timeout)
        process.kill()
        process.join()
    assert [process.exitcode for process in ranks] == [0] * world


def _rank(rank: int, world: int, port: int, work: Callable, args: tuple) -> None:
    import torch

    from utils.distributed import join

    torch.set_num_threads(1)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": port}
    os.environ.update({key: str(value) for key, value in place.items()}, MASTER_ADDR="localhost")
    with join("gloo", timeout_minutes=1) as ctx:
        work(ctx, *args)


def alive_in_session(session: int) -> list[int]:
    """PIDs of a session's processes that have not ended."""
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                with open(f"/proc/{entry}/stat") as file:
                    fields = file.read().rsplit(")", 1)[1].split()
            except OSError:
                continue
            if int(fields[3]) == session and (fields[0] != "Z" or _has_threads(entry)):
                found.append(int(entry))
    return found


def _has_threads(pid: str) -> bool:
    """Whether threads go on whose first one has ended: until they end, too, files stay open, and locked."""
    try:
        return len(os.listdir(f"/proc/{pid}/task")) > 1
    except OSError:
        return False


def all_gone(session: int, seconds: float = 10) -> bool:
    """Whether every process that a run started ends within `seconds`."""
    end = time.monotonic() + seconds
    while alive_in_session(session):
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True
