"""The figures of utils/plot_results.py: each function draws groups of runs and returns a matplotlib figure.

Lines are means over seeds, and bands go from the least to the largest, as the error bars of Frankle & Carbin (2019).
"""

from collections.abc import Sequence

import matplotlib

matplotlib.use("Agg")  # before pyplot: figures go to files, and no display is needed

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from utils.plots.lines import chosen_levels, dense_accuracy, every_level, mean_density, points, seeds_at
from utils.plots.runs import Group, read_csv
from utils.plots.style import (
    DENSE,
    NICE,
    STYLE,
    check_lines,
    density_axis,
    legend_beside,
    level_colours,
    line_style,
    percent_ticks,
    seeds_told,
)

LAYER_COLUMNS = ["level", "layer", "kept", "total", "density"]
EPOCH_COLUMNS = ["epoch", "train_loss", "test_loss", "train_acc", "test_acc"]
# More layers than these are numbered, not named.
NAMED_LAYERS = 60
FEWER = "name fewer runs"
KEEP_ONE = "--density keeps one run of each method, the one next to it"
METRICS = {"final": "final_test_acc", "max": "max_test_acc"}


# --- accuracy against density ----------------------------------------------------------------------------------------


def draw_accuracy(
    groups: Sequence[Group], metric: str = "final", ylim: tuple[float, float] | None = None, title: str = ""
) -> Figure:
    """Test accuracy against density, a line a group, densest left.

    Args:
        metric: ``final`` (after a level's last epoch) or ``max`` (the best epoch: chosen on the test set).
        ylim: percent.

    Raises:
        ValueError: too many groups.
    """
    check_lines(len(groups), FEWER)
    column = METRICS[metric]
    with plt.rc_context(STYLE):
        figure, ax = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
        lines = [points(group, column) for group in groups]
        for place, (group, line) in enumerate(zip(groups, lines)):
            style = line_style(place) | {"linestyle": "--" if group.one_shot else "-"}
            _line(ax, 100 * line["density"], line, label=group.label, **style)
        _dense_lines(ax, groups, column)
        density_axis(ax, min(line["density"].min() for line in lines))
        best = " (best epoch)" if metric == "max" else ""
        ax.set(ylabel=f"Test accuracy{best} (%)", title=title)
        if ylim:
            ax.set_ylim(*ylim)
        legend_beside(figure, ax, seeds_told(pd.concat(lines)["seeds"]))
    return figure


def _line(ax: Axes, x: pd.Series, line: pd.DataFrame, **style) -> None:
    """Mean and band of one group; of a single point a bar."""
    ax.plot(x, line["mean"], markeredgecolor="white", markeredgewidth=0.4, **style)
    if len(line) == 1:
        ax.vlines(x, line["least"], line["largest"], color=style["color"], alpha=0.4, linewidth=2.5, zorder=1)
    elif (line["seeds"] > 1).any():
        ax.fill_between(x, line["least"], line["largest"], color=style["color"], alpha=0.18, linewidth=0)


def _dense_lines(ax: Axes, groups: Sequence[Group], column: str) -> None:
    """A line at the dense accuracy of each way of training: grey, or in the colour of the one group it belongs to."""
    ways: dict[tuple, list[int]] = {}
    for place, group in enumerate(groups):
        ways.setdefault(group.training, []).append(place)
    label: str | None = "Dense"  # of the first that is drawn: not every group has a dense run
    for places in ways.values():
        accuracy = dense_accuracy([groups[place] for place in places], column)
        if len(accuracy):
            own = len(ways) > 1 and len(places) == 1
            colour = line_style(places[0])["color"] if own else DENSE
            ax.axhline(accuracy.mean(), color=colour, linestyle=":", linewidth=1.1, label=label, zorder=1)
            label = None


# --- per-layer density -----------------------------------------------------------------------------------------------


def layer_table(group: Group) -> pd.DataFrame:
    """Mean density of each layer over seeds: a row a level, a column a layer in model order; index = total density.

    Raises:
        ValueError: a run lacks layerwise_density.csv or a level of it, or runs have different layers.
    """
    tables = []
    for run in group.runs:
        path = run.path / "metrics" / "layerwise_density.csv"
        frame = read_csv(path, LAYER_COLUMNS)
        frame = frame[frame["level"].isin(run.summary["level"])]
        total = frame.groupby("level")[["kept", "total"]].sum()
        if len(total) < len(run.summary):
            raise ValueError(f"{path}: {len(total)} of the {len(run.summary)} levels of summary.csv")
        table = frame.pivot(index="level", columns="layer", values="density")[list(frame["layer"].unique())]
        tables.append(table.assign(network=total["kept"] / total["total"]))
        if list(tables[0].columns) != list(tables[-1].columns):
            raise ValueError(f"{run.path}: other layers than {group.runs[0].path}")
    return pd.concat(tables).groupby(level=0).mean().set_index("network")


def draw_layers(groups: Sequence[Group], density: float | None = None, title: str = "") -> Figure:
    """Density of each layer. One group: a line a level. Several: of each method the run and level next to `density`.

    Args:
        density: fraction of the network's; None takes the last level of each group.

    Raises:
        ValueError: as `layer_table`; the groups have different layers, or are too many.
    """
    by_level = every_level(groups, density)
    lines = chosen_levels(groups, density)
    if not by_level:
        check_lines(len(lines), FEWER if density else f"{KEEP_ONE}; or {FEWER}")
    tables = [layer_table(group) for group in (groups if by_level else [group for group, _ in lines])]
    names = list(tables[0].columns)
    for (group, _), table in zip(lines, tables):
        if list(table.columns) != names:
            raise ValueError(f"{group.label} ({group.model}) has other layers than {lines[0][0].label}")
    with plt.rc_context(STYLE):
        figure, ax = plt.subplots(figsize=(max(6.4, min(12.0, 2.6 + 0.22 * len(names))), 3.6), layout="constrained")
        if by_level:
            floor = _floor(tables)
            colours = level_colours(figure, ax, list(tables[0].index))
            for colour, (_, row) in zip(colours, tables[0].iterrows()):
                _layer_line(ax, row, floor, color=colour, marker=".")
        else:
            rows = [table.iloc[level] for table, (_, level) in zip(tables, lines)]  # levels are 0, 1, 2, ...
            floor = _floor([row.to_frame() for row in rows])
            for place, ((group, _), row) in enumerate(zip(lines, rows)):
                _layer_line(ax, row, floor, label=f"{group.label} ({100 * row.name:.3g}%)", **line_style(place))
            told = seeds_told((seeds_at(group, level) for group, level in lines), band=False)
            legend_beside(figure, ax, "method (network density)\n" + told)
        _layer_axes(ax, names, floor)
        ax.set_title(title)
    return figure


def _floor(tables: Sequence[pd.DataFrame]) -> float:
    """The bottom of the axis: below all layers that are alive."""
    alive = np.concatenate([table.to_numpy().ravel() for table in tables])
    return max(tick for tick in NICE if tick <= alive[alive > 0].min() / 1.1)


def _layer_line(ax: Axes, row: pd.Series, floor: float, **style) -> None:
    """Layers without a single weight are crosses at the bottom: a logarithmic axis has no zero."""
    x = np.arange(len(row))
    ax.plot(x, 100 * row.where(row > 0), linewidth=1.1, markeredgecolor="white", markeredgewidth=0.3, **style)
    dead = row.to_numpy() == 0
    if dead.any():
        ax.plot(x[dead], np.full(dead.sum(), 100 * floor), "x", color=style["color"], clip_on=False, markersize=5)


def _layer_axes(ax: Axes, names: Sequence[str], floor: float) -> None:
    ax.set_yscale("log")
    ax.set_ylim(100 * floor, 100 * 1.15)
    percent_ticks(ax.yaxis, floor)
    ax.set_ylabel("Density of the layer (%)")
    if len(names) <= NAMED_LAYERS:
        turned = {"rotation": 90} if len(names) > 6 else {}
        ax.set_xticks(range(len(names)), [name.removesuffix(".weight") for name in names], **turned)
        ax.set_xlabel("Layer, input to output" + "; x: no weight left" * any(m.get_marker() == "x" for m in ax.lines))
    else:
        ax.set_xlabel(f"Layer, 0 (input) to {len(names) - 1} (output)")


# --- training curves -------------------------------------------------------------------------------------------------

PANELS = [
    ("train_loss", "Training loss (nats)"), ("test_loss", "Test loss (nats)"),
    ("train_acc", "Training accuracy (%)"), ("test_acc", "Test accuracy (%)"),
]  # fmt: skip


def epoch_table(group: Group, level: int) -> pd.DataFrame:
    """Epoch rows of one level, of those runs that have it; epochs count from 1 here: how many are done."""
    parts = []
    for run in group.runs:
        if level in set(run.summary["level"]):
            path = run.path / "metrics" / "epochwise_metrics" / f"level_{level}_metrics.csv"
            parts.append(read_csv(path, EPOCH_COLUMNS).assign(seed=run.seed))
    return pd.concat(parts).assign(epoch=lambda frame: frame["epoch"] + 1)


def draw_curves(
    groups: Sequence[Group], level: int | None = None, title: str = "", density: float | None = None
) -> Figure:
    """Loss and accuracy against epochs. One group: a line a level. Several: a line each.

    Args:
        level: of each group; None takes its last one.
        density: in place of a level: of each method the run and level next to it.

    Raises:
        ValueError: no run of a group has such a level, or groups are too many.
    """
    chosen = chosen_levels(groups, density, level)
    densities = [mean_density(group, n) for group, n in chosen]
    by_level = every_level(groups, density, level)
    if not by_level:
        instead = f"{KEEP_ONE}{'' if level is None else ' (in place of --level)'}; or "
        check_lines(len(chosen), FEWER if density else instead + FEWER)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(2, 2, figsize=(7.2, 4.6), sharex=True, layout="constrained")
        if by_level:
            styles = [{"color": colour, "label": None} for colour in level_colours(figure, axes, densities)]
        else:
            styles = [
                line_style(place) | {"label": f"{group.label} ({100 * d:.3g}%)"}
                for place, ((group, _), d) in enumerate(zip(chosen, densities))
            ]
        lines = [(epoch_table(group, n), style) for (group, n), style in zip(chosen, styles)]
        for ax, (column, label) in zip(axes.flat, PANELS):
            for table, style in lines:
                by = table.groupby("epoch")[column]
                mean = by.mean()
                # Methods by their markers too, at some of many epochs; levels have a colour bar, and too many lines.
                marks = {"marker": "." if len(mean) < 12 else ""} if by_level else {"markevery": -(-len(mean) // 12)}
                edge = {"markersize": 4, "markeredgecolor": "white", "markeredgewidth": 0.3}
                ax.plot(mean.index, mean, linewidth=1.2, **style | edge | marks)
                if table["seed"].nunique() > 1 and style["label"]:
                    ax.fill_between(mean.index, by.min(), by.max(), color=style["color"], alpha=0.18, linewidth=0)
            ax.set_ylabel(label)
            ax.xaxis.get_major_locator().set_params(integer=True)
        for ax in axes[1]:
            ax.set_xlabel("Epochs of the level's schedule")
        if not by_level:
            told = seeds_told(seeds_at(group, n) for group, n in chosen)
            legend_beside(figure, axes[0, 0], "method (density)\n" + told)
        figure.suptitle(title, fontsize=9)
    return figure
