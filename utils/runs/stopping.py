"""Stopping a run: note the signal, agree among ranks, finish the step, save."""

import math
import multiprocessing
import os
import signal
import time
from typing import Protocol

from utils.distributed import Context
from utils.processes.signals import ECHO_SECONDS, SHUTDOWN_SECONDS, NotedSignal, handled

# torchrun passes on to its workers the signals that it gets; a Ctrl-C in a terminal has reached them already.
TORCHRUN_ECHO_SECONDS = 3.0
# Several processes agree on a stop by a message: about once per second, which costs nothing, at the latest every 16
# steps.
SECONDS_BETWEEN_CHECKS = 1.0
STEPS_BETWEEN_CHECKS = 16


class Stop(Protocol):
    """What a run asks whether to stop. signum: the signal that asked for it, 0 before."""

    signum: int

    def __call__(self, steps: int) -> bool:
        """Whether to stop after `steps` steps of the epoch; the same answer on every rank."""

    def agreed(self) -> bool:
        """Whether any rank was asked to stop; every rank must call it at the same place."""

    def saving(self) -> None:
        """Called before the state of a run that stops is saved."""


class StopRequest(NotedSignal):
    """Notes the signals that stop a run. A second one ends the process at once, unless the state is being saved.

    A worker of utils/launcher.py ignores a second signal: the launcher gets it too, ends, and its workers with it.
    """

    def __init__(self, ctx: Context):
        led = multiprocessing.parent_process() is not None
        under_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
        super().__init__(math.inf if led else TORCHRUN_ECHO_SECONDS if under_torchrun else ECHO_SECONDS)
        self.ctx = ctx
        self._interval, self._steps, self._asked = 1, 0, time.monotonic()
        for signum in handled():
            signal.signal(signum, self.note)

    def saving(self) -> None:
        """For as long as a save may take, ignore further signals: to end now would lose the state.

        (A signal that went to one worker alone reaches the others later: torchrun sends it when that one has ended.)
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
