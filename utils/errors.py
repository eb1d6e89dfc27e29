"""Typed faults: of the config, of the data, of the run. The raiser chooses the type.

No code parses a message, with one exception: `distributed.lost_connections`.

``exit_status`` is the exit status of a program that such a fault ends. Any other exception is a bug of the program:
exit status 1, with a traceback.
"""

import traceback
from collections.abc import Iterable
from typing import Any

from utils.output import complain


class ConfigError(ValueError):
    """A config that cannot be run. Nothing has been created.

    Attributes:
        faults: one line per fault, each naming its option.
    """

    exit_status = 2

    def __init__(self, faults: str | Iterable[str]):
        self.faults = [faults] if isinstance(faults, str) else list(faults)
        super().__init__(self.faults)

    def __str__(self) -> str:
        return "\n".join(self.faults)


class DataError(ValueError):
    """Data that are missing, damaged or unsuitable. The message names the file or folder."""

    exit_status = 1


class RunError(RuntimeError):
    """A run that cannot go on, for a reason that the user can act on."""

    exit_status = 1


class ConnectionLost(RunError):
    """Another process of the run died or stopped answering."""


KINDS = {kind.__name__: kind for kind in (ConfigError, DataError, RunError, ConnectionLost)}


def lines_of(error: BaseException) -> list[str]:
    """The lines that report `error`: one per config fault; otherwise a single one. A bug's line names its class."""
    if isinstance(error, ConfigError):
        return error.faults
    line = " ".join(str(error).split())
    return [line] if isinstance(error, tuple(KINDS.values())) else [f"{type(error).__name__}: {line}".rstrip(": ")]


def report(error: BaseException, program: str = "harness") -> int:
    """Print `error` on stderr and return the exit status. A bug's traceback comes first, the clear line last."""
    return print_report(to_record(error), program)


def to_record(error: BaseException) -> dict[str, Any]:
    """`error` as plain values, which a worker can send to the launcher; `print_report` prints them.

    Keys: kind (class name), lines, traceback ("" for a fault that the user can act on).
    """
    known = isinstance(error, tuple(KINDS.values()))
    trace = "" if known else "".join(traceback.format_exception(error))
    return {"kind": type(error).__name__, "lines": lines_of(error), "traceback": trace}


def print_report(record: dict[str, Any], program: str = "harness") -> int:
    """As `report`, from the record that `to_record` made."""
    if record["traceback"]:
        complain(record["traceback"])
    complain(*(f"{program}: {line}" for line in record["lines"]))
    kind = KINDS.get(record["kind"])
    return kind.exit_status if kind else 1
