"""Figures of utils/analyze.py, in the style of those of utils/plot_results.py."""

from collections.abc import Iterator, Sequence

import matplotlib.style
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from utils.analysis.lines import barriers_of
from utils.analysis.overlap import WHOLE
from utils.plots.colours import DENSE, line_style
from utils.plots.style import (
    STYLE,
    check_lines,
    density_axis,
    layer_ticks,
    layer_width,
    legend_beside,
    level_colours,
    mean_line,
)
from utils.wording import percent_text

FEWER = "name fewer, or choose --levels"


def over_repetitions(frame: pd.DataFrame, column: str, keys: Sequence[str]) -> pd.DataFrame:
    """Mean and range of a column, one row per combination of `keys`; seeds is the number of pairs or runs."""
    by = frame.groupby(list(keys), sort=False)[column]
    return by.agg(mean="mean", least="min", largest="max", seeds="count").reset_index()


def lines_against_density(frame: pd.DataFrame, column: str) -> Iterator[tuple[str, pd.DataFrame]]:
    """(recipe, its points, densest first: density, mean, least, largest, seeds). A point is one density of a recipe.

    Args:
        frame: its columns recipe, start, level and density say which rows are repetitions of one point.
    """
    by = frame.groupby(["recipe", "start", "level"], sort=False)
    found = by.agg(
        density=("density", "mean"), mean=(column, "mean"), least=(column, "min"), largest=(column, "max"),
        seeds=(column, "count"),
    ).reset_index()  # fmt: skip
    for recipe, line in found.groupby("recipe", sort=False):
        yield str(recipe), line.sort_values("density", ascending=False)


def repetitions_note(numbers: pd.Series, what: str = "pair") -> str:
    """Head of a legend: over how many pairs or runs lines and bands are."""
    least, most = int(numbers.min()), int(numbers.max())
    if most == 1:
        return f"one {what}"
    return f"mean and range\nof {most if least == most else f'{least} to {most}'} {what}s"


# --- overlap and signs -----------------------------------------------------------------------------------------------


def draw_overlap(frame: pd.DataFrame) -> Figure:
    """Intersection over union by layer, a line per recipe and level; above it, for several levels, against density.

    Args:
        frame: rows of `overlap`: a, b, level, density_a, density_b and those of `overlap_rows`; recipe and start.

    Raises:
        ConfigError: too many recipes for one figure.
    """
    frame = frame.assign(density=(frame["density_a"] + frame["density_b"]) / 2)
    whole = frame[frame["layer"] == WHOLE]
    with matplotlib.style.context(STYLE):
        if whole["level"].nunique() == 1:
            figure, below = _panels(frame, 1)
        else:
            figure, (above, below) = _panels(frame, 2)
            _overlap_against_density(above, whole)
        _by_layer(figure, below, frame, "iou", "layerwise_iou")
        below.set(ylabel="Intersection over union", ylim=(0, 1.03))
    return figure


def _overlap_against_density(ax: Axes, whole: pd.DataFrame) -> None:
    recipes = _recipes(whole)
    for place, (recipe, line) in enumerate(lines_against_density(whole, "iou")):
        name = f"{recipe}: " if len(recipes) > 1 else ""
        note = repetitions_note(line["seeds"])
        mean_line(ax, 100 * line["density"], line, label=f"{name}masks, {note}", **line_style(place))
    for number, (column, label) in enumerate(RANDOM.items(), start=1):
        for place, (_, line) in enumerate(lines_against_density(whole, column)):
            colour = line_style(place if len(recipes) > 1 else number)["color"]
            # Of several recipes, each in the colour of its masks; a label with an underscore is not in the legend.
            shown = label if place == 0 else "_"
            ax.plot(100 * line["density"], line["mean"], color=colour, linestyle=(":", "-.")[number - 1], label=shown)
    density_axis(ax, float(whole["density"].min()))
    ax.set(ylabel="Intersection over union", ylim=(0, 1.03))
    ax.legend()


def _recipes(frame: pd.DataFrame) -> list[str]:
    found = list(frame["recipe"].drop_duplicates())
    check_lines(len(found), FEWER)
    return found


RANDOM = {"random_iou": "random masks", "layerwise_iou": "random in each layer"}


def draw_signs(frame: pd.DataFrame) -> Figure:
    """Share of the kept weights with the sign that they had at the start of the run, by layer, a line per level.

    Args:
        frame: rows of `signs`: level, density and those of `sign_rows`.
    """
    with matplotlib.style.context(STYLE):
        figure, ax = _panels(frame, 1)
        _by_layer(figure, ax, frame.assign(recipe="", start=1.0), "share_init")
        ax.set_ylabel("Kept weights with their sign at the start of the run")
    return figure


def _panels(frame: pd.DataFrame, rows: int):
    layers = frame["layer"].nunique() - 1
    figure = Figure(figsize=(layer_width(layers), 0.4 + 3.2 * rows), layout="constrained")
    return figure, figure.subplots(rows, 1)


def _by_layer(figure: Figure, ax: Axes, frame: pd.DataFrame, column: str, expected: str = "") -> None:
    """A line per recipe and level, the mean over pairs, coloured by the network's density; dashes: what is expected."""
    keys = ["recipe", "start", "level"]
    densities = frame[frame["layer"] == WHOLE].groupby(keys, sort=False)["density"].mean()
    recipes, layers = _recipes(frame), frame[frame["layer"] != WHOLE]
    names = list(layers["layer"].drop_duplicates())
    rows = dict(iter(layers.groupby(keys, sort=False)))
    named: set[str] = set()
    for colour, key in zip(level_colours(figure, ax, list(densities)), densities.index):
        means, style = rows[key].groupby("layer", sort=False), line_style(recipes.index(key[0]))
        more = {} if key[0] in named or len(recipes) == 1 else {"label": key[0]}
        named.add(key[0])
        marker = style["marker"] if len(recipes) > 1 else "."
        ax.plot(means[column].mean().to_numpy(), color=colour, marker=marker, linewidth=1.1, **more)
        if expected:
            ax.plot(means[expected].mean().to_numpy(), color=colour, marker="_", linestyle="none", markersize=9)
    if len(recipes) > 1:
        ax.legend()
    layer_ticks(ax, names, "; dashes: random masks of these densities" if expected else "")


def draw_costs(frame: pd.DataFrame) -> Figure:
    """Multiply-adds of the kept weights, by layer, a line per level.

    Args:
        frame: rows of `flops`: level, layer, density, kept_multiply_adds.
    """
    with matplotlib.style.context(STYLE):
        figure, ax = _panels(frame, 1)
        _by_layer(figure, ax, frame.assign(recipe="", start=1.0), "kept_multiply_adds")
        ax.set_yscale("symlog")
        ax.set_ylabel("Multiply-adds of kept weights, per image")
    return figure


def draw_drop(frame: pd.DataFrame) -> Figure:
    """Test accuracy against density, right after pruning and after training: two lines per recipe.

    Args:
        frame: rows of `drop`: run, level, density, pruned_test_acc, final_test_acc; recipe and start.

    Raises:
        ConfigError: too many recipes for one figure.
    """
    shown = {"final_test_acc": "after training", "pruned_test_acc": "right after pruning"}
    several, counts = len(_recipes(frame)) > 1, []
    with matplotlib.style.context(STYLE):
        figure = Figure(figsize=(6.4, 3.6), layout="constrained")
        ax = figure.subplots()
        for number, (column, label) in enumerate(shown.items()):
            for place, (recipe, line) in enumerate(lines_against_density(frame, column)):
                style = line_style(place) | ({"linestyle": ":"} if number else {}) if several else line_style(number)
                name = f"{recipe}, {label}" if several else label
                mean_line(ax, 100 * line["density"], line, label=name, **style)
                counts.append(line["seeds"])
        density_axis(ax, float(frame["density"].min()))
        ax.set_ylabel("Test accuracy (%)")
        legend_beside(figure, ax, repetitions_note(pd.concat(counts), "run"))
    return figure


# --- barriers --------------------------------------------------------------------------------------------------------


def draw_barriers(frame: pd.DataFrame) -> Figure:
    """Error barrier against density where there are several levels; otherwise error and loss along the lines.

    Args:
        frame: rows of `utils.analysis.lines.measured`; recipe and start.

    Raises:
        ConfigError: too many lines for one figure.
    """
    return _against_density(frame) if frame["level"].nunique() > 1 else _along_lines(frame)


def _along_lines(frame: pd.DataFrame) -> Figure:
    found = list(frame.groupby(["a", "b"], sort=False))
    check_lines(len(found), FEWER)
    with matplotlib.style.context(STYLE):
        figure = Figure(figsize=(7.2, 3.2), layout="constrained")
        axes = figure.subplots(1, 2)
        for place, ((a, b), line) in enumerate(found):
            for ax, column in zip(axes, ("error", "loss")):
                values = line[column].to_numpy()
                ax.plot(line["alpha"], values, label=f"{a} to {b}", **line_style(place) | {"markersize": 3})
                if len(found) == 1:
                    ends = np.array([values[0], values[-1]])
                    ax.plot([0, 1], [ends.mean(), ends.mean()], color=DENSE, linestyle=":", linewidth=1.1)
                    ax.set_title(f"barrier {line[f'{column}_barrier'].iloc[0]:.3g}")
        axes[0].set_ylabel("Error (%)")
        axes[1].set_ylabel("Loss (nats)")
        for ax in axes:
            ax.set_xlabel("Place on the line (0: first, 1: second)")
        legend_beside(figure, axes[0], "pair" if len(found) > 1 else "pair\n(dotted: mean of the ends)")
    return figure


def draw_stability(frame: pd.DataFrame) -> Figure:
    """Error barrier against density, a line per step; against the step where there is one density alone.

    Args:
        frame: rows of `utils.analysis.lines.measured`, with the column step.

    Raises:
        ConfigError: too many steps for one figure.
    """
    found = barriers_of(frame, ["step"])
    levels = found.groupby("level")["density"].mean()
    with matplotlib.style.context(STYLE):
        figure = Figure(figsize=(6.4, 3.6), layout="constrained")
        ax = figure.subplots()
        if len(levels) == 1:
            line = over_repetitions(found, "error_barrier", ["step"])
            mean_line(ax, line["step"], line, label=f"{percent_text(levels.iloc[0])}%", **line_style(0))
            ax.set_xlabel("Optimizer step from which the two networks differ")
            title = "density"
        else:
            steps = list(found["step"].drop_duplicates())
            check_lines(len(steps), "choose fewer --steps")
            line = over_repetitions(found, "error_barrier", ["step", "level"])
            for place, step in enumerate(steps):
                own = line[line["step"] == step].set_index("level")
                mean_line(ax, 100 * levels[own.index], own, label=str(step), **line_style(place))
            density_axis(ax, float(levels.min()))
            title = "from step"
        ax.set_ylabel("Error barrier (percentage points)")
        ax.set_ylim(bottom=0)
        legend_beside(figure, ax, f"{title}\n({repetitions_note(line['seeds'])})")
    return figure


def _against_density(frame: pd.DataFrame) -> Figure:
    found, counts = barriers_of(frame, ["recipe", "start"]), []
    several = len(_recipes(found)) > 1
    with matplotlib.style.context(STYLE):
        figure = Figure(figsize=(6.4, 3.6), layout="constrained")
        ax = figure.subplots()
        for place, (recipe, line) in enumerate(lines_against_density(found, "error_barrier")):
            label = recipe if several else "error barrier"
            mean_line(ax, 100 * line["density"], line, label=label, **line_style(place))
            counts.append(line["seeds"])
        density_axis(ax, float(found["density"].min()))
        ax.set_ylabel("Error barrier (percentage points)")
        ax.set_ylim(bottom=0)
        legend_beside(figure, ax, repetitions_note(pd.concat(counts)))
    return figure
