"""When a resume state is due. Imports no torch."""

import contextlib
import time
from collections.abc import Iterator

# A state is due at the earliest when this share of the time since the last one is what training waited for that one.
LARGEST_SHARE = 0.02


class SaveClock:
    """Decides when a resume state is due: ``save_every_minutes`` after the last one, or later if saving is slow.

    Args:
        minutes: between two states; 0 = never due.
    """

    def __init__(self, minutes: float = 0.0):
        self.minutes, self.waited, self.saved_at = minutes, 0.0, time.monotonic()

    def due(self) -> bool:
        """Whether the last state is older than the minutes, and than 50 times what training waited for it."""
        if not self.minutes:
            return False
        return time.monotonic() - self.saved_at >= max(60 * self.minutes, self.waited / LARGEST_SHARE)

    @contextlib.contextmanager
    def measured(self) -> Iterator[None]:
        """Around all of a save that training waits for: measures it."""
        begin = time.monotonic()
        yield
        self.saved_at = time.monotonic()
        self.waited = self.saved_at - begin
