"""The figures of utils/plot_results.py: each function draws groups of runs and returns a matplotlib figure.

Lines are means over seeds; bands go from the smallest to the largest value, like the error bars of Frankle & Carbin
(2019).
"""

from collections.abc import Sequence
from typing import Any

import matplotlib.style
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from utils.errors import DataError
from utils.plots.dense import dense_lines
from utils.plots.groups import Group, group_styles
from utils.plots.lines import (
    METRICS,
    chosen_levels,
    epoch_frame,
    every_level,
    layer_frame,
    mean_density,
    points,
    seeds_at,
)
from utils.plots.style import (
    NICE,
    STYLE,
    check_lines,
    density_axis,
    epoch_ticks,
    layer_ticks,
    layer_width,
    legend_beside,
    level_colours,
    linear_ticks,
    log_ticks,
    mean_line,
    percent_ticks,
    seeds_note,
    side_by_side,
)
from utils.wording import percent_text

FEWER = "name fewer runs"
KEEP_ONE = "--density keeps one run of each method, the one closest to it"


# --- accuracy against density ----------------------------------------------------------------------------------------


def draw_accuracy(
    groups: Sequence[Group], metric: str = "final", ylim: tuple[float, float] | None = None, title: str = ""
) -> Figure:
    """Test accuracy against density: one line per group, densest left.

    Args:
        metric: of `METRICS`.
        ylim: lowest and highest accuracy shown, in percent.

    Raises:
        ConfigError: too many groups.
    """
    check_lines(len(groups), FEWER)
    column, epoch = METRICS[metric]
    styles = group_styles(groups)
    with matplotlib.style.context(STYLE):
        figure = Figure(figsize=(6.4, 3.6), layout="constrained")
        ax = figure.subplots()
        lines = [points(group, column) for group in groups]
        places, spread = side_by_side([100 * line["density"] for line in lines])
        for group, line, x, style in zip(groups, lines, places, styles):
            mean_line(ax, x, line, label=group.label, **style | {"linestyle": "--"} if group.one_shot else style)
        dense_lines(ax, groups, column, styles)
        most_right = min(x.min() for x in places) / 100
        density_axis(ax, min(line["density"].min() for line in lines), most_right)
        ax.set(ylabel=f"Test accuracy, {epoch} (%)", title=title)
        if ylim:
            ax.set_ylim(*ylim)
        else:
            linear_ticks(ax)
        note = seeds_note(pd.concat(lines)["seeds"]) + ("\nequal densities: side by side" if spread else "")
        legend_beside(figure, ax, note)
    return figure


# --- per-layer density -----------------------------------------------------------------------------------------------


def draw_layers(
    groups: Sequence[Group], density: float | None = None, title: str = "", last: int | None = None
) -> Figure:
    """Density of each layer: every level of one group, or one line per group or method.

    Args:
        density: of the network, a fraction; draws, per method, the run and level closest to it. None = every level of
            a single group, or the last level of each of several groups.
        last: only this many levels of a single group, the sparsest.

    Raises:
        ConfigError: too many lines.
        DataError: as `layer_frame`; the groups have different layers, or no layer has a weight left.
    """
    by_level = every_level(groups, density)
    lines = chosen_levels(groups, density, last=last)
    if not by_level:
        check_lines(len(lines), FEWER if density else f"{KEEP_ONE}; or {FEWER}")
    tables = [layer_frame(group) for group in (groups if by_level else [group for group, _ in lines])]
    names = list(tables[0].columns)
    for (group, _), table in zip(lines, tables):
        if list(table.columns) != names:
            raise DataError(f"{group.label} ({group.model}) has other layers than {lines[0][0].label}")
    with matplotlib.style.context(STYLE):
        figure = Figure(figsize=(layer_width(len(names)), 3.6), layout="constrained")
        ax = figure.subplots()
        if by_level:
            shown = tables[0].iloc[-len(lines) :]
            floor = _floor(shown.to_numpy())
            _layers_by_level(figure, ax, shown, floor)
        else:
            rows = [table.iloc[[level]] for table, (_, level) in zip(tables, lines)]  # levels are 0, 1, 2, ...
            floor = _floor(np.concatenate([row.to_numpy() for row in rows]))
            _layers_by_method(figure, ax, lines, rows, floor)
        _layer_axes(ax, names, floor)
        ax.set_title(title)
    return figure


def _floor(densities: np.ndarray) -> float:
    """Bottom of the axis: below all layers that have weights left."""
    alive = densities[densities > 0]
    ticks = [tick for tick in NICE if len(alive) and tick <= alive.min() / 1.1]
    if not ticks:
        raise DataError(f"no layer to draw: each has less than {percent_text(NICE[0])}% of its weights left")
    return max(ticks)


def _layers_by_level(figure: Figure, ax: Axes, table: pd.DataFrame, floor: float) -> None:
    colours = level_colours(figure, ax, list(table.index))
    for colour, densities in zip(colours, table.to_numpy()):
        _layer_line(ax, densities, floor, color=colour, marker=".", **EDGES)


def _layers_by_method(
    figure: Figure, ax: Axes, lines: Sequence[tuple[Group, int]], rows: Sequence[pd.DataFrame], floor: float
) -> None:
    labels, head = _labels([group for group, _ in lines], [float(row.index[0]) for row in rows], "network density")
    styles = group_styles([group for group, _ in lines])
    for label, style, row in zip(labels, styles, rows):
        _layer_line(ax, row.to_numpy()[0], floor, label=label, **style)
    note = seeds_note((seeds_at(group, level) for group, level in lines), band=False)
    legend_beside(figure, ax, f"{head}\n{note}")


def _labels(groups: Sequence[Group], densities: Sequence[float], density: str) -> tuple[list[str], str]:
    """Label of each line, and the head of the legend: it tells the density that all lines share, or else each does."""
    texts = [percent_text(d) for d in densities]
    if len(texts) > 1 and len(set(texts)) == 1:
        return [group.label for group in groups], f"{density} {texts[0]}%"
    return [f"{group.label} ({text}%)" for group, text in zip(groups, texts)], f"method ({density})"


def _layer_line(ax: Axes, densities: np.ndarray, floor: float, **style: Any) -> None:
    """Density of each layer. Layers without any weight are crosses at the bottom: a logarithmic axis has no zero."""
    x = np.arange(len(densities))
    alive = np.where(densities > 0, 100 * densities, np.nan)
    ax.plot(x, alive, linewidth=1.1, **style)
    dead = densities == 0
    if dead.any():
        ax.plot(x[dead], np.full(dead.sum(), 100 * floor), "x", color=style["color"], clip_on=False, markersize=5)


def _layer_axes(ax: Axes, names: Sequence[str], floor: float) -> None:
    ax.set_yscale("log")
    ax.set_ylim(100 * floor, 100 * 1.15)
    percent_ticks(ax.yaxis, floor)
    ax.set_ylabel("Density of the layer (%)")
    dead = any(line.get_marker() == "x" for line in ax.lines)
    layer_ticks(ax, names, "; x: no weight left" if dead else "")


# --- training curves -------------------------------------------------------------------------------------------------

PANELS = [
    ("train_loss", "Training loss (nats)"), ("test_loss", "Test loss (nats)"),
    ("train_acc", "Training accuracy (%)"), ("test_acc", "Test accuracy (%)"),
]  # fmt: skip
MARKS = 12  # markers per curve
EDGES = {"markeredgecolor": "white", "markeredgewidth": 0.3}  # of the markers of levels
LOG_AXES = {"loss": ("y",), "epochs": ("x",), "both": ("x", "y")}


def draw_curves(
    groups: Sequence[Group], level: int | None = None, title: str = "", density: float | None = None,
    last: int | None = None, log: str | None = None,
) -> Figure:  # fmt: skip
    """Loss and accuracy against epochs: every level of one group, or one line per group or method.

    Args:
        level: this level of each group; None = the last level of each.
        density: instead of a level: per method, the run and level closest to this density.
        last: only this many levels of a single group, the sparsest.
        log: of `LOG_AXES`: what is on logarithmic axes; None = nothing.

    Raises:
        ConfigError: no run of a group has this level; too many lines.
        DataError: the epochs of a level are missing or damaged.
    """
    chosen = chosen_levels(groups, density, level, last)
    densities = [mean_density(group, n) for group, n in chosen]
    by_level = every_level(groups, density, level)
    if not by_level:
        keep_one = f"{KEEP_ONE}{'' if level is None else ' (in place of --level)'}; or "
        check_lines(len(chosen), FEWER if density else keep_one + FEWER)
    tables = [epoch_frame(group, n) for group, n in chosen]
    with matplotlib.style.context(STYLE):
        figure = Figure(figsize=(7.2, 4.6), layout="constrained")
        axes = figure.subplots(2, 2, sharex=True)
        if by_level:
            colours = level_colours(figure, axes, densities)
            styles = [{"color": colour, "marker": ".", **EDGES} for colour in colours]
            labels, head = [""] * len(chosen), ""
        else:
            styles = group_styles([group for group, _ in chosen])
            labels, head = _labels([group for group, _ in chosen], densities, "density")
        for ax, (column, name) in zip(axes.flat, PANELS):
            for table, label, style in zip(tables, labels, styles):
                _curve(ax, table, column, band=not by_level, label=label or None, **style)
            ax.set_ylabel(name)
        _curve_axes(axes, tables, LOG_AXES[log] if log else ())
        if not by_level:
            legend_beside(figure, axes[0, 0], f"{head}\n{seeds_note(seeds_at(group, n) for group, n in chosen)}")
        figure.suptitle(title, fontsize=9)
    return figure


def _curve(ax: Axes, table: pd.DataFrame, column: str, band: bool, **style: Any) -> None:
    """Mean over seeds, and band; of many levels there is none. Markers stand at no more than MARKS of the epochs.

    Epochs without evaluation have no test figures: the line goes through the others.
    """
    by_epoch = table.dropna(subset=column).groupby("epoch")[column]
    mean = by_epoch.mean()
    ax.plot(mean.index, mean, linewidth=1.2, markevery=-(-len(mean) // MARKS) or 1, **style)
    if band and table["seed"].nunique() > 1:
        ax.fill_between(mean.index, by_epoch.min(), by_epoch.max(), color=style["color"], alpha=0.18, linewidth=0)


def _curve_axes(axes: np.ndarray, tables: Sequence[pd.DataFrame], logarithmic: Sequence[str]) -> None:
    """Ticks of the four panels: losses are in the first row."""
    for ax in axes.flat:
        (log_ticks if "y" in logarithmic and ax in axes[0] else linear_ticks)(ax)
    first = int(min(table["epoch"].min() for table in tables))
    last = int(max(table["epoch"].max() for table in tables))
    for ax in axes[1]:
        epoch_ticks(ax, first, last, "x" in logarithmic)
        ax.set_xlabel("Epochs of the level's schedule")
