"""Reading options from a YAML file and from the command line, both as text and without guessing types.

The option's checker (utils/config/checkers.py) knows the type: ``5e-4`` is a number for a rate, ``on`` is a word for a
name, from either source.
"""

import os
from collections.abc import Sequence

import yaml

from utils.config.checkers import Bool, nearest
from utils.config.options import Schema, show
from utils.errors import ConfigError

_LARGEST_FILE = 1 << 20  # bytes; a config is a page of text
_SECTIONS = "sections such as `optimizer:` with options below them are expected"


# ---------------------------------------------------------------------------------------------------------------- YAML


class _Loader(yaml.SafeLoader):
    """YAML's safe_load, except that all plain words but null stay text, and tags are refused.

    YAML 1.1 would guess wrongly: ``compile: on`` is True, ``seed: 010`` is 8, ``expt_name: 2024-01-01`` is a date,
    ``1:30`` is 90, and ``5e-4`` is no number.

    Attributes:
        repeats: (key, line of its first use, line of the repeat) of each key given twice.
    """

    def __init__(self, stream: str):
        super().__init__(stream)
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
        super().flatten_mapping(node)


_NULL = "tag:yaml.org,2002:null"
_MERGE = "tag:yaml.org,2002:merge"
_KEPT = {_NULL, *(f"tag:yaml.org,2002:{kind}" for kind in ("str", "seq", "map")), None}  # None: refuses all other tags
_Loader.yaml_constructors = {tag: make for tag, make in yaml.SafeLoader.yaml_constructors.items() if tag in _KEPT}
_Loader.yaml_implicit_resolvers = {
    first: kept
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    if (kept := [(tag, pattern) for tag, pattern in pairs if tag in (_NULL, _MERGE)])
}


def read_yaml(path: str, where: str = "", expected: str = _SECTIONS) -> tuple[dict, list[str]]:
    """The file's mapping, with scalars as text, and one fault per repeated key.

    Args:
        where: how faults name the file; default: as the option --config.
        expected: what the mapping should hold, for the fault of a file that is none.

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
        return _parse_yaml(where, raw.decode("utf-8-sig"), expected)
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise ConfigError([f"{where}: line {line}: not a text file (no valid UTF-8)"]) from None


def _parse_yaml(where: str, text: str, expected: str) -> tuple[dict, list[str]]:
    loader = None
    try:
        loader = _Loader(text)
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


def parse_words(words: Sequence[str], schema: Schema) -> tuple[str | None, dict, list[str]]:
    """Parse ``--config FILE --section.key=value``; ``null`` is null, as in YAML.

    Returns:
        (FILE or None, {section: {key: text}}, faults).
    """
    config: str | None = None
    values: dict[str, dict[str, str | None]] = {}
    faults: list[str] = []
    seen: set[str] = set()
    known = ["config", "help", *(".".join(path) for path in schema.entries)]
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
        if name == "config":
            config = value
            if not value:
                faults.append('--config: "" is not allowed: the path of a YAML file')
        elif "." in name:
            section, _, key = name.partition(".")
            values.setdefault(section, {})[key] = None if value == "null" else value
        else:
            faults.append(_unknown_word(name, known))
    return config, values, faults


def _no_value(name: str, schema: Schema) -> str:
    option = schema.find(name)
    if option is not None and isinstance(option.checker, Bool):
        return f"--{name}: a value is missing: write --{name}=true or --{name}=false"
    return f"--{name}: a value is missing: write --{name}=VALUE"


def _unknown_word(name: str, known: Sequence[str]) -> str:
    tails = [path for path in known if path.rpartition(".")[2] == name]
    near = tails[0] if tails else nearest(name, known)
    return f"--{name}: unknown option{f': did you mean --{near}?' if near else ''} (--help lists all options)"
