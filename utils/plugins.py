"""Plugins: Python files of the user's own that add lines to the tables of criteria, models, data sets, schedules.

``experiment_params.plugins`` names them. They are loaded before the names in a config are checked, in every process of
a run. Imports no torch; a plugin may.

A file is run once per process, and again when its content has changed. Lines of the newest content hold.
"""

import hashlib
import sys
import types
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from utils.errors import ConfigError
from utils.registry import Line, NameFault, facts_of, noted, plain

OPTION = "experiment_params.plugins"


@dataclass(frozen=True)
class Plugin:
    """A plugin that is loaded.

    Attributes:
        path: as the config names it.
        source: its content.
        lines: what it adds.
    """

    path: str
    source: bytes
    lines: tuple[Line, ...]

    @property
    def name(self) -> str:
        """Name of the file."""
        return Path(self.path).name

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.source).hexdigest()

    def record(self) -> dict[str, Any]:
        """What a run notes of it, in plain values: file, sha256, and {kind: {name: facts}} of what it adds."""
        adds: dict[str, dict[str, Any]] = {}
        for table, name, entry, _ in self.lines:
            adds.setdefault(table.kind, {})[name] = facts_of(entry)
        return {"file": self.path, "sha256": self.sha256, "adds": adds}


_by_content: dict[str, Plugin] = {}  # SHA-256 -> what this process has run
_by_path: dict[str, Plugin] = {}  # as last loaded


def load_plugins(paths: Sequence[str]) -> tuple[Plugin, ...]:
    """Run the files, unless this process has run the same content, and put their lines into the tables.

    Args:
        paths: of `OPTION`; relative ones start at the working directory.

    Raises:
        ConfigError: one fault per file that is missing, fails, or adds a name that is taken.
    """
    loaded, faults = [], []
    for path in paths:
        try:
            loaded.append(_load(path))
        except _Fault as fault:
            faults.append(f"{OPTION}: {path}: {fault}")
    faults += [f"{OPTION}: {fault}" for fault in _conflicts(loaded)]
    if faults:
        raise ConfigError(faults)
    for plugin in loaded:
        for line in plugin.lines:
            line.put()
        _by_path[plugin.path] = plugin
    return tuple(loaded)


def loaded_plugins(paths: Sequence[str]) -> list[Plugin]:
    """The plugins of these paths as last loaded: their files are not read again. Errors as `load_plugins`."""
    if any(path not in _by_path for path in paths):
        load_plugins(paths)
    return [_by_path[path] for path in paths]


class _Fault(Exception):
    """Why a file cannot be loaded."""


def _load(path: str) -> Plugin:
    try:
        source = Path(path).read_bytes()
    except FileNotFoundError:
        where = "" if Path(path).is_absolute() else f" in {Path.cwd()}, where relative paths start"
        raise _Fault(f"no such file{where}") from None
    except OSError as error:
        raise _Fault(f"cannot be read: {error.strerror}") from None
    digest = hashlib.sha256(source).hexdigest()
    if digest not in _by_content:
        _by_content[digest] = Plugin(path, source, _run(path, source, digest))
    return replace(_by_content[digest], path=path)


def _run(path: str, source: bytes, digest: str) -> tuple[Line, ...]:
    """Run a file as a module of its own; returns the lines that it adds to tables."""
    file = str(Path(path).absolute())
    module = types.ModuleType(f"plugin_{Path(path).stem}_{digest[:8]}")
    module.__file__ = file
    sys.modules[module.__name__] = module  # dataclasses, pickle and torch.compile look for it there
    try:
        with noted() as lines:
            exec(compile(source, file, "exec", dont_inherit=True), vars(module))
        return tuple(lines)
    except (Exception, SystemExit) as error:  # whatever the file does
        del sys.modules[module.__name__]
        raise _Fault(_why(error, file)) from error


def _why(error: BaseException, file: str) -> str:
    """An exception of a plugin in one line, with the last line of `file` that it came through."""
    if isinstance(error, SyntaxError) and error.filename == file:
        return f"line {error.lineno or '?'}: {error.msg}"
    numbers, trace = [], error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == file:
            numbers.append(trace.tb_lineno)
        trace = trace.tb_next
    what = str(error) if isinstance(error, NameFault) else f"{type(error).__name__}: {error}"
    return " ".join([f"line {numbers[-1]}:" if numbers else "", *what.split()]).strip().rstrip(":")


def _conflicts(loaded: Sequence[Plugin]) -> list[str]:
    """Names that two plugins add; files of one name, whose copies in a run would be one file."""
    faults, files, lines = [], dict[str, Plugin](), dict[tuple[str, str], Plugin]()
    for plugin in loaded:
        other = files.setdefault(plugin.name, plugin)
        if other is not plugin:
            faults.append(f"{other.path} and {plugin.path}: two plugins have the same file name")
            continue
        for table, name, *_ in plugin.lines:
            first = lines.setdefault((table.kind, plain(name)), plugin)
            if first is not plugin:
                faults.append(f"{first.path} and {plugin.path} both add {table.kind} {name}")
    return faults
