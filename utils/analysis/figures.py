"""Figures of utils/analyze.py, in the style of those of utils/plot_results.py."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from utils.analysis.lines import barriers_of
from utils.analysis.overlap import WHOLE
from utils.plots.style import (
    DENSE,
    STYLE,
    check_lines,
    density_axis,
    layer_ticks,
    layer_width,
    legend_beside,
    level_colours,
    line_style,
    mean_line,
)

FEWER = "name fewer, or choose --levels"


def over_repetitions(frame: pd.DataFrame, column: str, keys: Sequence[str]) -> pd.DataFrame:
    """Mean and range of a column, one row per combination of `keys`; seeds is the number of pairs or runs."""
    by = frame.groupby(list(keys), sort=False)[column]
    return by.agg(mean="mean", least="min", largest="max", seeds="count").reset_index()


def repetitions_note(numbers: pd.Series, what: str = "pair") -> str:
    """Head of a legend: over how many pairs or runs lines and bands are."""
    least, most = int(numbers.min()), int(numbers.max())
    if most == 1:
        return f"one {what}"
    return f"mean and range\nof {most if least == most else f'{least} to {most}'} {what}s"


# --- overlap and signs -----------------------------------------------------------------------------------------------


def draw_overlap(frame: pd.DataFrame) -> Figure:
    """Intersection over union by layer, a line per level; above it, for several levels, against density.

    Args:
        frame: rows of `overlap`: a, b, level, density_a, density_b and those of `overlap_rows`.
    """
    frame = frame.assign(density=(frame["density_a"] + frame["density_b"]) / 2)
    whole = frame[frame["layer"] == WHOLE]
    with plt.style.context(STYLE):
        if whole["level"].nunique() == 1:
            figure, below = _panels(frame, 1)
        else:
            figure, (above, below) = _panels(frame, 2)
            levels = whole.groupby("level")["density"].mean()
            seen = over_repetitions(whole, "iou", ["level"])
            mean_line(above, 100 * levels, seen, label=f"masks, {repetitions_note(seen['seeds'])}", **line_style(0))
            for place, (column, label) in enumerate(RANDOM.items(), start=1):
                values = whole.groupby("level")[column].mean()
                above.plot(100 * levels, values, color=line_style(place)["color"], linestyle=":", label=label)
            density_axis(above, float(levels.min()))
            above.set(ylabel="Intersection over union", ylim=(0, 1.03))
            above.legend()
        _by_layer(figure, below, frame, "iou", "layerwise_iou")
        below.set(ylabel="Intersection over union", ylim=(0, 1.03))
    return figure


RANDOM = {"random_iou": "random masks", "layerwise_iou": "random in each layer"}


def draw_signs(frame: pd.DataFrame) -> Figure:
    """Share of the kept weights with the sign of the initial ones, by layer, a line per level.

    Args:
        frame: rows of `signs`: level, density and those of `sign_rows`.
    """
    with plt.style.context(STYLE):
        figure, ax = _panels(frame, 1)
        _by_layer(figure, ax, frame, "share_init")
        ax.set_ylabel("Kept weights with their initial sign")
    return figure


def _panels(frame: pd.DataFrame, rows: int):
    layers = frame["layer"].nunique() - 1
    return plt.subplots(rows, 1, figsize=(layer_width(layers), 0.4 + 3.2 * rows), layout="constrained")


def _by_layer(figure: Figure, ax: Axes, frame: pd.DataFrame, column: str, expected: str = "") -> None:
    """A line per level, the mean over pairs, coloured by the network's density; dots at what is expected."""
    levels = frame[frame["layer"] == WHOLE].groupby("level")["density"].mean()
    layers = frame[frame["layer"] != WHOLE]
    names = list(layers["layer"].drop_duplicates())
    colours = level_colours(figure, ax, list(levels))
    for colour, level in zip(colours, levels.index):
        means = layers[layers["level"] == level].groupby("layer", sort=False)
        ax.plot(means[column].mean().to_numpy(), color=colour, marker=".", linewidth=1.1)
        if expected:
            ax.plot(means[expected].mean().to_numpy(), color=colour, marker="_", linestyle="none", markersize=9)
    layer_ticks(ax, names, "; dashes: random masks of these densities" if expected else "")


def draw_costs(frame: pd.DataFrame) -> Figure:
    """Multiply-adds of the kept weights, by layer, a line per level.

    Args:
        frame: rows of `flops`: level, layer, density, kept_multiply_adds.
    """
    with plt.style.context(STYLE):
        figure, ax = _panels(frame, 1)
        _by_layer(figure, ax, frame, "kept_multiply_adds")
        ax.set_yscale("symlog")
        ax.set_ylabel("Multiply-adds of kept weights, per image")
    return figure


def draw_drop(frame: pd.DataFrame) -> Figure:
    """Test accuracy against density: right after pruning, and after training.

    Args:
        frame: rows of `drop`: run, level, density, pruned_test_acc, final_test_acc.
    """
    shown = {"final_test_acc": "after training", "pruned_test_acc": "right after pruning"}
    with plt.style.context(STYLE):
        figure, ax = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
        levels = frame.groupby("level")["density"].mean()
        for place, (column, label) in enumerate(shown.items()):
            line = over_repetitions(frame, column, ["level"])
            mean_line(ax, 100 * levels, line, label=label, **line_style(place))
        density_axis(ax, float(levels.min()))
        ax.set_ylabel("Test accuracy (%)")
        legend_beside(figure, ax, repetitions_note(line["seeds"], "run"))
    return figure


# --- barriers --------------------------------------------------------------------------------------------------------


def draw_barriers(frame: pd.DataFrame) -> Figure:
    """Error barrier against density where there are several levels; otherwise error and loss along the lines.

    Args:
        frame: rows of `utils.analysis.lines.measured`.

    Raises:
        ConfigError: too many lines for one figure.
    """
    return _against_density(frame) if frame["level"].nunique() > 1 else _along_lines(frame)


def _along_lines(frame: pd.DataFrame) -> Figure:
    found = list(frame.groupby(["a", "b"], sort=False))
    check_lines(len(found), FEWER)
    with plt.style.context(STYLE):
        figure, axes = plt.subplots(1, 2, figsize=(7.2, 3.2), layout="constrained")
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
    with plt.style.context(STYLE):
        figure, ax = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
        if len(levels) == 1:
            line = over_repetitions(found, "error_barrier", ["step"])
            mean_line(ax, line["step"], line, label=f"{100 * levels.iloc[0]:.3g}%", **line_style(0))
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
    found = barriers_of(frame)
    with plt.style.context(STYLE):
        figure, ax = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
        levels = found.groupby("level")["density"].mean()
        line = over_repetitions(found, "error_barrier", ["level"])
        mean_line(ax, 100 * levels, line, label="error barrier", **line_style(0))
        density_axis(ax, float(levels.min()))
        ax.set_ylabel("Error barrier (percentage points)")
        ax.set_ylim(bottom=0)
        legend_beside(figure, ax, repetitions_note(line["seeds"]))
    return figure
