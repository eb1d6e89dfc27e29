"""Stopping on request: a signal is noted, the step in progress ends, the state is saved, then the run stops.

Imports nothing heavy, so that `exit_quietly` can be in place before torch is imported, which takes seconds.
"""

import ctypes
import multiprocessing
import os
import signal
import sys
import time
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
# With several processes a stop is agreed upon by a message; every few steps, so that it costs nothing.
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

    A `worker` leaves the line to its parent, ends when that does, and says by status 1 that it has saved nothing.
    """
    if worker:
        die_with_parent()

    def leave(signum: int, frame: FrameType | None) -> None:
        if worker:
            os._exit(1)
        os.write(2, f"harness: {Stopped(signum)}\n".encode())
        os._exit(128 + signum)

    for signum in handled():
        signal.signal(signum, leave)


def end_at_once() -> None:
    """From now on a signal simply ends this process: its work is done or has failed, and nobody should wait for it."""
    for signum in handled():
        signal.signal(signum, signal.SIG_DFL)


def die_with_parent() -> None:
    """Asks the kernel to kill this process when its parent dies, also by kill -9 (Linux's PR_SET_PDEATHSIG)."""
    if sys.platform == "linux":
        starter = multiprocessing.parent_process()
        parent = os.getppid() if starter is None else starter.pid
        ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGKILL)
        if os.getppid() != parent:  # it died before the call
            os._exit(1)


class StopRequest:
    """Notes the signals that stop a run; a second one ends the process at once.

    In a worker of our own launcher a second one is ignored: the launcher gets it too, ends, and its workers with it.
    """

    def __init__(self, ctx: "Context"):
        self.ctx = ctx
        self.noted = 0
        self._since = 0.0
        self._led = multiprocessing.parent_process() is not None
        self._echo = TORCHRUN_ECHO_SECONDS if "TORCHELASTIC_RUN_ID" in os.environ else ECHO_SECONDS
        for signum in handled():
            signal.signal(signum, self._note)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.noted:
            self.noted, self._since = signum, now
        elif not self._led and now - self._since > self._echo:
            os._exit(128 + signum)

    def __call__(self, steps: int) -> bool:
        """Whether to stop after `steps` steps of the epoch; the same answer on every rank."""
        if self.ctx.world == 1:
            return self.noted > 0
        if steps % STEPS_BETWEEN_CHECKS:
            return False
        return self.agreed()

    def agreed(self) -> bool:
        """Whether any rank was asked to stop; every rank must call it at the same place."""
        agreed = self.ctx.any(self.noted)
        if agreed:  # not assigned otherwise: a signal may have been noted since the message was sent
            self.noted = agreed
        return agreed > 0
