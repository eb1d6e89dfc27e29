"""Finished runs read back from disk and put into groups: runs of one group differ in their seed only.

A group is a line of a figure. Its name says what sets it apart from the other groups of the same figure.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from harness_params import ConfigError, load_config
from utils.plots.names import (
    AXIS,
    METHOD,
    REWINDING,
    differing,
    effective_options,
    method_name,
    short_paths,
    starting_density,
    word,
)
from utils.pruning.methods import METHODS

SUMMARY = ["level", "density", "sparsity", "final_test_acc", "max_test_acc", "final_test_loss", "epochs", "seconds"]
TIDY = ["dataset", "model", "method", "training", "run", "seed", "start", *SUMMARY]


@dataclass(frozen=True)
class Run:
    """One run directory.

    Attributes:
        start: density left by pruning at initialization (1 without it).
        planned: levels that its config asks for.
        options: what the experiment is, {section.key: value}, without what has no effect.
        method: the method's name.
        summary: its summary.csv.
    """

    path: Path
    dataset: str
    model: str
    seed: int
    start: float
    planned: int
    options: dict[str, Any]
    method: str
    summary: pd.DataFrame


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seed, and in the density they start from, only.

    Attributes:
        label: its name in a legend.
        frame: all rows of the runs' summaries, with columns ``run`` (its path), ``seed`` and ``start`` added.
        runs: the directories; empty when read from a table.
        dataset, model: names.
        training: options that are not about pruning, in a table a number for them; groups with equal ones share their
            dense network.
    """

    label: str
    frame: pd.DataFrame
    runs: tuple[Run, ...]
    dataset: str
    model: str
    training: tuple

    @property
    def seeds(self) -> int:
        return self.frame["seed"].nunique()

    @property
    def one_shot(self) -> bool:
        """Whether each point is a run of its own, pruned once, at initialization."""
        further = any(run.planned > 1 for run in self.runs)  # of a table the levels alone tell
        return bool(not further and (self.frame["level"] == 0).all() and (self.frame["start"] < 1).any())


def find_runs(paths: Iterable[str]) -> list[Path]:
    """Run directories: each of `paths` is one, or a directory of some.

    Raises:
        ValueError: a path does not exist, or no run is there.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        if not path.is_dir():
            raise ValueError(f"{path}: {'is no directory' if path.exists() else 'no such directory'}")
        inside = sorted(p.parent for p in path.glob("*/expt_config.yaml") if not p.parent.name.startswith("."))
        runs = [path] if (path / "expt_config.yaml").exists() else inside
        if not runs:
            raise ValueError(f"{path}: neither a run nor a directory of runs: no expt_config.yaml")
        found += runs
    by_place = {path.resolve(): path for path in found}
    return list(by_place.values())


def read_run(path: Path, partial: bool = False) -> Run:
    """Reads a run directory.

    Args:
        partial: take an unfinished run's finished levels.

    Raises:
        ValueError: the config or summary.csv is missing or no such file; the run is unfinished.
    """
    try:
        cfg = load_config(["--config", str(path / "expt_config.yaml")])
    except ConfigError as error:
        raise ValueError(f"{path}: {error.faults[0].removeprefix('--config ')}") from error
    planned = cfg.prune_params.num_levels
    summary = read_csv(path / "metrics" / "summary.csv", SUMMARY, missing_ok=True)
    if len(summary) < planned and not (partial and len(summary)):
        hint = "; --partial takes them" if len(summary) else ""
        raise ValueError(f"{path}: unfinished: {len(summary)} of {planned} levels are there{hint}")
    if list(summary["level"]) != list(range(len(summary))):
        raise ValueError(f"{path}: summary.csv does not hold each level once: {', '.join(map(str, summary['level']))}")
    return Run(
        path, cfg.dataset.dataset_name, cfg.model_params.model_name, cfg.experiment_params.seed, starting_density(cfg),
        planned, effective_options(cfg), method_name(cfg), summary,
    )  # fmt: skip


def read_csv(path: Path, columns: Sequence[str], missing_ok: bool = False) -> pd.DataFrame:
    """A CSV that must hold `columns`.

    Raises:
        ValueError: naming the file.
    """
    try:
        frame = pd.read_csv(path)
    except FileNotFoundError:
        if missing_ok:
            return pd.DataFrame(columns=list(columns))
        raise ValueError(f"{path}: no such file") from None
    except (ValueError, OSError) as error:
        raise ValueError(f"{path}: no readable CSV: {' '.join(str(error).split())}") from None
    lacking = [column for column in columns if column not in frame]
    if lacking:
        raise ValueError(f"{path}: column{'s' if len(lacking) > 1 else ''} {', '.join(lacking)} missing")
    return frame


def group_runs(runs: Sequence[Run], by_start: bool = False) -> list[Group]:
    """Groups in a fixed order of methods, then as given.

    Args:
        by_start: runs pruned once, to different densities, are different groups, not points of one line; figures
            that ask for it write each group's density beside its name.

    Raises:
        ValueError: the runs are of different data sets; two runs are the same experiment with the same seed.
    """
    _check_datasets([(run.dataset, str(run.path)) for run in runs])
    members: dict[tuple, list[Run]] = {}
    for run in runs:
        left_out = {AXIS} if run.planned == 1 and not by_start else set()
        members.setdefault(_key(run.options, left_out), []).append(run)
    options = [dict(key) for key in members]
    told = differing(options) - METHOD - {AXIS}
    further = [chosen for chosen, mine in zip(options, members.values()) if mine[0].planned > 1]
    starts = differing(further) & {AXIS}
    short = short_paths(options)
    methods = {run.method for run in runs}
    groups = []
    for chosen, mine in zip(options, members.values()):
        _check_repeats(mine)
        telling = sorted(told | starts if mine[0].planned > 1 else told)
        words = [word(path, short.get(chosen[path], chosen[path])) for path in telling if path in chosen]
        name = [mine[0].method] if len(methods) > 1 or not words else []
        frame = pd.concat([run.summary.assign(run=str(run.path), seed=run.seed, start=run.start) for run in mine])
        training = {path: value for path, value in chosen.items() if not path.startswith("prune_params.")}
        training.pop("experiment_params.training_type", None)
        groups.append(
            Group(", ".join([*name, *words]), frame.reset_index(drop=True), tuple(mine), mine[0].dataset,
                  mine[0].model, _key(training))
        )  # fmt: skip
    names = [*REWINDING.values(), *(method.title for method in METHODS.values())]
    rank = {name: place for place, name in enumerate(names)}
    return sorted(groups, key=lambda group: rank.get(group.runs[0].method, len(rank)))


def _key(options: dict[str, Any], left_out: Iterable[str] = ()) -> tuple:
    return tuple(sorted((path, value) for path, value in options.items() if path not in left_out))


def _check_datasets(found: Sequence[tuple[str, str]]) -> None:
    first: dict[str, str] = {}
    for dataset, where in found:
        first.setdefault(dataset, where)
    if len(first) > 1:
        told = ", ".join(f"{dataset} ({where})" for dataset, where in first.items())
        raise ValueError(f"runs of different data sets don't go into one figure: {told}")


def _check_repeats(runs: Sequence[Run]) -> None:
    seen: dict[tuple, Run] = {}
    for run in runs:
        other = seen.setdefault((run.seed, run.start), run)
        if other is not run:
            raise ValueError(f"{other.path} and {run.path} are the same experiment with the same seed {run.seed}")


def tidy(groups: Sequence[Group]) -> pd.DataFrame:
    """All levels of all runs in one table, columns `TIDY`."""
    trainings = list(dict.fromkeys(g.training for g in groups))
    parts = [
        g.frame.assign(dataset=g.dataset, model=g.model, method=g.label, training=trainings.index(g.training))
        for g in groups
    ]
    return pd.concat(parts)[TIDY].reset_index(drop=True)


def read_tidy(path: Path) -> list[Group]:
    """Groups from a table that `tidy` made.

    Raises:
        ValueError: it is none, or holds several data sets.
    """
    frame = read_csv(path, TIDY)
    _check_datasets([(name, str(path)) for name in frame["dataset"].unique()])
    return [
        Group(label, part.reset_index(drop=True), (), part["dataset"].iloc[0], part["model"].iloc[0], (training,))
        for (label, training), part in frame.groupby(["method", "training"], sort=False)
    ]
