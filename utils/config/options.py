"""What a config is made of: options, their values, and the resolving of several sources with every fault in one pass.

fastargs declares the options (`Section`, `Option`); its own collecting is not used, because it drops unknown keys,
takes environment variables over the command line, ignores null and exits 0 on a failed check. Nothing here is kept
between calls, and nothing here imports torch: ``--help`` and a config fault must answer at once.
utils/config/sources.py reads the YAML file and the command line.
"""

import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import FrozenInstanceError, dataclass, field
from typing import Any

import fastargs

from utils.config.checkers import Strict, nearest


class Option(fastargs.Param):
    """One option: what it takes, its default, its unit ("" where it has none) and its meaning in a line."""

    def __init__(self, checker: Strict, default: Any, unit: str, meaning: str):
        super().__init__(checker, desc=meaning, default=default)
        self.unit = unit


class Group:
    """The values of one section: read-only attributes, equal by value, picklable."""

    def __init__(self, values: Mapping[str, Any]):
        vars(self).update(values)

    def __getattr__(self, name: str) -> Any:  # called for missing names only
        raise AttributeError(f"no option {name!r} here; there are {', '.join(vars(self))}", name=name)

    def __setattr__(self, name: str, value: Any) -> None:
        raise FrozenInstanceError(f"cannot set {name!r}: a config is read-only, use cfg.replace(...)")

    def __delattr__(self, name: str) -> None:
        raise FrozenInstanceError(f"cannot delete {name!r}: a config is read-only")

    def __eq__(self, other: object) -> bool:
        return vars(self) == vars(other) if type(self) is type(other) else NotImplemented

    def __hash__(self) -> int:
        return hash(tuple(vars(self).items()))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in vars(self).items())})"


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
    return f"{path}: {show(value)} is not allowed: {allowed}"


# ----------------------------------------------------------------------------------------------------------- resolving


@dataclass
class Source:
    """One place that sets options, later ones winning: ``origin`` is "file", "cli" or "code"."""

    origin: str
    values: Any


@dataclass
class Resolved:
    """What the sources came to. `values` lacks the options named in `bad`, whose faults are in `faults`."""

    values: dict[str, Group] = field(default_factory=dict)
    bad: set[str] = field(default_factory=set)  # keys without a usable value
    raw: dict[str, Any] = field(default_factory=dict)  # "section.key" -> as given
    origin: dict[str, str] = field(default_factory=dict)  # "section.key" -> where it was set, if it was
    faults: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Legacy:
    """Options of older files: `unused` have no effect any more, `moved` live elsewhere now (old path -> new path)."""

    unused: frozenset[str] = frozenset()
    moved: Mapping[str, str] = field(default_factory=dict)


def resolve(schema: fastargs.Config, sources: Sequence[Source], legacy: Legacy) -> Resolved:
    """Merges the sources, then checks each option once; unknown names, wrong shapes and bad values become faults."""
    out = Resolved()
    for source in sources:
        given = _modernise(_flatten(schema, source.values, legacy, out), legacy, out)
        out.raw.update(given)
        out.origin.update(dict.fromkeys(given, source.origin))
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
            out.faults.append(fault(path, value, str(error)))
            out.bad.add(key)
    out.values = {section: Group(values) for section, values in sections.items()}
    return out


def _flatten(schema: fastargs.Config, values: Any, legacy: Legacy, out: Resolved) -> dict[str, Any]:
    """{"section.key": value} of one source's known options; the rest become faults."""
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
    """Drops options of older files that have no effect and moves those that moved, with a note or a fault."""
    for path in [path for path in given if path in legacy.unused]:
        out.notes.append(f"{path}: {show(given.pop(path))} has no effect (accepted for older files)")
    for old, new in legacy.moved.items():
        if old not in given:
            continue
        value = given.pop(old)
        if new in given and show(given[new]) != show(value):
            out.faults.append(fault(old, value, f"{new} is also given, as {show(given[new])}; keep {new} alone"))
        else:
            given[new] = value
            out.notes.append(f"{old}: {show(value)} is read as {new}")
    return given


# ---------------------------------------------------------------------------------------------------------------- help


def help_text(schema: fastargs.Config, usage: str) -> str:
    """Every option with its type, default, unit, meaning and allowed values, section by section."""
    lines = [usage]
    for namespace, section in schema.sections.items():
        lines += ["", f"{'.'.join(namespace)}: {section.desc}"]
        for path in schema.sections_to_entries[namespace]:
            option = schema.entries[path]
            unit = f", in {option.unit}" if option.unit else ""
            lines.append(f"  --{'.'.join(path)}=VALUE   ({option.checker.kind}{unit}; default {show(option.default)})")
            lines.append(f"        {option.desc}")
            lines.append(f"        allowed: {option.checker.help()}")
    return "\n".join(lines)
