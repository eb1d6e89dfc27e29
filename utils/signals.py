"""Stopping on request: a signal is noted, the step in progress ends, the state is saved, then the run stops."""

import os
import signal
import time
from types import FrameType

from utils.distributed import Context

# A terminal's Ctrl-C reaches the workers twice, once from the terminal and once from their launcher; a person's second
# one comes later.
ECHO_SECONDS = 1.0
# With several processes a stop is agreed upon by a message; every few steps, so that it costs nothing.
STEPS_BETWEEN_CHECKS = 16


class Stopped(Exception):
    """The run was asked to stop, and its state is saved."""

    def __init__(self, signum: int):
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.signum = signum


class StopRequest:
    """Notes SIGINT, SIGTERM and Slurm's SIGUSR1; a second one, more than a second later, ends the process at once."""

    def __init__(self, ctx: Context):
        self.ctx = ctx
        self.noted = 0
        self._since = 0.0
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(signum, self._note)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.noted and now - self._since > ECHO_SECONDS:
            os._exit(128 + signum)
        if not self.noted:
            self.noted, self._since = signum, now

    def __call__(self, steps: int) -> bool:
        """Whether to stop after `steps` steps of the epoch; the same answer on every rank."""
        if self.ctx.world == 1:
            return self.noted > 0
        if steps % STEPS_BETWEEN_CHECKS:
            return False
        return self.agreed()

    def agreed(self) -> bool:
        """Whether any rank was asked to stop; every rank must call it at the same place."""
        self.noted = self.ctx.any(self.noted)
        return self.noted > 0
