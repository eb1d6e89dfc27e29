"""A run read back from its directory: its config, its tables, its levels. Imports no torch."""

import contextlib
import fcntl
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from harness_params import Config, make_config
from utils.config.effects import NAMED
from utils.config.run_folder import CONFIG_FILE
from utils.config.sources import read_yaml
from utils.data.specs import DATASETS
from utils.errors import ConfigError, DataError
from utils.optimizers import OPTIMIZERS
from utils.pruning.methods import METHODS, NO_METHOD
from utils.registry import Table
from utils.runs.records import saved_plugins
from utils.runs.tables import SUMMARY, SUMMARY_COLUMNS, table_file
from utils.schedulers import SCHEDULES

# The tables that a config's names are checked against: {kind: table}.
TABLES: dict[str, Table] = {table.kind: table for table in (METHODS, SCHEDULES, DATASETS, OPTIMIZERS)}
# Columns that hold text, in any of the tables that are read here.
TEXT_COLUMNS = {"layer", "dataset", "model", "method", "run", "seed"}


def saved_config(path: Path, plugins: Sequence[str] = ()) -> Config:
    """The config of the run in the directory `path`.

    The run's own plugins are not loaded: names that they have added are known by what the run has noted of them, for
    tables and figures. Whoever needs the parts themselves names the files.

    Args:
        plugins: files to load, and what the config says of plugins.

    Raises:
        DataError: it is missing or damaged.
    """
    try:
        values, faults = read_yaml(str(path / CONFIG_FILE), where=f"{path}: {CONFIG_FILE}", fast=True)
        if faults:
            raise DataError(faults[0])
    except ConfigError as error:
        raise DataError(error.faults[0]) from error
    section = values.get("experiment_params")
    if isinstance(section, dict) and section.get("plugins"):
        know_parts(values, saved_plugins(path))
        values["experiment_params"] = {**section, "plugins": list(plugins)}
    try:
        return make_config(values)
    except ConfigError as error:
        raise DataError(f"{path}: {CONFIG_FILE}: {error.faults[0]}") from error


def know_parts(values: Mapping[str, Any], plugins: Sequence[Mapping[str, Any]]) -> None:
    """Makes the names known that the config of a saved run has from plugins.

    Args:
        values: {section: {key: value}} of the config.
        plugins: of `saved_plugins`; a name that they do not explain is known as a plain name.
    """
    adds: dict[str, dict[str, Any]] = {}
    for plugin in plugins:
        for kind, lines in plugin["adds"].items():
            adds.setdefault(kind, {}).update(lines)
    for path, kind in NAMED.items():
        section, key = path.split(".")
        options = values.get(section)
        name = str(options.get(key) or NO_METHOD).strip() if isinstance(options, dict) else NO_METHOD
        if kind in TABLES and name != NO_METHOD:
            TABLES[kind].stand_in(name, adds.get(kind, {}).get(name, {}))


def finished_levels(run: Path) -> list[int]:
    """The levels in a run's summary. Errors as `read_summary`."""
    return [int(level) for level in read_summary(run)["level"]]


def read_csv(path: Path, columns: Sequence[str]) -> pd.DataFrame:
    """Read a CSV that must hold `columns`; it may have more.

    Raises:
        DataError: the file is missing or unreadable, lacks a column, or holds text in a column of numbers.
    """
    try:
        frame = pd.read_csv(path)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (ValueError, OSError) as error:
        raise DataError(f"{path}: not a readable CSV: {error}") from error
    missing = [column for column in columns if column not in frame]
    if missing:
        raise DataError(f"{path}: column{'s' if len(missing) > 1 else ''} {', '.join(missing)} missing")
    for column in columns:
        if len(frame) and column not in TEXT_COLUMNS and not pd.api.types.is_numeric_dtype(frame[column]):
            raise DataError(f"{path}: column {column} does not hold numbers only")
    return frame


def read_summary(path: Path) -> pd.DataFrame:
    """summary.csv of a run, one row per finished level; no rows before the first one is finished.

    Raises:
        DataError: it is damaged, or does not hold each level once, in order.
    """
    file = table_file(path, SUMMARY)
    summary = read_csv(file, SUMMARY_COLUMNS) if file.exists() else pd.DataFrame(columns=SUMMARY_COLUMNS)
    if list(summary["level"]) != list(range(len(summary))):
        raise DataError(f"{path}: {file.name} does not hold each level once: {', '.join(map(str, summary['level']))}")
    return summary


def never_began(path: Path) -> bool:
    """Whether a run ended before its config was written: only empty folders, a lock and temporary files are there."""
    return path.is_dir() and all(
        file.is_dir() or file.name == "lock" or file.name.endswith(".part") for file in path.rglob("*")
    )


def lock_file(path: Path) -> Path:
    """The file that the process which runs there keeps locked; its text is that process's `launch_id`."""
    return path / "artifacts" / "lock"


def is_running(run: Path) -> bool:
    """Whether a process holds the lock of a run. (It is looked at for an instant only, which no start minds.)"""
    with contextlib.suppress(OSError), open(lock_file(run)) as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False
