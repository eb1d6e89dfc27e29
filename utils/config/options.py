"""What an option is, and the schema that holds the declarations of all options.

Options are fastargs parameters in fastargs sections. fastargs' own collecting of values is not used: it drops unknown
keys, takes environment variables over the command line, ignores null and exits 0 on a failed check.
utils/config/sources.py reads the YAML file and the command line; utils/config/resolving.py merges and checks them.
"""

import reprlib
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any, Literal

import fastargs

from utils.config.checkers import Strict


class Role(Enum):
    """What an option decides about a run: may a resumed run change it, and does a figure's legend name it?"""

    EXPERIMENT = "what the experiment is"
    REPLICATE = "which replicate of the experiment this is"
    IMPLIED = "what the rest of the experiment already settles"
    RECORD = "what else it leaves behind"
    EXTENT = "how far the experiment goes"
    EXECUTION = "how it executes"
    PLACE = "where its files and processes are"

    @property
    def free_on_resume(self) -> bool:
        """Whether a run may be continued with another value."""
        return self in (Role.EXTENT, Role.EXECUTION, Role.PLACE)

    @property
    def in_legends(self) -> bool:
        """Whether runs that differ in it are different lines of a figure."""
        return self is Role.EXPERIMENT


EXPERIMENT, REPLICATE, IMPLIED, RECORD, EXTENT, EXECUTION, PLACE = Role


class Option(fastargs.Param):
    """One option.

    Attributes:
        checker: what it takes.
        default: its value where nothing sets it.
        meaning: one line for ``--help``.
        unit: "" where it has none.
        role: what it decides.
        needs_several: the option has no effect in a run with only one of these; None where that does not matter.
    """

    def __init__(
        self,
        checker: Strict,
        *,
        default: Any,
        meaning: str,
        unit: str = "",
        role: Role = EXPERIMENT,
        needs_several: Literal["levels", "processes"] | None = None,
    ):
        super().__init__(checker, desc=meaning, default=default)
        self.checker: Strict = checker
        self.default = default
        self.meaning = meaning
        self.unit = unit
        self.role = role
        self.needs_several = needs_several


class Schema(fastargs.Config):
    """The declared options of all sections, in the order of declaration. It holds no values.

    Attributes:
        entries: {(section, key): Option}.
    """

    entries: dict[tuple[str, str], Option]

    def section(self, name: str, meaning: str, **options: Option) -> None:
        """Declare a section and its options."""
        fastargs.Section(name, meaning, config_descriptor=self).params(**options)

    def paths(self, wanted: Callable[[Option], bool]) -> tuple[str, ...]:
        """``section.key`` of each wanted option."""
        return tuple(".".join(path) for path, option in self.entries.items() if wanted(option))

    def find(self, path: str) -> Option | None:
        """The option ``section.key``; None if there is none."""
        section, _, key = path.partition(".")
        return self.entries.get((section, key))

    def default(self, path: str) -> Any:
        """The default of ``section.key``."""
        section, key = path.split(".")
        return self.entries[section, key].default

    def help_text(self, usage: str) -> str:
        """Each option with its type, unit, default, meaning and allowed values, section by section."""
        lines = [usage]
        for namespace, section in self.sections.items():
            lines += ["", f"{'.'.join(namespace)}: {section.desc}"]
            for path in self.sections_to_entries[namespace]:
                option = self.entries[path]
                unit = f"; unit: {option.unit}" if option.unit else ""
                facts = f"{option.checker.kind}{unit}; default {show(option.default)}"
                lines.append(f"  --{'.'.join(path)}=VALUE   ({facts})")
                lines.append(f"        {option.meaning}")
                lines.append(f"        allowed: {option.checker.help()}")
        return "\n".join(lines)


@dataclass(frozen=True)
class Note:
    """Something about an option that its user should know, and that is no fault."""

    option: str  # section.key
    text: str

    @property
    def section(self) -> str:
        return self.option.partition(".")[0]

    def __str__(self) -> str:
        return f"{self.option}: {self.text}"


def show(value: Any) -> str:
    """A value as a user would write it, on one line and not too long."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple) and not any(isinstance(entry, list | tuple | dict) for entry in value):
        return f"[{', '.join(show(entry) for entry in value[:8])}{', ...' if len(value) > 8 else ''}]"
    if isinstance(value, str) and value and value.isprintable() and value == value.strip() and len(value) <= 80:
        return value
    short = reprlib.Repr()
    short.maxstring = short.maxother = 80
    short.maxlevel = 2
    return short.repr(value)


def fault(path: str, value: Any, allowed: str) -> str:
    """The line that refuses a value."""
    return f"{path}: {show(value)} is not allowed: {allowed}"
