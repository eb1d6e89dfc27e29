"""Stopping on request: a signal is noted, the step in progress ends, the state is saved, then the run stops.

Imports nothing heavy, so that `exit_quietly` can be in place before torch is imported, which takes seconds.
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
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass

# SIGUSR1 is what Slurm sends ahead of a time limit (`--signal`); SIGHUP comes when a terminal is closed.
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
# One request can reach a process twice: `timeout` sends it to its child and to the group the child is in.
ECHO_SECONDS = 0.3
# What a stopped run has to save its state before its workers are killed.
SHUTDOWN_SECONDS = 60


class Stopped(Exception):
    """The run was asked to stop."""

    def __init__(self, signum: int):
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.signum = signum


def handled() -> list[signal.Signals]:
    """The signals that stop a run; not SIGHUP where it is ignored, which is what ``nohup`` asks for."""
    return [s for s in STOPPING if s is not signal.SIGHUP or signal.getsignal(s) is not signal.SIG_IGN]


def exit_quietly(worker: bool) -> None:
    """Until there is something to save, a signal ends this process at once: 128 + signal, one line, no traceback.

    A `worker` leaves the line to its parent and says by status 1 that it has saved nothing. It ends when its parent
    does, as torchrun's workers do: they are in sessions of their own, where nothing else would end them.
    """
    if worker or "LOCAL_RANK" in os.environ:
        die_with_parent()

    def leave(signum: int, frame: FrameType | None) -> None:
        if worker:
            os._exit(1)
        os.write(2, f"harness: {Stopped(signum)}\n".encode())
        os._exit(128 + signum)

    for signum in handled():
        signal.signal(signum, leave)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)  # a worker starts `held_back`


def die_with_parent() -> None:
    """Asks the kernel to kill this process when its parent dies, also by kill -9 (Linux's PR_SET_PDEATHSIG)."""
    if sys.platform == "linux":
        starter = multiprocessing.parent_process()
        parent = os.getppid() if starter is None else starter.pid
        ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGKILL)
        if os.getppid() != parent:  # it died before the call
            os._exit(1)


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """Signals that stop a run wait; for processes started meanwhile, too, until `exit_quietly` or `ignore_stops`."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    resource_tracker.ensure_running()  # spawning starts it, which unblocks some: so it is started, and they are blocked
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def ignore_stops() -> None:
    """From now on this process leaves to another the signals that stop a run, those included that were held back."""
    for signum in STOPPING:
        signal.signal(signum, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)


class NotedSignal:
    """A handler that notes the first signal; a second one ends this process at once, if it is no echo of the first.

    Attributes:
        signum: the one noted, 0 before.
        since: when, by time.monotonic().
        echo: seconds after it in which another is taken for the same.
    """

    def __init__(self, echo: float = ECHO_SECONDS):
        self.signum, self.since, self.echo = 0, 0.0, echo

    def note(self, signum: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.signum:
            self.signum, self.since = signum, now
        elif now - self.since > self.echo:
            os._exit(128 + signum)
