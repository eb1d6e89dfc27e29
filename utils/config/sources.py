"""Reading options from a YAML file and from the command line, both as text and without guessing types.

The option's checker (utils/config/checkers.py) knows the type: ``5e-4`` is a number for a rate, ``on`` is a word for a
name, from either source.
"""

import contextlib
import os
from collections.abc import Sequence
from typing import Any

import yaml

from utils.config.checkers import Bool, nearest
from utils.config.options import Schema, show
from utils.errors import ConfigError

_LARGEST_FILE = 1 << 20  # bytes; a config is a page of text
_SECTIONS = "sections such as `optimizer:` with options below them are expected"


# ---------------------------------------------------------------------------------------------------------------- YAML


class _Rules:
    """How YAML is read, for a loader of PyYAML: its safe_load, but all plain words but null stay text; no tags.

    YAML 1.1 would guess wrongly: ``compile: on`` is True, ``seed: 010`` is 8, ``expt_name: 2024-01-01`` is a date,
    ``1:30`` is 90, and ``5e-4`` is no number.

    Attributes:
        repeats: (key, line of its first use, line of the repeat) of each key given twice.
    """

    def __init__(self, stream: str):
        super().__init__(stream)  # type: ignore[call-arg]  # the loader that these rules are mixed into
        self.repeats: list[tuple[str, int, int]] = []
        self.flat: set[int] = set()  # mappings that `flatten_mapping` has seen

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Notes repeated keys, then puts the keys of merged mappings (``<<: *anchor``) before the mapping's own."""
        if id(node) in self.flat:
            return
        self.flat.add(id(node))
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                line = key.start_mark.line + 1
                if key.value in lines:
                    self.repeats.append((key.value, lines[key.value], line))
                lines.setdefault(key.value, line)
        super().flatten_mapping(node)  # type: ignore[misc]


_NULL = "tag:yaml.org,2002:null"
_MERGE = "tag:yaml.org,2002:merge"
_KEPT = {_NULL, *(f"tag:yaml.org,2002:{kind}" for kind in ("str", "seq", "map")), None}  # None: refuses all other tags
_CONSTRUCTORS = {tag: make for tag, make in yaml.SafeLoader.yaml_constructors.items() if tag in _KEPT}
_RESOLVERS = {
    first: kept
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    if (kept := [(tag, pattern) for tag, pattern in pairs if tag in (_NULL, _MERGE)])
}


class _Loader(_Rules, yaml.SafeLoader):
    """Python's own parser, whose faults are in plain words."""

    yaml_constructors = _CONSTRUCTORS
    yaml_implicit_resolvers = _RESOLVERS


class _FastLoader(_Rules, getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """libyaml's parser, eight times as fast, where PyYAML has it."""

    yaml_constructors = _CONSTRUCTORS
    yaml_implicit_resolvers = _RESOLVERS


def read_yaml(path: str, where: str = "", expected: str = _SECTIONS, fast: bool = False) -> tuple[dict, list[str]]:
    """The file's mapping, with scalars as text, and one fault per repeated key.

    Args:
        where: how faults name the file; default: as the option --config.
        expected: what the mapping should hold, for the fault of a file that is none.
        fast: for a file that this program has written, and one of very many.

    Raises:
        ConfigError: no such file, a directory, not text, not YAML (naming the line), or not a mapping.
    """
    where = where or f"--config {show(path)}"
    try:
        with open(path, "rb") as file:
            raw = file.read(_LARGEST_FILE + 1)
    except FileNotFoundError:
        folder = os.path.dirname(path) or "."
        names = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
        stems = {os.path.splitext(name)[0]: name for name in names}  # .yaml itself would make all names alike
        near = stems.get(nearest(os.path.splitext(os.path.basename(path))[0], list(stems), cutoff=0.6))
        hint = f"; did you mean {os.path.join(os.path.dirname(path), near)}?" if near else ""
        raise ConfigError([f"{where}: no such file{hint}"]) from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise ConfigError([f"{where}: cannot be read: {getattr(error, 'strerror', None) or error}"]) from None
    if len(raw) > _LARGEST_FILE:
        raise ConfigError([f"{where}: more than {_LARGEST_FILE} bytes, which is no config file"])
    try:
        text = raw.decode("utf-8-sig")
        if fast:
            with contextlib.suppress(ConfigError):  # told below, in the other parser's words
                return _parse_yaml(where, text, expected, _FastLoader)
        return _parse_yaml(where, text, expected)
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise ConfigError([f"{where}: line {line}: not a text file (no valid UTF-8)"]) from None


def _parse_yaml(where: str, text: str, expected: str, kind: type = _Loader) -> tuple[dict, list[str]]:
    loader = None
    try:
        loader = kind(text)
        data = loader.get_single_data()
    except yaml.reader.ReaderError as error:
        line = text[: error.position].count("\n") + 1
        raise ConfigError([f"{where}: line {line}: not a text file (character {error.character!r})"]) from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        problem = " ".join((error.problem or error.context or "bad syntax").split())
        raise ConfigError([f"{where}: line {mark.line + 1 if mark else '?'}: not valid YAML: {problem}"]) from None
    except RecursionError:
        raise ConfigError([f"{where}: not valid YAML: nested too deeply"]) from None
    finally:
        if loader is not None:
            loader.dispose()
    if not isinstance(data, dict):
        found = "is empty" if data is None else f"is not a mapping (it is {show(data)})"
        raise ConfigError([f"{where}: {found}: {expected}"])
    return data, [
        f"{where}: line {line}: {show(key)} is given twice (first on line {first}); keep one"
        for key, first, line in loader.repeats
    ]


# -------------------------------------------------------------------------------------------------------- command line


# Words that name where the options come from, and what each names.
FILES = {"config": "the path of a YAML file", "resume": "the name or the folder of a run"}


def parse_words(words: Sequence[str], schema: Schema) -> tuple[dict[str, str], dict, list[str]]:
    """Parse ``--config FILE`` or ``--resume RUN``, and ``--section.key=value``; ``null`` is null, as in YAML.

    Returns:
        ({"config": FILE, "resume": RUN}, those that are given; {section: {key: text}}; faults).
    """
    files: dict[str, str] = {}
    values: dict[str, dict[str, str | None]] = {}
    faults: list[str] = []
    seen: set[str] = set()
    known = [*FILES, "help", *(".".join(path) for path in schema.entries)]
    words = list(words)
    while words:
        word = words.pop(0)
        name, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or not name:
            faults.append(f"{show(word)}: unexpected word on the command line: options are --section.key=value")
            continue
        if not equals:
            if not words or words[0].startswith("--"):
                faults.append(_no_value(name, schema) if name in known else _unknown_word(name, known))
                continue
            value = words.pop(0)
        if name in seen:
            faults.append(f"--{name}: given twice on the command line (again as {show(value)}); keep one")
        seen.add(name)
        if name in FILES:
            files[name] = value
            if not value:
                faults.append(f'--{name}: "" is not allowed: {FILES[name]}')
        elif "." in name:
            section, _, key = name.partition(".")
            values.setdefault(section, {})[key] = None if value == "null" else value
        else:
            faults.append(_unknown_word(name, known))
    if len(files) > 1:
        faults.append("--config: not allowed beside --resume, which takes the run's own config; keep one")
    return {name: value for name, value in files.items() if value}, values, faults


def as_text(value: Any) -> str:
    """A value as it is written on the command line, after ``--section.key=``."""
    if isinstance(value, list | tuple):
        return ",".join(as_text(entry) for entry in value)
    if isinstance(value, bool):
        return str(value).lower()
    return "null" if value is None else str(value)


def _no_value(name: str, schema: Schema) -> str:
    option = schema.find(name)
    if option is not None and isinstance(option.checker, Bool):
        return f"--{name}: a value is missing: write --{name}=true or --{name}=false"
    return f"--{name}: a value is missing: write --{name}=VALUE"


def _unknown_word(name: str, known: Sequence[str]) -> str:
    tails = [path for path in known if path.rpartition(".")[2] == name]
    near = tails[0] if tails else nearest(name, known)
    return f"--{name}: unknown option{f': did you mean --{near}?' if near else ''} (--help lists all options)"
