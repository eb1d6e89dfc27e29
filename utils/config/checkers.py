"""Strict checkers for options: one class per type, each with a text that says what it allows.

fastargs' own ``int`` turns 3.9 into 3, and its ``bool`` turns "false" into True. These take text (from YAML or the
command line) or a Python value. They return exactly that value, or raise `ValueError` saying what is allowed. A checked
value passes its checker again unchanged, so a resolved config can be dumped and read back.
"""

import math
import re
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from typing import Any

from fastargs.validation import Checker

from utils.registry import Table

_INT = re.compile(r"[+-]?[0-9]+")
_FLOAT = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
_LONGEST_NUMBER = 64  # characters; int() itself raises past a few thousand digits


def near_names(name: str, choices: Sequence[str], count: int = 3, cutoff: float = 0.5) -> list[str]:
    """The choices most similar to `name`, ignoring case, the nearest one first; [] if none is close."""
    by_lower = {choice.lower(): choice for choice in choices}
    return [by_lower[found] for found in get_close_matches(str(name).lower(), list(by_lower), count, cutoff)]


def nearest(name: str, choices: Sequence[str], cutoff: float = 0.5) -> str:
    """The choice most similar to `name`, ignoring case; "" if none is close."""
    return next(iter(near_names(name, choices, 1, cutoff)), "")


AUTO_ON_OFF = ("auto", "on", "off")  # what options take whose best value depends on the machine


class Strict(Checker):
    """Base of the checkers.

    Attributes:
        kind: the type's name in ``--help``.
        empty: the value that YAML's null stands for; None if null is refused.
    """

    kind = ""
    empty: Any = None

    def refuse(self) -> ValueError:
        """The error to raise: it says what is allowed."""
        return ValueError(self.help())


class Int(Strict):
    """A whole number, low..high; with `or_zero` also 0, which then means "the default"."""

    kind = "int"

    def __init__(self, low: int = 0, high: int | None = None, or_zero: bool = False):
        self.low, self.high, self.or_zero = low, high, or_zero

    def check(self, value: Any) -> int:
        if isinstance(value, str) and len(value) <= _LONGEST_NUMBER and _INT.fullmatch(value.strip()):
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.refuse()
        if self.or_zero and value == 0:
            return 0
        if value < self.low or (self.high is not None and value > self.high):
            raise self.refuse()
        return int(value)

    def help(self) -> str:
        span = f">= {self.low}" if self.high is None else f"{self.low}..{self.high}"
        return f"a whole number {span}{', or 0' if self.or_zero else ''}"


class Float(Strict):
    """A finite number in an interval, such as ``Float("[0, 1)")``; ``Float("(0,]")`` has no upper bound."""

    kind = "float"

    def __init__(self, interval: str):
        low, _, high = interval[1:-1].partition(",")
        self.low, self.open_low = float(low.strip() or "-inf"), interval[0] == "("
        self.high, self.open_high = float(high.strip() or "inf"), interval[-1] == ")"

    def check(self, value: Any) -> float:
        if isinstance(value, str) and len(value) <= _LONGEST_NUMBER and _FLOAT.fullmatch(value.strip()):
            value = float(value)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.refuse()
        try:
            value = float(value)
        except OverflowError:
            raise self.refuse() from None
        if not math.isfinite(value) or value < self.low or value > self.high:
            raise self.refuse()
        if (self.open_low and value == self.low) or (self.open_high and value == self.high):
            raise self.refuse()
        return value

    def help(self) -> str:
        bounds = []
        if math.isfinite(self.low):
            bounds.append(f"{'>' if self.open_low else '>='} {self.low:g}")
        if math.isfinite(self.high):
            bounds.append(f"{'<' if self.open_high else '<='} {self.high:g}")
        return " ".join(["a number", " and ".join(bounds)]).strip()


class Bool(Strict):
    """true, false, 1 or 0, in any case. YAML 1.1's yes, no, on and off are refused."""

    kind = "bool"
    words = {"true": True, "1": True, "false": False, "0": False}  # noqa: RUF012 (constant)

    def check(self, value: Any) -> bool:
        if isinstance(value, bool):
            return value
        if isinstance(value, int | str) and str(value).strip().lower() in self.words:
            return self.words[str(value).strip().lower()]
        raise self.refuse()

    def help(self) -> str:
        return "true or false"


class Choice(Strict):
    """One of a few names; with `any_case`, in any case, and the name is returned as listed.

    Attributes:
        choices: the names; of a table that grows, those that it has now.
        grows: whether plugins may add names.
    """

    kind = "name"

    def __init__(self, choices: Iterable[str], any_case: bool = False, first: Sequence[str] = ()):
        """`choices` may be a table (utils/registry.py); `first` is allowed besides, and listed before them."""
        self.grows, self.any_case = isinstance(choices, Table), any_case
        self._choices, self._first = choices if self.grows else tuple(choices), tuple(first)

    @property
    def choices(self) -> tuple[str, ...]:
        return (*self._first, *self._choices)

    def check(self, value: Any) -> str:
        if isinstance(value, str):
            value = value.strip()
            for choice in self.choices:
                if value == choice or (self.any_case and value.lower() == choice.lower()):
                    return choice
            near = nearest(value, self.choices)
            if near:
                raise ValueError(f"did you mean {near}? {self.help()}")
        raise self.refuse()

    def help(self) -> str:
        if len(self.choices) == 1:
            return f"only {self.choices[0]}"
        return "one of " + ", ".join(self.choices)


class Switch(Choice):
    """auto, on or off; older files' true and false mean on and off."""

    words = {"true": "on", "1": "on", "false": "off", "0": "off"}  # noqa: RUF012 (constant)

    def __init__(self):
        super().__init__(AUTO_ON_OFF)

    def check(self, value: Any) -> str:
        if isinstance(value, bool | int | str):
            value = self.words.get(str(value).strip().lower(), value)
        return super().check(value)


class Word(Strict):
    """Printable text without spaces, such as a model's name or an address."""

    kind = "text"

    def check(self, value: Any) -> str:
        if not isinstance(value, str) or not value.strip():
            raise self.refuse()
        value = value.strip()
        if not value.isprintable() or any(c.isspace() for c in value):
            raise self.refuse()
        return value

    def help(self) -> str:
        return "a word without spaces"


class Pair(Strict):
    """``NAME:VALUE``: a word, and what `value` takes. Returned as text, the value as its own checker writes it."""

    kind = "pair"

    def __init__(self, name: str, value: Strict):
        self.name, self.value = name, value

    def check(self, value: Any) -> str:
        if not isinstance(value, str):
            raise self.refuse()
        name, colon, rest = value.strip().rpartition(":")
        if not colon or not name or name.strip() != name or any(c.isspace() for c in name) or not name.isprintable():
            raise self.refuse()
        try:
            self.value.check(rest)
        except ValueError:
            raise self.refuse() from None
        return f"{name}:{rest.strip()}"

    def help(self) -> str:
        return f"{self.name}:VALUE, VALUE {self.value.help()}"


class List(Strict):
    """A YAML list, or text with commas between entries, returned as a tuple; `bracketed` allows [ and ] in the text."""

    kind = "list"

    def __init__(self, entry: Strict, bracketed: bool = False):
        self.entry, self.bracketed = entry, bracketed

    def check(self, value: Any) -> tuple:
        if isinstance(value, str):
            text = value.strip()
            if self.bracketed and text.startswith("[") and text.endswith("]"):
                text = text[1:-1].strip()
            value = [part.strip() for part in text.split(",")] if text else []
        elif self.bracketed and isinstance(value, int | float) and not isinstance(value, bool):
            value = [value]
        if not isinstance(value, list | tuple):
            raise self.refuse()
        try:
            return tuple(self.entry.check(entry) for entry in value)
        except ValueError:
            raise self.refuse() from None

    def help(self) -> str:
        return f"a list ([] if empty; commas between entries on the command line); each entry: {self.entry.help()}"
