"""Stopping on request: a signal is noted, the step in progress ends, the state is saved, then the run stops.

Imports nothing heavy, so that `exit_quietly` can be in place before torch is imported, which takes seconds.
"""

import contextlib
import ctypes
import math
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
    from utils.distributed import Context

# SIGUSR1 is what Slurm sends ahead of a time limit (`--signal`); SIGHUP comes when a terminal is closed.
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
# One request can reach a process twice: `timeout` sends it to its child and to the group the child is in.
ECHO_SECONDS = 0.3
# torchrun sends its workers a copy of what it gets; a terminal's Ctrl-C had reached them already.
TORCHRUN_ECHO_SECONDS = 3.0
# What a stopped run has to save its state before its workers are killed.
SHUTDOWN_SECONDS = 60
# With several processes a stop is agreed upon by a message: about once a second, so that it costs nothing, and at least
# every few steps, should they become slow.
SECONDS_BETWEEN_CHECKS = 1.0
STEPS_BETWEEN_CHECKS = 16


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


class StopRequest(NotedSignal):
    """Notes the signals that stop a run; a second one ends the process at once, unless the state is being saved.

    In a worker of our own launcher a second one is ignored: the launcher gets it too, ends, and its workers with it.
    """

    def __init__(self, ctx: "Context"):
        led = multiprocessing.parent_process() is not None
        under_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
        super().__init__(math.inf if led else TORCHRUN_ECHO_SECONDS if under_torchrun else ECHO_SECONDS)
        self.ctx = ctx
        self._interval, self._steps, self._asked = 1, 0, time.monotonic()
        for signum in handled():
            signal.signal(signum, self.note)

    def saving(self) -> None:
        """To end at once now would lose the state: for as long as a save may take, another signal is an echo.

        Where the first went to one worker alone, torchrun sends the others theirs when that one has ended.
        """
        self.since, self.echo = time.monotonic(), max(self.echo, SHUTDOWN_SECONDS)

    def __call__(self, steps: int) -> bool:
        """Whether to stop after a step; the same answer on every rank."""
        if self.ctx.world == 1:
            return self.signum > 0
        self._steps += 1
        return self._steps >= self._interval and self.agreed()

    def agreed(self) -> bool:
        """Whether any rank was asked to stop; every rank must call it at the same place."""
        # The slowest rank's time of a step, so that all of them count up to the same one.
        milliseconds = int(1000 * (time.monotonic() - self._asked) / max(self._steps, 1))
        agreed, milliseconds = self.ctx.largest([self.signum, milliseconds])
        if self._steps:
            steps = int(1000 * SECONDS_BETWEEN_CHECKS / max(milliseconds, 1))
            self._interval = min(max(steps, 1), STEPS_BETWEEN_CHECKS)
        self._steps, self._asked = 0, time.monotonic()
        if agreed:  # not assigned otherwise: a signal may have been noted since the message was sent
            self.since = self.since or time.monotonic()
            self.signum = agreed
        return agreed > 0
