"""The figures of utils/plot_results.py: each function draws groups of runs and returns a matplotlib figure.

Lines are means over seeds; bands go from the smallest to the largest value, like the error bars of Frankle & Carbin
(2019).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from utils.errors import DataError
from utils.plots.groups import Group, Key
from utils.plots.lines import (
    chosen_levels,
    dense_accuracy,
    epoch_frame,
    every_level,
    layer_frame,
    mean_density,
    points,
    seeds_at,
)
from utils.plots.style import (
    DENSE,
    NICE,
    STYLE,
    check_lines,
    density_axis,
    layer_ticks,
    layer_width,
    legend_beside,
    level_colours,
    line_style,
    mean_line,
    percent_ticks,
    seeds_note,
)

FEWER = "name fewer runs"
KEEP_ONE = "--density keeps one run of each method, the one closest to it"
METRICS = {"final": "final_test_acc", "max": "max_test_acc"}


# --- accuracy against density ----------------------------------------------------------------------------------------


def draw_accuracy(
    groups: Sequence[Group], metric: str = "final", ylim: tuple[float, float] | None = None, title: str = ""
) -> Figure:
    """Test accuracy against density: one line per group, densest left.

    Args:
        metric: ``final`` (after the last epoch of a level) or ``max`` (best epoch, chosen on the test set).
        ylim: lowest and highest accuracy shown, in percent.

    Raises:
        ConfigError: too many groups.
    """
    check_lines(len(groups), FEWER)
    column = METRICS[metric]
    with plt.style.context(STYLE):
        figure, ax = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
        lines = [points(group, column) for group in groups]
        for place, (group, line) in enumerate(zip(groups, lines)):
            style = line_style(place) | {"linestyle": "--" if group.one_shot else "-"}
            mean_line(ax, 100 * line["density"], line, label=group.label, **style)
        _dense_lines(ax, groups, column)
        density_axis(ax, min(line["density"].min() for line in lines))
        best = " (best epoch)" if metric == "max" else ""
        ax.set(ylabel=f"Test accuracy{best} (%)", title=title)
        if ylim:
            ax.set_ylim(*ylim)
        legend_beside(figure, ax, seeds_note(pd.concat(lines)["seeds"]))
    return figure


def _dense_lines(ax: Axes, groups: Sequence[Group], column: str) -> None:
    """Dense accuracy, one line per training recipe: grey, or in its group's colour if only one group has the recipe."""
    recipes: dict[Key, list[int]] = {}
    for place, group in enumerate(groups):
        recipes.setdefault(group.training, []).append(place)
    label: str | None = "Dense"  # only for the first line drawn; some groups have no dense run
    for places in recipes.values():
        accuracy = dense_accuracy([groups[place] for place in places], column)
        if len(accuracy):
            own = len(recipes) > 1 and len(places) == 1
            colour = line_style(places[0])["color"] if own else DENSE
            ax.axhline(accuracy.mean(), color=colour, linestyle=":", linewidth=1.1, label=label, zorder=1)
            label = None


# --- per-layer density -----------------------------------------------------------------------------------------------


def draw_layers(groups: Sequence[Group], density: float | None = None, title: str = "") -> Figure:
    """Density of each layer: every level of one group, or one line per group or method.

    Args:
        density: of the network, a fraction; draws, per method, the run and level closest to it. None = every level of
            a single group, or the last level of each of several groups.

    Raises:
        ConfigError: too many lines.
        DataError: as `layer_frame`; the groups have different layers, or no layer has a weight left.
    """
    by_level = every_level(groups, density)
    lines = chosen_levels(groups, density)
    if not by_level:
        check_lines(len(lines), FEWER if density else f"{KEEP_ONE}; or {FEWER}")
    tables = [layer_frame(group) for group in (groups if by_level else [group for group, _ in lines])]
    names = list(tables[0].columns)
    for (group, _), table in zip(lines, tables):
        if list(table.columns) != names:
            raise DataError(f"{group.label} ({group.model}) has other layers than {lines[0][0].label}")
    with plt.style.context(STYLE):
        figure, ax = plt.subplots(figsize=(layer_width(len(names)), 3.6), layout="constrained")
        if by_level:
            floor = _floor(tables[0].to_numpy())
            _layers_by_level(figure, ax, tables[0], floor)
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
        raise DataError(f"no layer to draw: each has less than {100 * NICE[0]:g}% of its weights left")
    return max(ticks)


def _layers_by_level(figure: Figure, ax: Axes, table: pd.DataFrame, floor: float) -> None:
    colours = level_colours(figure, ax, list(table.index))
    for colour, densities in zip(colours, table.to_numpy()):
        _layer_line(ax, densities, floor, color=colour, marker=".")


def _layers_by_method(
    figure: Figure, ax: Axes, lines: Sequence[tuple[Group, int]], rows: Sequence[pd.DataFrame], floor: float
) -> None:
    for place, ((group, _), row) in enumerate(zip(lines, rows)):
        label = f"{group.label} ({100 * row.index[0]:.3g}%)"
        _layer_line(ax, row.to_numpy()[0], floor, label=label, **line_style(place))
    note = seeds_note((seeds_at(group, level) for group, level in lines), band=False)
    legend_beside(figure, ax, "method (network density)\n" + note)


def _layer_line(ax: Axes, densities: np.ndarray, floor: float, **style: Any) -> None:
    """Density of each layer. Layers without any weight are crosses at the bottom: a logarithmic axis has no zero."""
    x = np.arange(len(densities))
    alive = np.where(densities > 0, 100 * densities, np.nan)
    ax.plot(x, alive, linewidth=1.1, markeredgecolor="white", markeredgewidth=0.3, **style)
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


def draw_curves(
    groups: Sequence[Group], level: int | None = None, title: str = "", density: float | None = None
) -> Figure:
    """Loss and accuracy against epochs: every level of one group, or one line per group or method.

    Args:
        level: this level of each group; None = the last level of each.
        density: instead of a level: per method, the run and level closest to this density.

    Raises:
        ConfigError: no run of a group has this level; too many lines.
        DataError: the epochs of a level are missing or damaged.
    """
    chosen = chosen_levels(groups, density, level)
    densities = [mean_density(group, n) for group, n in chosen]
    by_level = every_level(groups, density, level)
    if not by_level:
        keep_one = f"{KEEP_ONE}{'' if level is None else ' (in place of --level)'}; or "
        check_lines(len(chosen), FEWER if density else keep_one + FEWER)
    tables = [epoch_frame(group, n) for group, n in chosen]
    with plt.style.context(STYLE):
        figure, axes = plt.subplots(2, 2, figsize=(7.2, 4.6), sharex=True, layout="constrained")
        colours = level_colours(figure, axes, densities) if by_level else []
        for ax, (column, label) in zip(axes.flat, PANELS):
            for place, ((group, _), table) in enumerate(zip(chosen, tables)):
                if by_level:
                    _level_curve(ax, table, column, colours[place])
                else:
                    name = f"{group.label} ({100 * densities[place]:.3g}%)"
                    _method_curve(ax, table, column, label=name, **line_style(place))
            ax.set_ylabel(label)
            ax.xaxis.get_major_locator().set_params(integer=True)
        for ax in axes[1]:
            ax.set_xlabel("Epochs of the level's schedule")
        if not by_level:
            note = seeds_note(seeds_at(group, n) for group, n in chosen)
            legend_beside(figure, axes[0, 0], "method (density)\n" + note)
        figure.suptitle(title, fontsize=9)
    return figure


def _level_curve(ax: Axes, table: pd.DataFrame, column: str, colour: tuple[float, ...]) -> None:
    """Mean over seeds, without a band: there are many levels. A colour bar names them."""
    mean = table.dropna(subset=column).groupby("epoch")[column].mean()
    _curve(ax, mean, color=colour, marker="." if len(mean) < MARKS else "")


def _method_curve(ax: Axes, table: pd.DataFrame, column: str, **style: Any) -> None:
    """Mean over seeds and band. Markers tell methods apart too, at no more than MARKS of the epochs.

    Epochs without evaluation have no test figures: the line goes through the others.
    """
    by_epoch = table.dropna(subset=column).groupby("epoch")[column]
    mean = by_epoch.mean()
    _curve(ax, mean, markevery=-(-len(mean) // MARKS), **style)
    if table["seed"].nunique() > 1:
        ax.fill_between(mean.index, by_epoch.min(), by_epoch.max(), color=style["color"], alpha=0.18, linewidth=0)


def _curve(ax: Axes, mean: pd.Series, **style: Any) -> None:
    ax.plot(mean.index, mean, linewidth=1.2, markersize=4, markeredgecolor="white", markeredgewidth=0.3, **style)
