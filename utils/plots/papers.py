"""What a paper published beside what runs of its experiment gave: one row per published figure that was run.

A group of runs follows the experiment of `published.csv` with its network and its method from which it differs least:
its own config is compared with the paper's, option by option, and each difference stands in the row. If several are
equally near, each has its rows. A figure is compared with the level, or the run pruned once, of the nearest density.
"""

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from utils.errors import DataError
from utils.plots.groups import Group
from utils.plots.lines import METRICS, dense_accuracy
from utils.plots.published import ACCURACY, OVER, SIGNS, Experiment, PublishedFigure
from utils.plots.runs import SavedRun
from utils.plots.settings import data_of, differences, hardware_of

# Largest ratio, less 1, of a density to the published one: half the step of two levels at a rate of 0.2.
TOLERANCE = 0.12
COLUMNS = (
    "paper", "config", "setting", "method", "figure", "density", "published", "published_spread", "published_n",
    "our_density", "ours", "ours_std", "ours_n", "data", "hardware", "differs", "source",
)  # fmt: skip


def paper_table(
    groups: Sequence[Group], experiments: Sequence[Experiment], metric: str = "final"
) -> tuple[pd.DataFrame, list[str]]:
    """One row per published figure that has a counterpart among `groups`, with `COLUMNS`, in the experiments' order.

    Also the methods of those groups below density 1 that have no row.

    Args:
        groups: of run directories, of any data sets.
        metric: of `METRICS`: which accuracy of ours is compared.

    Raises:
        DataError: there is no such figure.
    """
    rows, without = [], []
    for recipe in _recipes(groups):
        rows += _dense_rows(recipe, experiments, metric)
        for group in recipe:
            found = _rows(group, recipe, experiments, metric)
            rows += found
            if not found and (group.frame["density"] < 1).any():
                without.append(group.runs[0].method)
    if not rows:
        raise DataError(f"no published figure of the network, the method and a density within {TOLERANCE:.0%} of a run")
    rows.sort(key=lambda row: (row["place"], -row["density"]))
    return pd.DataFrame(rows)[list(COLUMNS)], list(dict.fromkeys(without))


def _recipes(groups: Sequence[Group]) -> list[list[Group]]:
    """The groups that share their dense network."""
    found: dict[Any, list[Group]] = {}
    for group in groups:
        found.setdefault((group.model, group.training), []).append(group)
    return list(found.values())


# --- rows ------------------------------------------------------------------------------------------------------------


def _dense_rows(recipe: Sequence[Group], experiments: Sequence[Experiment], metric: str) -> list[dict[str, Any]]:
    """Rows of density 1, where no option about pruning has an effect."""
    dense = _dense(recipe)
    if not dense:
        return []
    values = dense_accuracy(dense, METRICS[metric][0])
    runs = [run for group in dense for run in group.runs]
    candidates = [experiment for experiment in experiments if any(f.density == 1 for f in experiment.figures)]
    return [
        _row(experiment, figure, 1.0, values, runs, [*differs, *_other_epoch(figure, metric)])
        for experiment, differs in _nearest(runs[0], candidates, dense=True)
        for figure in experiment.figures
        if figure.density == 1
    ]


def _dense(recipe: Sequence[Group]) -> list[Group]:
    """The groups that hold the dense network of their recipe."""
    return [group for group in recipe if group.shows_dense and (group.frame["density"] == 1).any()]


def _rows(
    group: Group, recipe: Sequence[Group], experiments: Sequence[Experiment], metric: str
) -> list[dict[str, Any]]:
    """Rows of the densities below 1."""
    column = METRICS[metric][0]
    sparse = [experiment for experiment in experiments if any(f.density < 1 for f in experiment.figures)]
    candidates = [experiment for experiment in sparse if experiment.name == group.runs[0].method]
    rows = []
    for experiment, differs in _nearest(group.runs[0], candidates):
        for figure in experiment.figures:
            here = _at(group, figure.density) if figure.density < 1 else None
            if here is None:
                continue
            values = here.set_index("seed")[column]
            if figure.figure != ACCURACY:
                values = (values - _compared(figure, experiment, recipe, experiments, column)).dropna()  # seed by seed
            if len(values):
                told = [*differs, *_other_epoch(figure, metric)]
                rows.append(_row(experiment, figure, here["density"].mean(), values, group.runs, told))
    return rows


def _at(group: Group, density: float) -> pd.DataFrame | None:
    """The rows of a group's seeds at the level, or the start, that is next to a density; None if none is near."""
    distance = np.abs(np.log(group.frame["density"] / density))
    if distance.min() > math.log1p(TOLERANCE):
        return None
    nearest = group.frame.loc[distance.idxmin()]
    return group.frame[(group.frame["start"] == nearest["start"]) & (group.frame["level"] == nearest["level"])]


def _compared(
    figure: PublishedFigure,
    experiment: Experiment,
    recipe: Sequence[Group],
    experiments: Sequence[Experiment],
    column: str,
) -> pd.Series:
    """Accuracy by seed of what a difference is taken to: the dense network, or another method at the same density."""
    method = figure.figure.removeprefix(OVER)
    if method == "dense":
        return dense_accuracy(dense, column) if (dense := _dense(recipe)) else pd.Series(dtype=float)
    key = (experiment.config, experiment.setting, method)
    names = [other.name for other in experiments if (other.config, other.setting, other.method) == key]
    for group in recipe:
        here = _at(group, figure.density) if group.runs[0].method in names else None
        if here is not None:
            return here.set_index("seed")[column]
    return pd.Series(dtype=float)


def _row(
    experiment: Experiment,
    figure: PublishedFigure,
    density: float,
    values: pd.Series,
    runs: Sequence[SavedRun],
    differs: Sequence[str],
) -> dict[str, Any]:
    return {
        "place": experiment.place, "paper": experiment.paper, "config": experiment.config,
        "setting": experiment.setting, "method": experiment.method, "figure": figure.figure,
        "density": figure.density, "published": figure.value, "published_spread": figure.spread,
        "published_n": figure.n, "our_density": round(density, 6), "ours": round(values.mean(), 3),
        "ours_std": round(values.std(), 3), "ours_n": len(values), "data": _each(runs, data_of),
        "hardware": _each(runs, hardware_of), "differs": "; ".join(differs), "source": figure.source,
    }  # fmt: skip


def _each(runs: Sequence[SavedRun], say: Callable[[SavedRun], str]) -> str:
    return " and ".join(dict.fromkeys(say(run) for run in runs))


# --- what differs ----------------------------------------------------------------------------------------------------


def _nearest(
    run: SavedRun, experiments: Sequence[Experiment], dense: bool = False
) -> list[tuple[Experiment, list[str]]]:
    """The experiments with the run's network from which it differs least, and in what."""
    told = [(e, differences(run, e, dense)) for e in experiments if e.model == run.model]
    least = min((len(differs) for _, differs in told), default=0)
    return [(experiment, differs) for experiment, differs in told if len(differs) == least]


def _other_epoch(figure: PublishedFigure, metric: str) -> list[str]:
    ours = METRICS[metric][1]
    return [f"accuracy at {ours} ({figure.at})"] if figure.at and figure.at != ours else []


# --- Markdown --------------------------------------------------------------------------------------------------------


def markdown(table: pd.DataFrame) -> str:
    """The table of `paper_table` as Markdown."""
    lines = ["| paper | setting | density | published | ours | data, hardware | differs: ours (paper's) |"]
    lines.append("|---|---|---|---|---|---|---|")
    for row in table.to_dict("records"):
        setting = ", ".join(filter(None, [f"`{row['config']}`", row["setting"], row["method"]]))
        theirs, ours = (f"{100 * row[key]:.3g}%" for key in ("density", "our_density"))
        density = theirs if ours == theirs else f"{theirs} (ours {ours})"
        cells = [row["paper"], setting, density, _published(row), _ours(row), f"{row['data']}; {row['hardware']}"]
        lines.append(f"| {' | '.join([*cells, row['differs'] or 'nothing'])} |")
    return "\n".join(lines)


def _published(row: Mapping[Hashable, Any]) -> str:
    value, figure = row["published"], row["figure"]
    if value in SIGNS:
        return f"{SIGNS[value]} {figure.removeprefix(OVER)}"
    spread = f" ± {row['published_spread']}" if row["published_spread"] else ""
    text = f"{value}{spread}" if figure == ACCURACY else f"+{value}{spread} {figure}"
    return text + (f", n = {row['published_n']}" if row["published_n"] else "")


def _ours(row: Mapping[Hashable, Any]) -> str:
    plain = row["figure"] == ACCURACY
    spread = f" ± {row['ours_std']:.2f}" if row["ours_n"] > 1 else ""
    text = f"{row['ours']:{'' if plain else '+'}.2f}{spread}"
    return f"{text}{'' if plain else ' ' + row['figure']}, n = {row['ours_n']}"
