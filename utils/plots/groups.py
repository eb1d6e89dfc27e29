"""Groups of runs that differ only in their seed. A group is one line of a figure.

The label of a group says how it differs from the other groups of the same figure.
"""

from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import pandas as pd

from utils.errors import DataError
from utils.plots.colours import Style, method_styles
from utils.plots.names import AXES, METHOD, OF_SOURCE, REWINDING, differing, short_paths, word
from utils.plots.runs import SavedRun
from utils.pruning.methods import METHODS
from utils.runs.records import settled_options
from utils.runs.saved import read_csv
from utils.runs.tables import FURTHER_COLUMNS, SUMMARY_COLUMNS

TIDY_COLUMNS = ["dataset", "model", "method", "training", "run", "seed", "start", *SUMMARY_COLUMNS]

LONG_LABEL = 50  # characters; in longer ones, what most groups have in common is left out
USUAL = "as most others"
PRUNING = "pruning"  # one more column of a table: the method's name, which colours go by

TRAINING_TYPE = "experiment_params.training_type"  # how to rewind: about pruning, though its section is not
ABOUT_PRUNING = ("prune_params.", "ticket_params.", OF_SOURCE)

Key = tuple[Hashable, ...]


@dataclass(frozen=True)
class Group:
    """Runs that differ only in their seed and in the density that they start from.

    Attributes:
        label: name in a legend.
        method: name of the pruning method, which colours go by.
        frame: all rows of the runs' summaries, with added columns ``run`` (its path), ``seed`` and ``start``.
        runs: the run directories; empty if read from a table.
        dataset, model: names.
        training: the options that are not about pruning, or their number in a table. Groups with equal values share
            their dense network.
    """

    label: str
    method: str
    frame: pd.DataFrame
    runs: tuple[SavedRun, ...]
    dataset: str
    model: str
    training: Key

    @property
    def seeds(self) -> int:
        return self.frame["seed"].nunique()

    @property
    def one_shot(self) -> bool:
        """True if each point is a run of its own, pruned once, at initialization, or a ticket."""
        pruned_later = any(run.planned > 1 for run in self.runs)  # a table has no runs: its levels decide
        return bool(not pruned_later and (self.frame["level"] == 0).all() and (self.frame["start"] < 1).any())

    @property
    def shows_dense(self) -> bool:
        """True if its runs at density 1 are the dense network of its recipe: not those that start from a ticket."""
        return not (self.one_shot or any("ticket_params.source" in run.options for run in self.runs))


def group_runs(runs: Sequence[SavedRun], by_start: bool = False) -> list[Group]:
    """Group runs: in a fixed order of methods, then in the given order.

    Args:
        by_start: put runs that are pruned once, to different densities, into different groups instead of making them
            points of one line. Figures that ask for this write the density beside each label.

    Raises:
        DataError: the runs are of different data sets; two runs are the same experiment with the same seed.
    """
    _check_datasets([(run.dataset, str(run.path)) for run in runs])
    members = [_told_apart(group) for group in _members(settled(runs), by_start)]
    groups = [
        Group(
            label,
            group[0].method,
            _frame(group),
            tuple(group),
            group[0].dataset,
            group[0].model,
            _training(group[0].options),
        )
        for label, group in zip(_labels(members), members)
    ]
    names = [*REWINDING.values(), *(method.title for method in METHODS.values())]
    rank = {name: place for place, name in enumerate(names)}
    return sorted(groups, key=lambda group: rank.get(group.method, len(rank)))


def settled(runs: Sequence[SavedRun]) -> Sequence[SavedRun]:
    """The runs by what "auto" came to, which differs between machines, if all have noted it: older code did not."""
    noted = [settled_options(run.path) for run in runs]
    if not all(noted):
        return runs
    return [
        replace(run, options=run.options | {key: value for key, value in found.items() if key in run.options})
        for run, found in zip(runs, noted)
    ]


def group_styles(groups: Sequence[Group]) -> list[Style]:
    """Style of each group's line: by its method and recipe, the same in all figures."""
    return method_styles([(group.method, _recipe(group)) for group in groups])


def _recipe(group: Group) -> str:
    """What tells groups of one method apart: the label, and the density that runs of one level start from."""
    start = group.frame["start"].min() if group.frame["start"].nunique() == 1 and group.one_shot else 1.0
    return f"{group.label} {start:g}"


def labels_of(runs: Sequence[SavedRun]) -> list[str]:
    """The label of each run's group. Copies of a run, and runs of several data sets, are allowed here."""
    runs = settled(runs)
    members = _members(runs)
    return [
        next(label for label, group in zip(_labels(members), members) if any(run is member for member in group))
        for run in runs
    ]


def _members(runs: Sequence[SavedRun], by_start: bool = False) -> list[list[SavedRun]]:
    """The runs of each group, as `group_runs` wants them."""
    members: dict[Key, list[SavedRun]] = {}
    for run in runs:
        left_out = AXES if run.planned == 1 and not by_start else set()
        members.setdefault(_key(run.options, left_out), []).append(run)
    return list(members.values())


def _labels(members: Sequence[Sequence[SavedRun]]) -> list[str]:
    """Label of each group: its method if methods differ, and the options in which the groups differ."""
    one_shot = [group[0].planned == 1 for group in members]
    options = [group[0].options for group in members]  # alike in a group, but for AXES
    shared = differing(options) - METHOD - AXES
    starts = differing([chosen for chosen, once in zip(options, one_shot) if not once]) & AXES
    short = short_paths(options)
    several_methods = len({run.method for group in members for run in group}) > 1
    words = [
        [word(path, short.get(chosen[path], chosen[path])) for path in sorted(shared if once else shared | starts)
         if path in chosen]
        for chosen, once in zip(options, one_shot)
    ]  # fmt: skip
    names = [group[0].method if several_methods or not own else "" for group, own in zip(members, words)]
    labels = [", ".join(filter(None, [name, *own])) for name, own in zip(names, words)]
    if max(map(len, labels)) <= LONG_LABEL:
        return labels
    usual = {one for one, number in Counter(chain(*words)).items() if number > len(words) / 2}
    rest = [[one for one in own if one not in usual] for own in words]
    shorter = [", ".join(filter(None, [name, *own])) or USUAL for name, own in zip(names, rest)]
    # Groups of one label were apart by something that no label tells, such as a start.
    return shorter if len(set(shorter)) == len(set(labels)) else labels


def _frame(runs: Sequence[SavedRun]) -> pd.DataFrame:
    frame = pd.concat([run.summary.assign(run=str(run.path), seed=run.seed, start=run.start) for run in runs])
    return frame.reset_index(drop=True)


def _training(options: dict[str, Any]) -> Key:
    """The options that are not about pruning: what the dense network depends on."""
    return _key(options, {path for path in options if is_about_pruning(path)})


def is_about_pruning(path: str) -> bool:
    """Whether the dense network does not depend on an option."""
    return path == TRAINING_TYPE or path.startswith(ABOUT_PRUNING)


def _key(options: dict[str, Any], left_out: Iterable[str] = ()) -> Key:
    return tuple(sorted((path, value) for path, value in options.items() if path not in left_out))


def _check_datasets(found: Sequence[tuple[str, str]]) -> None:
    first: dict[str, str] = {}
    for dataset, where in found:
        first.setdefault(dataset, where)
    if len(first) > 1:
        names = ", ".join(f"{dataset} ({where})" for dataset, where in first.items())
        raise DataError(f"runs of different data sets do not belong in one figure: {names}")


def _told_apart(runs: list[SavedRun]) -> list[SavedRun]:
    """The runs of a group, each with a seed of its own: that of its ticket's source is added where runs share theirs.

    Raises:
        DataError: two runs have the same seeds.
    """
    if len({(run.seed, run.start) for run in runs}) < len(runs):
        runs = [
            run if run.source_seed is None else replace(run, seed=f"{run.seed} of {run.source_seed}") for run in runs
        ]
    seen: dict[tuple[int | str, float], SavedRun] = {}
    for run in runs:
        other = seen.setdefault((run.seed, run.start), run)
        if other is not run:
            raise DataError(f"{other.path} and {run.path} are the same experiment with the same seed {run.seed}")
    return runs


def tidy(groups: Sequence[Group]) -> pd.DataFrame:
    """All levels of all runs in one table with `TIDY_COLUMNS`, `FURTHER_COLUMNS` that a run has, and `PRUNING`."""
    trainings = list(dict.fromkeys(group.training for group in groups))
    parts = [
        group.frame.assign(
            dataset=group.dataset,
            model=group.model,
            method=group.label,
            training=trainings.index(group.training),
            **{PRUNING: group.method},
        )
        for group in groups
    ]
    frame = pd.concat(parts)
    more = [column for column in FURTHER_COLUMNS if column in frame]
    return frame[[*TIDY_COLUMNS, *more, PRUNING]].reset_index(drop=True)


def read_tidy(path: Path) -> list[Group]:
    """Groups from a table that `tidy` made.

    Raises:
        DataError: it is not such a table, is empty, or holds several data sets.
    """
    frame = read_csv(path, TIDY_COLUMNS)
    if frame.empty:
        raise DataError(f"{path}: no rows")
    _check_datasets([(name, str(path)) for name in frame["dataset"].unique()])
    groups = []
    for _, part in frame.groupby(["method", "training"], sort=False):
        first = part.iloc[0]
        rows = part.reset_index(drop=True)
        label = str(first["method"])
        method = str(first.get(PRUNING, label))  # tables of older code do not name it
        groups.append(Group(label, method, rows, (), first["dataset"], first["model"], (first["training"],)))
    return groups
