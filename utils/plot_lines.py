"""What of the groups becomes the lines of a figure: points and levels, and how many seeds each is of."""

from collections.abc import Sequence

import pandas as pd

from utils.plot_data import Group


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


def fewer_seeds(groups: Sequence[Group]) -> str:
    """As in 'SNIP at 5, 2% (2 of 3)': points that not all seeds of their group have; "" if there are none."""
    told = []
    for group in groups:
        found = points(group, "final_test_acc")
        found = found[found["seeds"] < group.seeds]
        for seeds, rows in found.groupby("seeds", sort=False):
            densities = ", ".join(f"{100 * density:.3g}" for density in rows["density"])
            told.append(f"{group.label} at {densities}% ({seeds} of {group.seeds})")
    return "; ".join(told)
