"""A run read back from its directory: its config, its tables, its levels. Imports no torch."""

import contextlib
import fcntl
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from harness_params import Config, make_config
from utils.config.run_folder import CONFIG_FILE
from utils.config.sources import read_yaml
from utils.errors import ConfigError, DataError
from utils.runs.tables import SUMMARY, SUMMARY_COLUMNS, table_file

# Columns that hold text, in any of the tables that are read here.
TEXT_COLUMNS = {"layer", "dataset", "model", "method", "run", "seed"}


def saved_config(path: Path) -> Config:
    """The config of the run in the directory `path`.

    Raises:
        DataError: it is missing or damaged.
    """
    try:
        values, faults = read_yaml(str(path / CONFIG_FILE), where=f"{path}: {CONFIG_FILE}", fast=True)
        if faults:
            raise DataError(faults[0])
    except ConfigError as error:
        raise DataError(error.faults[0]) from error
    try:
        return make_config(values)
    except ConfigError as error:
        raise DataError(f"{path}: {CONFIG_FILE}: {error.faults[0]}") from error


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
