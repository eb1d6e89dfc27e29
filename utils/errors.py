"""Faults by kind: of the config, of the data, of the run. Whoever raises one says which; nobody reads its text.

``exit_status`` is that of a program that ends with the fault. Every other exception is a bug of the program: exit
status 1, with its traceback.
"""

import sys
import traceback
from collections.abc import Iterable
from typing import Any


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
    """Data that are missing, damaged, or unfit for what is asked of them; the message names the file or folder."""

    exit_status = 1


class RunError(RuntimeError):
    """A run that cannot go on, for a reason that its user can act on."""

    exit_status = 1


class ConnectionLost(RunError):
    """Another process of the run has died or no longer answers."""


KINDS = {kind.__name__: kind for kind in (ConfigError, DataError, RunError, ConnectionLost)}


def lines_of(error: BaseException) -> list[str]:
    """What to print of `error`: one line per fault of a config, one line otherwise; a bug's line names its class."""
    if isinstance(error, ConfigError):
        return error.faults
    line = " ".join(str(error).split())
    return [line] if isinstance(error, tuple(KINDS.values())) else [f"{type(error).__name__}: {line}".rstrip(": ")]


def report(error: BaseException, program: str = "harness") -> int:
    """Prints `error` on stderr, the one clear line last, after a traceback if it is a bug; returns the exit status."""
    return print_report(to_record(error), program)


def to_record(error: BaseException) -> dict[str, Any]:
    """What `print_report` and `from_record` need to know of `error`: plain values, which cross from worker to launcher.

    Keys: kind (class name), lines, traceback ("" for a fault that its user can act on).
    """
    known = isinstance(error, tuple(KINDS.values()))
    trace = "" if known else "".join(traceback.format_exception(error))
    return {"kind": type(error).__name__, "lines": lines_of(error), "traceback": trace}


def print_report(record: dict[str, Any], program: str = "harness") -> int:
    """As `report`, from a `to_record`."""
    if record["traceback"]:
        print(record["traceback"], file=sys.stderr)
    print(*(f"{program}: {line}" for line in record["lines"]), sep="\n", file=sys.stderr)
    kind = KINDS.get(record["kind"])
    return kind.exit_status if kind else 1
