"""What may interrupt an epoch: a signal that stops the run, a state that is due. All ranks agree on it after a step."""

import math
import multiprocessing
import os
import time
from typing import Protocol

from utils.distributed import Context
from utils.processes.signals import ECHO_SECONDS, SHUTDOWN_SECONDS, NotedSignal, install
from utils.runs.saving import SaveClock

# torchrun passes on to its workers the signals that it gets; a Ctrl-C in a terminal has reached them already.
TORCHRUN_ECHO_SECONDS = 3.0
# Several processes agree on a stop by a message: about once per second, which costs nothing, at the latest every 16
# steps.
SECONDS_BETWEEN_CHECKS = 1.0
STEPS_BETWEEN_CHECKS = 16


class Stop(Protocol):
    """What a run asks whether to stop.

    Attributes:
        signum: the signal that asked for it, 0 before.
        clock: says when a state is due; rank 0's is what counts.
        save_due: whether a state was due when all ranks last agreed; the same on every rank.
    """

    signum: int
    clock: SaveClock
    save_due: bool

    def __call__(self, steps: int) -> bool:
        """Whether to stop after `steps` steps of the epoch; the same answer on every rank."""

    def agreed(self) -> bool:
        """Whether any rank was asked to stop; every rank must call it at the same place."""

    def hold_signals(self) -> None:
        """Called before the state of a run that stops is saved."""


class StopRequest(NotedSignal):
    """Notes the signals that stop a run. A second one ends the process at once, unless the state is being saved.

    A worker of utils/launcher.py ignores a second signal: the launcher gets it too, ends, and its workers with it.

    Args:
        clock: says when a state is due; by default never.
    """

    def __init__(self, ctx: Context, clock: SaveClock | None = None):
        led = multiprocessing.parent_process() is not None
        under_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
        super().__init__(math.inf if led else TORCHRUN_ECHO_SECONDS if under_torchrun else ECHO_SECONDS)
        self.ctx, self.clock, self.save_due = ctx, clock or SaveClock(), False
        self._interval, self._steps, self._asked = 1, 0, time.monotonic()
        install(self.note)

    def hold_signals(self) -> None:
        """Ignores further signals for as long as a save may take: to end now would lose the state.

        (A signal that went to one worker alone reaches the others later: torchrun sends it when that one has ended.)
        """
        self.since, self.echo = time.monotonic(), max(self.echo, SHUTDOWN_SECONDS)

    def __call__(self, steps: int) -> bool:
        """Whether to stop after a step; the same answer on every rank. Sets `save_due`."""
        if self.ctx.world == 1:
            self.save_due = self.clock.due()
            return self.signum > 0
        self._steps, self.save_due = self._steps + 1, False
        return self._steps >= self._interval and self.agreed()

    def agreed(self) -> bool:
        """Whether any rank was asked to stop; every rank must call it at the same place. Sets `save_due`."""
        # The slowest rank's time of a step, so that all of them count up to the same one.
        milliseconds = int(1000 * (time.monotonic() - self._asked) / max(self._steps, 1))
        due = int(self.ctx.is_main and self.clock.due())
        agreed, milliseconds, due = self.ctx.largest([self.signum, milliseconds, due])
        self.save_due = due > 0
        if self._steps:
            steps = int(1000 * SECONDS_BETWEEN_CHECKS / max(milliseconds, 1))
            self._interval = min(max(steps, 1), STEPS_BETWEEN_CHECKS)
        self._steps, self._asked = 0, time.monotonic()
        if agreed:  # not assigned otherwise: a signal may have been noted since the message was sent
            self.since = self.since or time.monotonic()
            self.signum = agreed
        return agreed > 0
