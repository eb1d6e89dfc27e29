"""The runs of a report: those that can be read, and the densities at which their methods are compared."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from utils.errors import DataError
from utils.plots.groups import Group, group_runs, settled
from utils.plots.lines import METRICS, check_metric, epoch_frame, fewer_seeds, layer_frame
from utils.plots.runs import SavedRun, find_runs, read_runs

DENSITIES = 3  # how many densities a report chooses by itself
SAME_DENSITY = 1.01  # ratio
DEEP = 12  # methods that get figures of all their levels


@dataclass(frozen=True)
class Study:
    """What a report is about.

    Attributes:
        runs: in the given order.
        names: {path of a run: its name in tables}.
        methods: the lines of accuracy against density.
        networks: as `methods`, but runs that are pruned once, to different densities, are groups of their own.
        deep: those of `networks` that have several levels, at most `DEEP`.
        densities: fractions at which methods are compared, largest first.
        column, epoch: of the summary, the accuracy that is shown, and the epoch of a level that it is of.
        notes: what the reader should know: runs that are left out, and why; points with fewer seeds.
    """

    runs: list[SavedRun]
    names: dict[Path, str]
    methods: list[Group]
    networks: list[Group]
    deep: list[Group]
    densities: list[float]
    column: str
    epoch: str
    notes: list[str]

    @property
    def subject(self) -> str:
        """Data set and models, as in 'CIFAR10: resnet20, vgg16'."""
        models = dict.fromkeys(group.model for group in self.methods)
        return f"{self.methods[0].dataset}: {', '.join(models)}"


def read_study(paths: Sequence[str], densities: Sequence[float] | None = None, metric: str = "final") -> Study:
    """The study that the command line names.

    Args:
        paths: run directories, and directories of run directories.
        densities: fractions; None = chosen by `compared_densities`.
        metric: of `METRICS`.

    Raises:
        DataError: there is no run, none can be read, or the runs do not belong together.
        RunError: no run has a finished level.
    """
    runs, notes = _readable(find_runs(paths), metric)
    methods = group_runs(runs)
    column, epoch = METRICS[metric]
    fewer = fewer_seeds(methods)
    notes += [f"points with fewer seeds than others of their method: {fewer}"] if fewer else []
    networks = group_runs(runs, by_start=True)
    deep = [group for group in networks if group.frame["level"].max() > 0]
    notes += [f"figures of every level: of the first {DEEP} of {len(deep)} methods"] if len(deep) > DEEP else []
    chosen = sorted(densities, reverse=True) if densities else compared_densities(methods)
    return Study(runs, _names(runs), methods, networks, deep[:DEEP], chosen, column, epoch, notes)


def _readable(paths: Sequence[Path], metric: str) -> tuple[list[SavedRun], list[str]]:
    """The runs of which all tables can be read, and a note for each other one and for each unfinished one."""
    found, notes = read_runs(paths, partial=True)
    whole: list[SavedRun] = []
    for run in found:
        try:
            _check_tables(run, metric)
        except DataError as error:
            notes.append(f"left out: {error}")
        else:
            whole.append(run)
    if not whole:
        raise DataError(notes[-1].removeprefix("left out: "))
    runs, seen = [], dict[tuple, Path]()
    for run in settled(whole):
        key = (run.seed, run.source_seed, tuple(sorted(run.options.items())))
        if seen.setdefault(key, run.path) != run.path:
            notes.append(f"left out: {run.path} is the same experiment with the same seed as {seen[key]}")
            continue
        runs.append(run)
        if len(run.summary) < run.planned:
            notes.append(f"{run.path} is unfinished: {len(run.summary)} of {run.planned} levels")
    return runs, notes


def _check_tables(run: SavedRun, metric: str) -> None:
    """Raise DataError if the densities of layers, the epochs of a level or an accuracy are missing or damaged."""
    alone = group_runs([run])
    check_metric(alone, metric)
    if not run.summary["density"].between(0, 1, inclusive="right").all():
        raise DataError(f"{run.path}: a density is not above 0 and at most 1")
    layer_frame(alone[0])
    for level in run.summary["level"]:
        epoch_frame(alone[0], int(level))


def _names(runs: Sequence[SavedRun]) -> dict[Path, str]:
    """Paths of the runs from the folder that all of them share."""
    places = {run.path: run.path.resolve() for run in runs}
    folder = os.path.commonpath([place.parent for place in places.values()])
    return {path: os.path.relpath(place, folder) for path, place in places.items()}


def compared_densities(methods: Sequence[Group]) -> list[float]:
    """Up to `DENSITIES` densities at which most methods have a point, evenly spread, largest first.

    Densities of the same level of two methods differ by the rounding to whole weights: they are the same up to
    `SAME_DENSITY`. 1 alone if nothing is pruned.
    """
    found = [np.unique(group.frame["density"]) for group in methods]
    have: dict[float, int] = {}
    for density in sorted(np.unique(np.concatenate(found)), reverse=True):
        if density < min(have, default=1) / SAME_DENSITY:
            have[float(density)] = sum(bool((abs(np.log(own / density)) < np.log(SAME_DENSITY)).any()) for own in found)
    shared = [density for density, number in have.items() if number == max(have.values())] or [1.0]
    numbers = [max(1, round(len(shared) * part / DENSITIES)) for part in range(1, DENSITIES + 1)]
    return [shared[number - 1] for number in dict.fromkeys(numbers)]
