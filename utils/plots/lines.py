"""From groups to the lines of a figure: points, levels, layers, epochs, and the number of seeds behind each."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from utils.errors import ConfigError, DataError
from utils.plots.groups import Group, Key
from utils.plots.runs import SavedRun
from utils.runs.saved import read_csv
from utils.runs.tables import EPOCH_COLUMNS, LAYER_COLUMNS, LAYERS, SUMMARY, epoch_table, table_file
from utils.wording import percent_text

# Name: (column of the summary, epoch of a level at which it is).
METRICS = {
    "final": ("final_test_acc", "last epoch"),
    "max": ("max_test_acc", "best test epoch"),
    "best_val": ("best_val_test_acc", "best validation epoch"),
}

# --- accuracy against density ----------------------------------------------------------------------------------------


def points(group: Group, column: str) -> pd.DataFrame:
    """One row per point of the group's line, densest first: density, mean, least, largest, seeds."""
    found = _by_level(group, column).sort_values("density", ascending=False)
    return found[["density", "mean", "least", "largest", "seeds"]].reset_index(drop=True)


def check_metric(groups: Sequence[Group], metric: str) -> None:
    """Checks that every level has the figure.

    Raises:
        DataError: a run has no validation images, or its CSV is damaged.
    """
    column, _ = METRICS[metric]
    for group in groups:
        for run, rows in group.frame.groupby("run", sort=False):
            if column not in rows or rows[column].isna().all():
                raise DataError(f"{run}: no {column}: --metric {metric} needs runs with dataset.validation_images")
            if not pd.api.types.is_numeric_dtype(rows[column]) or rows[column].isna().any():
                raise DataError(f"{run}: column {column} does not hold numbers only")


def _by_level(group: Group, column: str = "final_test_acc") -> pd.DataFrame:
    """The rows of `points`, in order of their columns start and level."""
    by = group.frame.groupby(["start", "level"])
    found = by.agg(density=("density", "mean"), mean=(column, "mean"), least=(column, "min"), largest=(column, "max"))
    found["seeds"] = by["seed"].nunique()
    return found.reset_index()


def sparsest_shared(group: Group) -> pd.DataFrame:
    """The rows of all seeds at the lowest density that every seed has; no rows if there is none."""
    found = _by_level(group)
    found = found[found["seeds"] == group.seeds]
    if found.empty:
        return group.frame.iloc[:0]
    sparsest = found.iloc[int(found["density"].argmin())]
    return group.frame[(group.frame["start"] == sparsest["start"]) & (group.frame["level"] == sparsest["level"])]


def dense_accuracy(groups: Sequence[Group], column: str = "final_test_acc") -> pd.Series:
    """Accuracy of the dense network per seed: the mean over groups, which train the same network in the same way.

    Tickets that are dense count only if nothing else is there.
    """
    groups = [group for group in groups if group.shows_dense] or groups
    frame = pd.concat([group.frame for group in groups])
    return frame[frame["density"] == 1].groupby("seed")[column].mean()


# --- levels ----------------------------------------------------------------------------------------------------------


def every_level(groups: Sequence[Group], density: float | None = None, level: int | None = None) -> bool:
    """True if every level of one method is drawn."""
    return len(groups) == 1 and density is None and level is None


def chosen_levels(
    groups: Sequence[Group], density: float | None = None, level: int | None = None, last: int | None = None
) -> list[tuple[Group, int]]:
    """(group, level) of each line in a figure of layers or curves.

    Args:
        density: per method, only the run and level closest to this density (by ratio).
        level: this level of each group. With neither argument: all levels of a single group, or the last level of
            each of several groups.
        last: of a single group, only this many levels, the sparsest.

    Raises:
        ConfigError: a group has no such level; `last` with several groups.
    """
    if every_level(groups, density, level):
        return [(groups[0], int(n)) for n in sorted(groups[0].frame["level"].unique())[-(last or 0) :]]
    if last is not None:
        labels = ", ".join(dict.fromkeys(group.label for group in groups))
        raise ConfigError(f"--last: name the runs of one method; these are of several: {labels}")
    if density is not None:
        return _closest_to(groups, density)
    for group in groups:
        if level is not None and level not in set(group.frame["level"]):
            longest = group.frame.iloc[int(group.frame["level"].argmax())]
            raise ConfigError(f"{longest['run']}: no level {level}: it has levels 0 to {longest['level']}")
    return [(group, int(group.frame["level"].max()) if level is None else level) for group in groups]


def _closest_to(groups: Sequence[Group], density: float) -> list[tuple[Group, int]]:
    """One line per method. Runs that are pruned once, to different densities, are groups of the same name here."""
    closest: dict[tuple[str, Key], tuple[float, Group, int]] = {}
    for group in groups:
        found = _by_level(group)
        distance = np.abs(np.log(found["density"].to_numpy() / density))
        best = int(distance.argmin())
        line = (float(distance[best]), group, int(found["level"].iloc[best]))
        key = (group.label, group.training)
        closest[key] = min(closest.get(key, line), line, key=lambda line: line[0])
    return [(group, level) for _, group, level in closest.values()]


def mean_density(group: Group, level: int) -> float:
    return float(group.frame.loc[group.frame["level"] == level, "density"].mean())


# --- numbers of seeds ------------------------------------------------------------------------------------------------


def seeds_at(group: Group, level: int) -> int:
    return int(group.frame.loc[group.frame["level"] == level, "seed"].nunique())


def fewer_seeds(groups: Sequence[Group], shown: Sequence[tuple[Group, int]] | None = None) -> str:
    """Points that some seeds of their method lack, as in 'SNIP at 5, 2% (2 of 3)'; "" if there are none.

    Args:
        shown: (group, level) of the points that count; None = all.
    """
    seeds: dict[tuple[str, Key], set[int]] = {}
    for group in groups:  # groups of one name are one method
        seeds.setdefault((group.label, group.training), set()).update(group.frame["seed"])
    parts = []
    for group in groups:
        found = _by_level(group)
        if shown is not None:
            found = found[found["level"].isin([level for other, level in shown if other is group])]
        expected = len(seeds[group.label, group.training])
        found = found[found["seeds"] < expected].sort_values("density", ascending=False)
        for number, rows in found.groupby("seeds", sort=False):
            densities = ", ".join(map(percent_text, rows["density"]))
            parts.append(f"{group.label} at {densities}% ({number} of {expected})")
    return "; ".join(parts)


# --- layers and epochs -----------------------------------------------------------------------------------------------


def layer_frame(group: Group) -> pd.DataFrame:
    """Mean density of each layer over seeds: one row per level, one column per layer in model order.

    The index is the density of the whole network.

    Raises:
        DataError: a run's layerwise_density.csv is missing, damaged or lacks a level; runs have different layers.
    """
    tables: list[pd.DataFrame] = []
    for run in group.runs:
        tables.append(run_layers(run))
        if list(tables[0].columns) != list(tables[-1].columns):
            raise DataError(f"{run.path}: other layers than {group.runs[0].path}")
    return pd.concat(tables).groupby(level=0).mean().set_index("network")


def run_layers(run: SavedRun) -> pd.DataFrame:
    """Density of each layer of one run: one row per level; the last column, ``network``, is that of all layers.

    Raises:
        DataError: layerwise_density.csv is missing, damaged or lacks a level.
    """
    path = table_file(run.path, LAYERS)
    frame = read_csv(path, LAYER_COLUMNS)
    frame = frame[frame["level"].isin(run.summary["level"])]
    total = frame.groupby("level")[["kept", "total"]].sum()
    if len(total) < len(run.summary):
        raise DataError(f"{path}: {len(total)} of the {len(run.summary)} levels of {SUMMARY}.csv")
    if frame.duplicated(["level", "layer"]).any():
        raise DataError(f"{path}: a layer is listed twice in one level")
    table = frame.pivot(index="level", columns="layer", values="density")[list(frame["layer"].unique())]
    return table.assign(network=total["kept"] / total["total"])


def damaged(lines: Sequence[tuple[Group, int]], kind: str) -> dict[Path, DataError]:
    """{run: fault} of the runs whose tables of layers or of epochs cannot be read.

    Args:
        lines: (group, level) of each line that is to be drawn.
        kind: "layers" or "curves".
    """
    found: dict[Path, DataError] = {}
    for group, level in lines:
        for run in group.runs:
            try:
                if kind == "curves":
                    epoch_rows(run, level)
                elif run.path not in found:
                    run_layers(run)
            except DataError as error:
                found.setdefault(run.path, error)
    return found


def epoch_rows(run: SavedRun, level: int) -> pd.DataFrame | None:
    """Epoch rows of one level of a run; None if it has no such level.

    Raises:
        DataError: the table is missing or damaged.
    """
    if level not in set(run.summary["level"]):
        return None
    return read_csv(table_file(run.path, epoch_table(level)), EPOCH_COLUMNS)


def epoch_frame(group: Group, level: int) -> pd.DataFrame:
    """Epoch rows of one level, of the runs that have this level. Here epochs count from 1: the number completed."""
    rows = [(run, epoch_rows(run, level)) for run in group.runs]
    table = pd.concat([own.assign(seed=run.seed) for run, own in rows if own is not None])
    return table.assign(epoch=table["epoch"] + 1)
