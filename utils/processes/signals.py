"""Signals that stop a run. A run notes the signal, finishes its step, saves its state and stops.

Imports no torch, so that `exit_quietly` is in place before torch is imported, which takes seconds.
"""

import contextlib
import ctypes
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from multiprocessing import resource_tracker
from types import FrameType
from typing import Any

from utils.output import USUAL_PROGRAM, WIPE, best_effort_streams, note

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


def exit_quietly(worker: bool, program: str = USUAL_PROGRAM) -> None:
    """Let a signal end this process at once, with status 128 + signal and one line, while there is no state to save.

    Its output is best effort from here on.

    A `worker` exits with 1 in silence; its parent prints the line. It also ends when its parent does, and so do
    torchrun's workers: they are in sessions of their own, where nothing else would end them.
    """
    if worker or "LOCAL_RANK" in os.environ:
        die_with_parent()
    best_effort_streams(program)
    install(QuietExit(worker, program))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)  # a worker starts with its signals held back (`held_back`)


class QuietExit:
    """The handler of `exit_quietly`."""

    def __init__(self, worker: bool, program: str):
        self.worker, self.program = worker, program

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        if self.worker:
            os._exit(1)
        with contextlib.suppress(OSError):
            os.write(2, f"{self.program}: {Stopped(signum)}\n".encode())
        os._exit(128 + signum)


# --- handlers --------------------------------------------------------------------------------------------------------

Handler = Callable[[int, FrameType | None], None]
Handlers = dict[int, Any]  # {signal: handler, as of signal.getsignal}


def install(handler: Handler, signums: Iterable[int] | None = None) -> Handlers:
    """Have `handler` called for signals, by default those that stop a run; returns the handlers before, for `restore`.

    Python takes handlers in the main thread alone. In another one nothing is installed, and a note says that stopping
    is up to the program that runs this thread.
    """
    if threading.current_thread() is not threading.main_thread():
        note("this runs in a thread: signals that would stop it are left to the program that started the thread")
        return {}
    return {signum: signal.signal(signum, handler) for signum in (handled() if signums is None else signums)}


def restore(before: Handlers) -> None:
    """Put handlers back. (None stands for one that was not installed by Python, which cannot be put back.)"""
    for signum, handler in before.items():
        if handler is not None:
            signal.signal(signum, handler)


@contextlib.contextmanager
def installed(handler: Handler, signums: Iterable[int] | None = None) -> Iterator[None]:
    """`install` within, `restore` afterwards."""
    before = install(handler, signums)
    try:
        yield
    finally:
        restore(before)


@contextlib.contextmanager
def handlers_left_as_found() -> Iterator[None]:
    """Put the handlers of stop signals back that were there before.

    Not in a command's own process, which began with `exit_quietly`: there the run's handlers stay. A signal that comes
    after the run is an echo of the one that has stopped it.
    """
    in_main = threading.current_thread() is threading.main_thread()
    before = {signum: signal.getsignal(signum) for signum in STOPPING} if in_main else {}
    try:
        yield
    finally:
        restore({signum: handler for signum, handler in before.items() if not isinstance(handler, QuietExit)})


# --- workers ---------------------------------------------------------------------------------------------------------


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
                os.write(1, WIPE.encode())  # a line of progress that stands there
            os._exit(128 + signum)


def noted_signal() -> int:
    """The signal that this process's `NotedSignal` has noted, 0 before, and where no such handler is in place."""
    noted = (getattr(signal.getsignal(signum), "__self__", None) for signum in STOPPING)
    return next((handler.signum for handler in noted if isinstance(handler, NotedSignal)), 0)
