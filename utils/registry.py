"""Tables of named parts: criteria, schedules, data sets, models, optimizers. Imports no torch.

A table is a dict: ``METHODS["mine"] = Method(...)`` adds a line. A plugin (utils/plugins.py) does that while it is
loaded; then names that are taken are refused, and what is added is noted.
"""

import dataclasses
from collections import UserDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple, TypeVar

Entry = TypeVar("Entry")
Facts = dict[str, Any]  # of an entry: its plain values, as JSON has them


class NameFault(ValueError):
    """A line that a table refuses: its name is taken, or it is no entry of that table."""


class Line(NamedTuple):
    """A line that a plugin adds to a table; `before` is the entry that was there, if any: of another version."""

    table: "Table"
    name: str
    entry: Any
    before: Any = None

    def put(self) -> None:
        self.table[self.name] = self.entry

    def take_back(self) -> None:
        if self.before is None:
            self.table.data.pop(self.name, None)
        else:
            self.table.data[self.name] = self.before


class Table(UserDict[str, Entry]):
    """Named entries of one kind.

    Attributes:
        kind: what an entry is, in messages: "criterion".
        type: class of the entries.
        own: names of the harness's own lines, as `plain` writes them.
    """

    def __init__(
        self,
        kind: str,
        type: type,
        lines: Mapping[str, Entry],
        stand_in: Callable[[str, Facts], Entry] | None = None,
    ):
        """`stand_in` makes an entry that cannot be run, from a name and those of its `facts` that are known."""
        self.kind, self.type, self.own = kind, type, frozenset(map(plain, lines))
        self._make_stand_in, self._stand_ins = stand_in, set[str]()
        super().__init__()
        self.data.update(lines)  # a plugin may be the first to import the table

    def __setitem__(self, name: str, entry: Entry) -> None:
        lines = _noted.get()
        if lines is not None:
            self._check(name, entry)
            lines.append(Line(self, name, entry, self.data.get(name)))
        self._stand_ins.discard(name)
        super().__setitem__(name, entry)

    def _check(self, name: str, entry: Entry) -> None:
        if not isinstance(name, str) or not name.isprintable() or set(name) & set(" ,:") or not name:
            raise NameFault(f"{self.kind} {name!r}: a name is a word without spaces, commas and colons")
        if not isinstance(entry, self.type):
            raise NameFault(f"{self.kind} {name}: {self.type.__name__} is expected, not {type(entry).__name__}")
        if plain(name) in self.own:
            raise NameFault(f"{self.kind} {name}: the harness has one of this name; choose another name")

    def stand_in(self, name: str, facts: Facts) -> None:
        """Knows the name of a part that a saved run has used, if the part itself is not there."""
        absent = plain(name) not in self.own and (name not in self or name in self._stand_ins)
        if absent and self._make_stand_in:
            fields = {field.name for field in dataclasses.fields(self.type)}
            known = {key: tuple(v) if isinstance(v, list) else v for key, v in facts.items() if key in fields}
            super().__setitem__(name, self._make_stand_in(name, known))
            self._stand_ins.add(name)


def plain(name: str) -> str:
    """A name without what tells spellings apart: case, hyphens, underscores."""
    return name.strip().lower().replace("-", "").replace("_", "")


def facts_of(entry: Any) -> Facts:
    """The plain values of an entry that is a dataclass; its functions are left out."""
    if not dataclasses.is_dataclass(entry):
        return {}
    values = {field.name: getattr(entry, field.name) for field in dataclasses.fields(entry)}
    return {name: value for name, value in values.items() if value is None or isinstance(value, _PLAIN)}


_PLAIN = (bool, int, float, str, tuple)
_noted: ContextVar[list[Line] | None] = ContextVar("lines that a plugin adds", default=None)


@contextmanager
def noted() -> Iterator[list[Line]]:
    """Within it, the lines that tables get are checked and noted. They leave the tables again when an exception does.

    Raises:
        NameFault: by the assignment of a line whose name is taken.
    """
    lines: list[Line] = []
    token = _noted.set(lines)
    try:
        yield lines
    except BaseException:
        for line in reversed(lines):
            line.take_back()
        raise
    finally:
        _noted.reset(token)
