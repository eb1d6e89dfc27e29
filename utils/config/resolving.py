"""Resolving: several sources of options become one set of checked values, with every fault found in one pass.

Nothing is kept between calls.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from utils.config.checkers import nearest
from utils.config.options import Note, Schema, fault, show
from utils.config.values import Values
from utils.errors import ConfigError
from utils.plugins import OPTION, load_plugins


@dataclass
class Source:
    """One place that sets options; later sources win."""

    origin: Literal["file", "cli", "code"]
    values: Any  # meant to be {section: {key: value}}


@dataclass
class Resolved:
    """What the sources came to.

    Attributes:
        values: {section: checked values}; invalid options are absent.
        bad: keys of the invalid options.
        raw: {"section.key": value as given}.
        origin: {"section.key": the last source that set it}; options that nothing set are absent.
        faults: one line each.
    """

    values: dict[str, Values] = field(default_factory=dict)
    bad: set[str] = field(default_factory=set)
    raw: dict[str, Any] = field(default_factory=dict)
    origin: dict[str, str] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    notes: list[Note] = field(default_factory=list)


@dataclass(frozen=True)
class Legacy:
    """Options of older files, by ``section.key``.

    Attributes:
        unused: accepted, without effect.
        moved: {old path: new path}.
    """

    unused: frozenset[str] = frozenset()
    moved: Mapping[str, str] = field(default_factory=dict)


def merge(schema: Schema, sources: Sequence[Source], legacy: Legacy) -> Resolved:
    """What the sources give, not yet checked. Unknown names and wrong shapes become faults."""
    out = Resolved()
    for source in sources:
        given = _modernise(_flatten(schema, source.values, legacy, out), legacy, out)
        out.raw.update(given)
        out.origin.update(dict.fromkeys(given, source.origin))
    return out


def load_parts(schema: Schema, out: Resolved) -> bool:
    """Load the plugins, so that the names that they add are known; faults go to `out`. Returns whether all are there.

    A value that is no list of paths is left to `check_values`.
    """
    option = schema.find(OPTION)
    try:
        load_plugins(option.checker.check(out.raw.get(OPTION, ()))) if option else ()
    except ConfigError as error:
        out.faults += error.faults
        return False
    except ValueError:
        return False
    return True


def check_values(schema: Schema, out: Resolved, all_parts: bool = True) -> None:
    """Check each option once. Bad values become faults.

    Args:
        all_parts: whether all plugins could be loaded. If not, names that they might have added are no faults.
    """
    sections: dict[str, dict[str, Any]] = {}
    for (section, key), option in schema.entries.items():
        path = f"{section}.{key}"
        values = sections.setdefault(section, {})
        value = out.raw.get(path, option.default)
        if value is None:
            value = option.checker.empty
        if value is None:
            hint = f"{option.checker.help()}; or leave it out for the default, {show(option.default)}"
            out.faults.append(fault(path, None, hint))
            out.bad.add(key)
            continue
        try:
            values[key] = option.checker.check(value)
        except ValueError as error:
            if all_parts or not getattr(option.checker, "grows", False):
                out.faults.append(fault(path, value, str(error)))
            out.bad.add(key)
    out.values = {section: Values(values) for section, values in sections.items()}


def _flatten(schema: Schema, values: Any, legacy: Legacy, out: Resolved) -> dict[str, Any]:
    """{"section.key": value} of one source's known options; unknown ones become faults."""
    if not isinstance(values, Mapping):
        out.faults.append(f"config: {show(values)} is not allowed: a mapping of sections")
        return {}
    sections: dict[str, list[str]] = {}
    for section, key in schema.entries:
        sections.setdefault(section, []).append(key)
    flat = {}
    for section, options in values.items():
        if section not in sections:
            out.faults.append(_unknown_section(section, sections))
        elif options is None:  # a section with everything commented out
            continue
        elif not isinstance(options, Mapping):
            example = sections[section][0]
            out.faults.append(fault(section, options, f"a mapping of options, such as `{example}: ...`"))
        else:
            for key, value in options.items():
                path = f"{section}.{key}"
                if key in sections[section] or path in legacy.unused or path in legacy.moved:
                    flat[path] = value
                else:
                    out.faults.append(_unknown_key(section, key, value, sections))
    return flat


def _unknown_section(section: Any, sections: Mapping[str, list[str]]) -> str:
    head, _, key = str(section).partition(".")
    owners = [name for name, keys in sections.items() if section in keys]
    if key and key in sections.get(head, []):
        hint = f"write `{head}:` and `{key}: ...` indented below it"
    elif owners:
        hint = f"it belongs below `{owners[0]}:`"
    else:
        near = nearest(str(section), list(sections))
        hint = f"did you mean {near}? " if near else ""
        hint += f"Sections are {', '.join(sections)}"
    return f"{show(section)}: unknown section: {hint}"


def _unknown_key(section: str, key: Any, value: Any, sections: Mapping[str, list[str]]) -> str:
    owners = [name for name, keys in sections.items() if key in keys]
    near = nearest(str(key), sections[section])
    if near or owners:
        hint = f"did you mean {section + '.' + near if near else owners[0] + '.' + key}?"
    else:
        hint = f"{section} has {', '.join(sections[section])}"
    return f"{section}.{show(key)}: unknown option (given as {show(value)}): {hint}"


def _modernise(given: dict[str, Any], legacy: Legacy, out: Resolved) -> dict[str, Any]:
    """Drop the unused options of older files and rename the moved ones, with a note or a fault for each."""
    for path in [path for path in given if path in legacy.unused]:
        out.notes.append(Note(path, f"{show(given.pop(path))} has no effect (accepted for older files)"))
    for old, new in legacy.moved.items():
        if old not in given:
            continue
        value = given.pop(old)
        if new in given and show(given[new]) != show(value):
            out.faults.append(fault(old, value, f"{new} is also given, as {show(given[new])}; keep {new} alone"))
        else:
            given[new] = value
            out.notes.append(Note(old, f"{show(value)} is read as {new}"))
    return given
