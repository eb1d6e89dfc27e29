"""A run read back from its directory: its config, its tables, its levels. Imports no torch."""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from harness_params import Config, make_config
from utils.config.sources import read_yaml
from utils.errors import ConfigError, DataError
from utils.runs.tables import SUMMARY, SUMMARY_COLUMNS, table_file

CONFIG_FILE = "expt_config.yaml"
# Columns that hold text, in any of the tables that are read here.
TEXT_COLUMNS = {"layer", "dataset", "model", "method", "run", "seed"}


def is_run(path: Path) -> bool:
    """Whether a folder is the directory of a run."""
    return (path / CONFIG_FILE).is_file()


def saved_config(path: Path) -> Config:
    """The config of the run in the directory `path`.

    Raises:
        DataError: it is missing or damaged.
    """
    try:
        values, faults = read_yaml(str(path / CONFIG_FILE), where=f"{path}: {CONFIG_FILE}")
        if faults:
            raise DataError(faults[0])
    except ConfigError as error:
        raise DataError(error.faults[0]) from error
    try:
        return make_config(values)
    except ConfigError as error:
        raise DataError(f"{path}: {CONFIG_FILE}: {error.faults[0]}") from error


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
