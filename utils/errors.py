"""What can go wrong, by kind: a config, the data, the run. Who raises says which; nothing is told by its text."""

import sys
from collections.abc import Iterable, Sequence


class RunError(RuntimeError):
    """The run cannot go on, for a reason its user can act on: told in one line, without a traceback."""


class ConfigError(ValueError):
    """A config that cannot be run; `faults` has one line a fault."""

    def __init__(self, faults: str | Iterable[str]):
        self.faults = [faults] if isinstance(faults, str) else list(faults)
        super().__init__(self.faults)

    def __str__(self) -> str:
        return "\n".join(self.faults)


def tell_faults(faults: Sequence[str]) -> int:
    """Prints a line a fault of a config, and returns the exit status of one: 2 (DESIGN 7)."""
    print(*(f"harness: {line}" for line in faults), sep="\n", file=sys.stderr)
    return 2
