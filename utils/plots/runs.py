"""Run directories read back from disk: config and summary."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from harness_params import Config
from utils.config.run_folder import is_run, runs_in
from utils.errors import DataError, RunError
from utils.plots.names import effective_options, method_name, source_seed
from utils.pruning.methods import initial_density
from utils.runs.records import saved_plugins, saved_ticket
from utils.runs.saved import read_summary, saved_config


@dataclass(frozen=True)
class SavedRun:
    """One run directory.

    Attributes:
        cfg: its config.
        seed: its seed, or "seed/data_seed" where the second is one of its own.
        start: density that it starts from, left by pruning at initialization or the ticket (1 without either).
        planned: number of levels that its config asks for.
        options: {section.key: value} of what defines the experiment, without options that have no effect.
        method: name of its pruning method.
        summary: its summary.csv.
        source_seed: seed of the run that its ticket is from; None without one.
    """

    path: Path
    cfg: Config
    dataset: str
    model: str
    seed: int | str
    start: float
    planned: int
    options: dict[str, Any]
    method: str
    summary: pd.DataFrame
    source_seed: int | str | None = None


def find_runs(paths: Iterable[str]) -> list[Path]:
    """Run directories; each of `paths` is one, or a directory of run directories.

    Raises:
        DataError: a path does not exist, or holds no run.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        if not path.is_dir():
            raise DataError(f"{path}: {'not a directory' if path.exists() else 'no such directory'}")
        runs = [path] if is_run(path) else runs_in(path)
        if not runs:
            raise DataError(f"{path}: neither a run nor a directory of runs: no expt_config.yaml")
        found += runs
    by_place = {path.resolve(): path for path in found}
    return list(by_place.values())


def read_runs(
    paths: Sequence[Path], partial: bool = False, one_dataset: bool = True
) -> tuple[list[SavedRun], list[str]]:
    """The runs that can be drawn, and a note on each other one.

    Left out are runs that are damaged or unfinished, and those of another data set than most runs; all data sets stay
    where two of them have most runs.

    Args:
        partial: as of `read_run`.
        one_dataset: False = runs of all data sets stay.

    Raises:
        DataError, RunError: that of the first run, if none can be drawn.
    """
    runs, faults = [], list[DataError | RunError]()
    for path in paths:
        try:
            runs.append(read_run(path, partial))
        except (DataError, RunError) as error:
            faults.append(error)
    if not runs:
        raise faults[0]
    (dataset, most), *others = Counter(run.dataset for run in runs).most_common()
    fit = [run for run in runs if run.dataset == dataset]
    if not one_dataset or (others and others[0][1] == most):
        return runs, [f"left out: {fault}" for fault in faults]  # `group_runs` refuses them
    notes = [f"{run.path}: its data set is {run.dataset}, not {dataset}" for run in runs if run.dataset != dataset]
    return fit, [f"left out: {fault}" for fault in [*faults, *notes]]


def read_run(path: Path, partial: bool = False) -> SavedRun:
    """Read a run directory.

    Args:
        partial: accept an unfinished run, with its finished levels.

    Raises:
        DataError: the config or summary.csv is missing or damaged.
        RunError: the run is unfinished.
    """
    cfg, summary = saved_config(path), read_summary(path)
    planned = cfg.prune_params.num_levels
    if len(summary) < planned and not (partial and len(summary)):
        hint = "; use --partial to include them" if len(summary) else ""
        raise RunError(f"{path}: unfinished: {len(summary)} of {planned} levels exist{hint}")
    ticket = ticket_of(path) if cfg.ticket_params.source else None
    start = float(summary["density"].iloc[0]) if ticket and len(summary) else initial_density(cfg.prune_params)
    options = effective_options(cfg, ticket, saved_plugins(path))
    return SavedRun(
        path, cfg, cfg.dataset.dataset_name, cfg.model_params.model_name, _seed_of(cfg), start, planned,
        options, method_name(cfg, ticket), summary, source_seed(ticket) if ticket else None,
    )  # fmt: skip


def _seed_of(cfg: Config) -> int | str:
    e = cfg.experiment_params
    return e.seed if e.data_seed in (-1, e.seed) else f"{e.seed}/{e.data_seed}"


def ticket_of(path: Path) -> dict[str, Any]:
    """What a run says of its ticket.

    Raises:
        DataError: it says nothing, or not enough.
    """
    ticket = saved_ticket(path)
    if not ticket or not {"level", "step", "mask", "weights"} <= ticket.keys():
        raise DataError(f"{path}: artifacts/environment.json does not say what ticket the run started from")
    return ticket
