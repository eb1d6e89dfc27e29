"""Look of all figures: fonts, axes and their ticks, legends, lines with their bands. Colours: colours.py."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from utils.errors import ConfigError
from utils.plots.colours import MOST_LINES
from utils.wording import percent_text

STYLE = {
    "font.size": 9, "axes.titlesize": 9, "axes.labelsize": 9, "xtick.labelsize": 8, "ytick.labelsize": 8,
    "legend.fontsize": 8, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "grid.color": "#E3E3E3", "grid.linewidth": 0.6, "axes.axisbelow": True, "lines.linewidth": 1.4,
    "lines.markersize": 4, "legend.frameon": False, "figure.dpi": 100, "savefig.dpi": 200,
    "pdf.fonttype": 42, "ps.fonttype": 42,  # TrueType: journals refuse Type 3
}  # fmt: skip
LEGEND_INCHES = 2.2  # enough for names of methods; a figure with longer labels is made wider
NAMED_LAYERS = 60  # more layers than this are numbered, not named
# Ticks of logarithmic axes, as fractions.
NICE = [m * 10.0**d for d in range(-9, 1) for m in (1, 2, 5)][:-2]


def legend_beside(figure: Figure, ax: Axes, title: str) -> None:
    """Legend of the lines of `ax`, right of all axes. Long labels widen the figure, many make it higher."""
    legend = figure.legend(
        *ax.get_legend_handles_labels(), loc="outside right center", alignment="left", handlelength=2.6, title=title
    )
    extent = legend.get_window_extent()
    figure.set_figwidth(figure.get_figwidth() + max(0.0, extent.width / figure.dpi - LEGEND_INCHES))
    figure.set_figheight(max(figure.get_figheight(), extent.height / figure.dpi + 0.2))


def check_lines(number: int, narrow: str) -> None:
    """Raise ConfigError if there are too many lines for one figure.

    Args:
        narrow: how to ask for fewer, for the message.
    """
    if number > MOST_LINES:
        raise ConfigError(f"{number} lines are asked for, {MOST_LINES} at most can be told apart: {narrow}")


def density_axis(ax: Axes, sparsest: float, most_right: float | None = None) -> None:
    """Logarithmic x axis, densest left as in most pruning papers, with ticks from 100% to the sparsest network.

    Args:
        sparsest: the lowest density, a fraction.
        most_right: where the point on the far right is drawn, a fraction; None = at `sparsest`.
    """
    least = sparsest if sparsest < 1 else 0.5
    # Limits before the scale: a single point has no range for a logarithm.
    ax.set_xlim(100 * 1.08, 100 * min(least, most_right or 1) / 1.08)
    ax.set_xscale("log")
    percent_ticks(ax.xaxis, least)
    ax.set_xlabel("Density (% of prunable weights kept)")


def percent_ticks(axis: Axis, least: float) -> None:
    """Ticks of a logarithmic axis, in percent, from the fraction `least` to 1."""
    axis.set_major_locator(FixedLocator([100 * tick for tick in spanning(least)]))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: percent_text(value / 100)))


def spanning(least: float, most: float = 1.0, apart: float = 0.07) -> list[float]:
    """Ticks from the fraction `least` to `most`, both included: round numbers between, tenths where there are few.

    Args:
        apart: least distance of the others from the ends, as a share of a logarithmic axis.
    """
    ticks = [tick for tick in NICE if least <= tick <= most]
    if len(ticks) < 3:
        ticks = max(ticks, [tenth / 10 for tenth in range(1, 11) if least <= tenth / 10 <= most], key=len)
    if len(ticks) > 10:
        ticks = [tick for tick in ticks if f"{tick:e}"[0] == "1"]
    gap = (most / least) ** apart
    return [least, *(tick for tick in ticks if least * gap < tick < most / gap), most]


def linear_ticks(ax: Axes) -> None:
    """Round ticks on the y axis, the outermost of them beyond all that is drawn."""
    low, high = ax.dataLim.intervaly
    if not low < high:
        return
    ticks = MaxNLocator(7, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
    ax.set_yticks(ticks)
    margin = 0.03 * (ticks[-1] - ticks[0])  # for markers on the outermost ticks
    ax.set_ylim(ticks[0] - margin, ticks[-1] + margin)


def log_ticks(ax: Axes) -> None:
    """A logarithmic y axis; ticks are round numbers, the outermost of them beyond all that is drawn."""
    values = np.concatenate([np.asarray(line.get_ydata(), dtype=float) for line in ax.lines])
    values = values[np.isfinite(values) & (values > 0)]
    if not len(values):  # nothing that a logarithmic axis can show
        return
    low, high = values.min(), values.max()
    if high < 3 * low:
        ticks = MaxNLocator(5).tick_values(low, high)
    else:
        exponents = range(math.floor(math.log10(low)), math.floor(math.log10(high)) + 2)
        nice = [factor * 10.0**exponent for exponent in exponents for factor in (1, 2, 5)]
        if len(nice) > 3 * 4:
            nice = nice[::3]
        ticks = nice[max(0, sum(tick <= low for tick in nice) - 1) : sum(tick < high for tick in nice) + 1]
    ticks = [tick for tick in ticks if tick > 0]
    ax.set_yscale("log")
    ax.set_ylim(ticks[0], ticks[-1] * 1.03)
    ax.yaxis.set_major_locator(FixedLocator(ticks))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))


def epoch_ticks(ax: Axes, first: int, last: int, logarithmic: bool = False) -> None:
    """Whole numbers on the x axis, from the first epoch that is drawn to the last."""
    if logarithmic:
        steps = [factor * 10**exponent for exponent in range(7) for factor in (1, 2, 5)]
        between = [epoch for epoch in steps if 1.3 * first < epoch < last / 1.3]
        ax.set_xscale("log")
        ax.set_xlim(first / 1.08, last * 1.08)
    else:
        step = next(
            factor * 10**exponent
            for exponent in range(7)
            for factor in (1, 2, 5)
            if factor * 10**exponent >= (last - first) / 6
        )
        between = [epoch for epoch in range(step, last, step) if first + 0.45 * step < epoch < last - 0.45 * step]
        margin = max(0.5, 0.03 * (last - first)) if last == first else 0.03 * (last - first)
        ax.set_xlim(first - margin, last + margin)
    ax.xaxis.set_major_locator(FixedLocator(sorted({first, *between, last})))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def seeds_note(seeds: Iterable[int], band: bool = True) -> str:
    """Head of the legend: what lines and bands show.

    Args:
        seeds: number of seeds behind each point that is drawn.
        band: whether the figure has bands.
    """
    counts = sorted(set(seeds))
    if counts == [1]:
        return "one seed"
    number = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return f"mean and range\nof {number} seeds" if band else f"mean of {number} seeds"


def level_colours(figure: Figure, ax: Axes | np.ndarray, densities: Sequence[float]) -> list[tuple[float, ...]]:
    """One colour per level, light for dense and dark for sparse; adds a colour bar of densities beside `ax`."""
    highest = max(densities)
    lowest = min(densities) if min(densities) < highest else highest / 2
    norm = matplotlib.colors.LogNorm(100 * lowest, 100 * highest)
    # viridis without its yellow end, which hardly shows on white.
    shades = matplotlib.colors.LinearSegmentedColormap.from_list(
        "levels", matplotlib.colormaps["viridis"](np.linspace(0, 0.9))
    )
    bar = figure.colorbar(matplotlib.cm.ScalarMappable(norm, shades), ax=ax, pad=0.02)
    bar.set_label("Density of the network (%)")
    bar.set_ticks([100 * tick for tick in spanning(lowest, highest, apart=0.05)])
    bar.minorticks_off()
    bar.formatter = FuncFormatter(lambda value, _: percent_text(value / 100))
    return [shades(norm(100 * d)) for d in densities]


def mean_line(ax: Axes, x: pd.Series, line: pd.DataFrame, **style: Any) -> None:
    """Mean and band over repetitions; a bar if the line is a single point.

    Args:
        line: mean, least, largest, and seeds: the number of repetitions behind each point.
    """
    ax.plot(x, line["mean"], **style)
    if len(line) == 1:
        ax.vlines(x, line["least"], line["largest"], color=style["color"], alpha=0.5, linewidth=2.5, zorder=1)
    elif (line["seeds"] > 1).any():
        ax.fill_between(x, line["least"], line["largest"], color=style["color"], alpha=0.18, linewidth=0)


def layer_ticks(ax: Axes, names: Sequence[str], note: str = "") -> None:
    """Names of the layers below the x axis, at 0, 1, 2, ...; only their numbers if there are too many.

    Args:
        note: added to the axis's title where layers are named.
    """
    if len(names) <= NAMED_LAYERS:
        labels = [name.removesuffix(".weight") for name in names]
        ax.set_xticks(range(len(names)), labels, rotation=90 if len(names) > 6 else 0)
        ax.set_xlabel("Layer, input to output" + note)
    else:
        ax.set_xlabel(f"Layer, 0 (input) to {len(names) - 1} (output)")


def layer_width(layers: int) -> float:
    """Width of a figure with that many layers on its x axis, in inches."""
    return max(6.4, min(12.0, 2.6 + 0.22 * layers))


def side_by_side(x: Sequence[pd.Series]) -> tuple[list[pd.Series], bool]:
    """Where to draw the points of each line: lone points at one density stand side by side, the first line left.

    Args:
        x: densities of each line.

    Returns:
        The places, in the unit of `x`, and whether any differs from it. A step is a fiftieth of the axis.
    """
    alone = sorted((float(np.log(own.iloc[0])), place) for place, own in enumerate(x) if len(own) == 1)
    logs = np.log(np.concatenate([own.to_numpy(dtype=float) for own in x]))
    step = max(0.01, 0.024 * (max(logs.max(), math.log(100)) - logs.min()))
    clusters: list[list[int]] = []
    for number, (at, place) in enumerate(alone):
        if number and at - alone[number - 1][0] < step / 2:
            clusters[-1].append(place)
        else:
            clusters.append([place])
    drawn = list(x)
    for cluster in clusters:
        for number, place in enumerate(sorted(cluster)):
            drawn[place] = x[place] * math.exp(step * ((len(cluster) - 1) / 2 - number))
    return drawn, any(len(cluster) > 1 for cluster in clusters)
