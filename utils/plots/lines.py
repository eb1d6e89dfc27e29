"""What of the groups becomes the lines of a figure: points and levels, and how many seeds each is of."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from utils.plots.runs import Group


def points(group: Group, column: str) -> pd.DataFrame:
    """One row a point of the group's line, densest first: density, mean, least, largest, seeds."""
    found = _by_level(group, column)
    return found.sort_values("density", ascending=False).reset_index(drop=True)


def _by_level(group: Group, column: str = "final_test_acc") -> pd.DataFrame:
    """The rows of `points`, by (start, level)."""
    by = group.frame.groupby(["start", "level"])
    found = by.agg(density=("density", "mean"), mean=(column, "mean"), least=(column, "min"), largest=(column, "max"))
    found["seeds"] = by["seed"].nunique()
    return found


def sparsest_shared(group: Group) -> pd.DataFrame:
    """The rows of all seeds at the lowest density that every one of them has; none if they share none."""
    found = _by_level(group)
    found = found[found["seeds"] == group.seeds]
    if found.empty:
        return group.frame.iloc[:0]
    start, level = found["density"].idxmin()
    return group.frame[(group.frame["start"] == start) & (group.frame["level"] == level)]


def dense_accuracy(groups: Sequence[Group], column: str = "final_test_acc") -> pd.Series:
    """Accuracy of the dense network by seed: the mean over groups, which are the same network trained the same way."""
    frame = pd.concat([group.frame for group in groups])
    return frame[frame["density"] == 1].groupby("seed")[column].mean()


def every_level(groups: Sequence[Group], density: float | None = None, level: int | None = None) -> bool:
    """Whether a figure of layers or curves has a line a level, of one method, rather than one a method."""
    return len(groups) == 1 and density is None and level is None


def chosen_levels(
    groups: Sequence[Group], density: float | None = None, level: int | None = None
) -> list[tuple[Group, int]]:
    """(group, level) of each line of a figure of layers or curves.

    Args:
        density: of each method only the run and the level next to it, by their ratio.
        level: of each group this one. With neither, its last one; of one group alone all.

    Raises:
        ValueError: a group has no such level.
    """
    if every_level(groups, density, level):
        return [(groups[0], n) for n in sorted(groups[0].frame["level"].unique())]
    if density is not None:
        return _next_to(groups, density)
    for group in groups:
        if level is not None and level not in set(group.frame["level"]):
            longest = group.frame.loc[group.frame["level"].idxmax()]
            raise ValueError(f"{longest['run']}: no level {level}: it has levels 0 to {longest['level']}")
    return [(group, int(group.frame["level"].max()) if level is None else level) for group in groups]


def _next_to(groups: Sequence[Group], density: float) -> list[tuple[Group, int]]:
    """One line a method: runs that are pruned once, to other densities, are groups of the same name here."""
    nearest: dict[tuple, tuple[float, Group, int]] = {}
    for group in groups:
        away = np.abs(np.log(_by_level(group)["density"] / density))
        _, level = away.idxmin()
        found = (float(away.min()), group, int(level))
        key = (group.label, group.training)
        nearest[key] = min(nearest.get(key, found), found, key=lambda line: line[0])
    return [(group, level) for _, group, level in nearest.values()]


def mean_density(group: Group, level: int) -> float:
    return float(group.frame.loc[group.frame["level"] == level, "density"].mean())


def seeds_at(group: Group, level: int) -> int:
    return int(group.frame.loc[group.frame["level"] == level, "seed"].nunique())


def fewer_seeds(groups: Sequence[Group], shown: Sequence[tuple[Group, int]] | None = None) -> str:
    """As in 'SNIP at 5, 2% (2 of 3)': points that not all seeds of their method have; "" if there are none.

    Args:
        shown: (group, level) of the points that count; None = all.
    """
    seeds: dict[tuple, set[int]] = {}
    for group in groups:  # with a run each, groups of one name are one method
        seeds.setdefault((group.label, group.training), set()).update(group.frame["seed"])
    told = []
    for group in groups:
        found = _by_level(group)
        if shown is not None:
            levels = [level for other, level in shown if other is group]
            found = found[found.index.isin(levels, level="level")]
        of = len(seeds[group.label, group.training])
        found = found[found["seeds"] < of].sort_values("density", ascending=False)
        for number, rows in found.groupby("seeds", sort=False):
            densities = ", ".join(f"{100 * density:.3g}" for density in rows["density"])
            told.append(f"{group.label} at {densities}% ({number} of {of})")
    return "; ".join(told)
