"""Signals that stop a run. A run notes the signal, finishes its step, saves its state and stops.

Imports no torch, so that `exit_quietly` is in place before torch is imported, which takes seconds.
"""

import contextlib
import ctypes
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterator
from multiprocessing import resource_tracker
from types import FrameType

# Slurm sends SIGUSR1 before a time limit (`--signal`); SIGHUP comes when a terminal closes.
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
# One request can reach a process twice: `timeout` signals its child and the process group of the child.
ECHO_SECONDS = 0.3
# Time for a stopped run to save its state before its workers are killed.
SHUTDOWN_SECONDS = 60


class Stopped(Exception):
    """The run was asked to stop."""

    def __init__(self, signum: int):
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.signum = signum


def handled() -> list[signal.Signals]:
    """Signals that stop a run; without SIGHUP if it is ignored, as ``nohup`` sets it."""
    return [s for s in STOPPING if s is not signal.SIGHUP or signal.getsignal(s) is not signal.SIG_IGN]


def exit_quietly(worker: bool, program: str = "harness") -> None:
    """Let a signal end this process at once, with status 128 + signal and one line, while there is no state to save.

    A `worker` exits with 1 in silence; its parent prints the line. It also ends when its parent does, and so do
    torchrun's workers: they are in sessions of their own, where nothing else would end them.
    """
    if worker or "LOCAL_RANK" in os.environ:
        die_with_parent()

    def leave(signum: int, frame: FrameType | None) -> None:
        if worker:
            os._exit(1)
        os.write(2, f"{program}: {Stopped(signum)}\n".encode())
        os._exit(128 + signum)

    for signum in handled():
        signal.signal(signum, leave)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)  # a worker starts with its signals held back (`held_back`)


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent dies, by kill -9 too (PR_SET_PDEATHSIG of Linux)."""
    if sys.platform == "linux":
        starter = multiprocessing.parent_process()
        parent = os.getppid() if starter is None else starter.pid
        ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGKILL)
        if os.getppid() != parent:  # it died before the call
            os._exit(1)


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """Hold back stop signals; processes started within hold them back until `exit_quietly` or `ignore_stops`."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    resource_tracker.ensure_running()  # starting it unblocks some signals, so start it before blocking them
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def ignore_stops() -> None:
    """Ignore stop signals, including pending ones; the parent handles them."""
    for signum in STOPPING:
        signal.signal(signum, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)


class NotedSignal:
    """A handler that notes the first signal. A second one ends this process at once, unless it is an echo of the first.

    Attributes:
        signum: the signal noted, 0 before.
        since: its time, by time.monotonic().
        echo: seconds during which another signal counts as an echo.
    """

    def __init__(self, echo: float = ECHO_SECONDS):
        self.signum, self.since, self.echo = 0, 0.0, echo

    def note(self, signum: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.signum:
            self.signum, self.since = signum, now
        elif now - self.since > self.echo:
            if os.isatty(1):
                os.write(1, b"\r\x1b[J")  # a line of progress that stands there
            os._exit(128 + signum)


def noted_signal() -> int:
    """The signal that this process's `NotedSignal` has noted, 0 before, and where no such handler is in place."""
    noted = (getattr(signal.getsignal(signum), "__self__", None) for signum in STOPPING)
    return next((handler.signum for handler in noted if isinstance(handler, NotedSignal)), 0)
