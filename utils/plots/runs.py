"""Run directories read back from disk: config and summary."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from harness_params import Config, make_config
from utils.config.sources import read_yaml
from utils.errors import ConfigError, DataError, RunError
from utils.plots.names import effective_options, method_name
from utils.pruning.methods import initial_density
from utils.runs.records import saved_ticket
from utils.runs.tables import SUMMARY, SUMMARY_COLUMNS, table_file

# Columns that hold text, in any of the tables that are read here.
TEXT_COLUMNS = {"layer", "dataset", "model", "method", "run", "seed"}


@dataclass(frozen=True)
class SavedRun:
    """One run directory.

    Attributes:
        seed: its seed, or "seed/data_seed" where the second is one of its own.
        start: density that it starts from, left by pruning at initialization or the ticket (1 without either).
        planned: number of levels that its config asks for.
        options: {section.key: value} of what defines the experiment, without options that have no effect.
        method: name of its pruning method.
        summary: its summary.csv.
    """

    path: Path
    dataset: str
    model: str
    seed: int | str
    start: float
    planned: int
    options: dict[str, Any]
    method: str
    summary: pd.DataFrame


def find_runs(paths: Iterable[str]) -> list[Path]:
    """Run directories; each of `paths` is one, or a directory of run directories.

    Raises:
        DataError: a path does not exist, or holds no run.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        if not path.is_dir():
            raise DataError(f"{path}: {'not a directory' if path.exists() else 'no such directory'}")
        inside = sorted(p.parent for p in path.glob("*/expt_config.yaml") if not p.parent.name.startswith("."))
        runs = [path] if (path / "expt_config.yaml").exists() else inside
        if not runs:
            raise DataError(f"{path}: neither a run nor a directory of runs: no expt_config.yaml")
        found += runs
    by_place = {path.resolve(): path for path in found}
    return list(by_place.values())


def has_finished_level(path: Path) -> bool:
    """Whether a run's summary has a row below its header."""
    file = table_file(path, SUMMARY)
    return file.is_file() and file.read_bytes().count(b"\n") > 1


def read_run(path: Path, partial: bool = False) -> SavedRun:
    """Read a run directory.

    Args:
        partial: accept an unfinished run, with its finished levels.

    Raises:
        DataError: the config or summary.csv is missing or damaged.
        RunError: the run is unfinished.
    """
    cfg = _saved_config(path)
    planned = cfg.prune_params.num_levels
    file = table_file(path, SUMMARY)
    summary = read_csv(file, SUMMARY_COLUMNS) if file.exists() else pd.DataFrame(columns=SUMMARY_COLUMNS)
    if len(summary) < planned and not (partial and len(summary)):
        hint = "; use --partial to include them" if len(summary) else ""
        raise RunError(f"{path}: unfinished: {len(summary)} of {planned} levels exist{hint}")
    if list(summary["level"]) != list(range(len(summary))):
        raise DataError(f"{path}: {file.name} does not hold each level once: {', '.join(map(str, summary['level']))}")
    ticket = _ticket_of(path) if cfg.ticket_params.source else None
    start = float(summary["density"].iloc[0]) if ticket and len(summary) else initial_density(cfg.prune_params)
    return SavedRun(
        path, cfg.dataset.dataset_name, cfg.model_params.model_name, _seed_of(cfg), start, planned,
        effective_options(cfg, ticket), method_name(cfg, ticket), summary,
    )  # fmt: skip


def _seed_of(cfg: Config) -> int | str:
    e = cfg.experiment_params
    return e.seed if e.data_seed in (-1, e.seed) else f"{e.seed}/{e.data_seed}"


def _ticket_of(path: Path) -> dict[str, Any]:
    """What a run says of its ticket.

    Raises:
        DataError: it says nothing, or not enough.
    """
    ticket = saved_ticket(path)
    if not ticket or not {"level", "step", "mask", "weights"} <= ticket.keys():
        raise DataError(f"{path}: artifacts/environment.json does not say what ticket the run started from")
    return ticket


def _saved_config(path: Path) -> Config:
    try:
        values, faults = read_yaml(str(path / "expt_config.yaml"), where=f"{path}: expt_config.yaml")
        if faults:
            raise DataError(faults[0])
    except ConfigError as error:
        raise DataError(error.faults[0]) from error
    try:
        return make_config(values)
    except ConfigError as error:
        raise DataError(f"{path}: expt_config.yaml: {error.faults[0]}") from error


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
