"""Saved runs, found in folders, and where each of them stands."""

import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness_params import Config
from utils.config.run_folder import CONFIG_FILE
from utils.errors import DataError
from utils.plots.names import method_name
from utils.plots.runs import ticket_of
from utils.runs.records import noted_failure
from utils.runs.remaining import read_progress
from utils.runs.saved import is_running, never_began, saved_config

FOLDERS = {"artifacts", "checkpoints", "metrics"}  # of a run, with or without its config
STATES = ("running", "stopped", "finished", "failed", "damaged")


@dataclass(frozen=True)
class RunRow:
    """Where a run stands.

    Attributes:
        path: its directory.
        state: one of `STATES`: running = a process has it locked; finished = all levels are trained; failed = its last
            start ended with a fault; damaged = its files cannot be read; stopped = by a signal, or killed.
        levels: number of finished levels, of `planned`.
        density: of the last finished level, 0 to 1; NaN before.
        last, best: test accuracy in percent, after the last evaluated epoch and the highest one; NaN before the first.
        method: name of its method; "" if it is not known.
        seconds_left: until all levels are trained, as fast as now; NaN if that is not known.
        fault: what is damaged or has failed.
    """

    path: Path
    state: str
    levels: int = 0
    planned: int = 0
    density: float = math.nan
    last: float = math.nan
    best: float = math.nan
    method: str = ""
    seconds_left: float = math.nan
    fault: str = ""


def find_all_runs(folders: Iterable[Path]) -> Iterator[Path]:
    """Every run in the folders and below them, each once, by name. Hidden folders are left out; links are followed."""
    seen: set[str] = set()
    for top in folders:
        for folder, inside, files in os.walk(top, followlinks=True):
            place = os.path.realpath(folder)
            known, inside[:] = place in seen, sorted(name for name in inside if not name.startswith("."))
            seen.add(place)
            if known or CONFIG_FILE in files or set(inside) >= FOLDERS:
                if not known:
                    yield Path(folder)
                inside.clear()


def read_row(path: Path) -> RunRow:
    """Where the run in a directory stands. It raises nothing: what cannot be read is damaged."""
    running = is_running(path)
    if not (path / CONFIG_FILE).exists() and (running or never_began(path)):
        return RunRow(path, "running" if running else "stopped")
    try:
        cfg = saved_config(path)
        ticket = ticket_of(path) if cfg.ticket_params.source else None
        method, progress = _method(path, cfg, ticket), read_progress(path, cfg)
    except DataError as error:
        return RunRow(path, "damaged", fault=" ".join(str(error).split()))
    planned, failure = cfg.prune_params.num_levels, noted_failure(path)
    state = "finished" if progress.levels >= planned else "failed" if failure else "stopped"
    density, last, best = (
        math.nan if value is None else value for value in (progress.density, progress.accuracy, progress.best)
    )
    if running:
        state, failure = "running", ""
    failure = failure if state == "failed" else ""
    return RunRow(path, state, progress.levels, planned, density, last, best, method, progress.seconds_left, failure)


def _method(path: Path, cfg: Config, ticket: dict[str, Any] | None) -> str:
    try:
        return method_name(cfg, ticket)
    except (LookupError, TypeError, AttributeError) as error:  # of a ticket that other hands have written
        raise DataError(f"{path}: artifacts/environment.json does not say what ticket the run started from") from error
