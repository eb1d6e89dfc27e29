"""Look of all figures: colours, fonts, axes, lines with their bands.

Colours: those of Okabe & Ito (2008) that show on white, which people with the common kinds of colour blindness can tell
apart, plus one of Tol's colours and a violet. In greyscale, markers and dashes tell the lines apart.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")  # before pyplot: figures are written to files, without a display

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from utils.errors import ConfigError

# One per method of the grids in configs/grids.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#882255", "#9010E0"]
MARKERS = ["o", "s", "^", "D", "v", "P", "X", "<", ">"]
DASHES = ["-", "--"]  # of the first len(COLOURS) lines, and of the next ones
# More lines look alike, and the legend has no room for them.
MOST_LINES = len(COLOURS) * len(DASHES)
DENSE = "#767676"
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


def line_style(place: int) -> dict[str, str]:
    """Style of line number `place`, below MOST_LINES. When colours repeat, markers and dashes change."""
    lap, colour = divmod(place, len(COLOURS))
    marker = MARKERS[(place + lap) % len(MARKERS)]
    return {"color": COLOURS[colour], "marker": marker, "linestyle": DASHES[lap]}


def legend_beside(figure: Figure, ax: Axes, title: str) -> None:
    """Legend of the lines of `ax`, right of all axes. Long labels widen the figure; the axes keep their width."""
    legend = figure.legend(
        *ax.get_legend_handles_labels(), loc="outside right center", alignment="left", handlelength=2.6, title=title
    )
    wider = legend.get_window_extent().width / figure.dpi - LEGEND_INCHES
    figure.set_figwidth(figure.get_figwidth() + max(0.0, wider))


def check_lines(number: int, narrow: str) -> None:
    """Raise ConfigError if there are too many lines for one figure.

    Args:
        narrow: how to ask for fewer, for the message.
    """
    if number > MOST_LINES:
        raise ConfigError(f"{number} lines are asked for, {MOST_LINES} at most can be told apart: {narrow}")


def density_axis(ax: Axes, sparsest: float) -> None:
    """Logarithmic x axis, densest left as in most pruning papers, with ticks at 1, 2 and 5 times powers of ten."""
    low = 100 * sparsest
    # Limits before the scale: a single point has no range for a logarithm.
    ax.set_xlim(100 * 1.08, low / 1.08 if low < 100 else 50)
    ax.set_xscale("log")
    percent_ticks(ax.xaxis, sparsest / 1.08)
    ax.set_xlabel("Density (% of prunable weights kept)")


def percent_ticks(axis: Axis, least: float) -> None:
    """Ticks from the fraction `least` up to 1, in percent: tenths where there are few, powers of ten where too many."""
    ticks = [tick for tick in NICE if tick >= least]
    if len(ticks) < 3:
        ticks = [tenth / 10 for tenth in range(1, 11) if tenth / 10 >= least]
    if len(ticks) > 10:
        ticks = [tick for tick in ticks if f"{tick:e}"[0] == "1"]
    axis.set_major_locator(FixedLocator([100 * tick for tick in ticks]))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


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
    lowest = min(densities) if min(densities) < 1 else 0.5
    norm = matplotlib.colors.LogNorm(100 * lowest, 100)
    # viridis without its yellow end, which hardly shows on white.
    shades = matplotlib.colors.LinearSegmentedColormap.from_list("levels", plt.get_cmap("viridis")(np.linspace(0, 0.9)))
    bar = figure.colorbar(matplotlib.cm.ScalarMappable(norm, shades), ax=ax, pad=0.02)
    bar.set_label("Density of the network (%)")
    # Both ends, and the ticks well between them.
    between = [tick for tick in NICE if 1.2 * lowest < tick < 1 / 1.2]
    bar.set_ticks([100 * lowest, *(100 * tick for tick in between), 100])
    bar.minorticks_off()
    bar.formatter = FuncFormatter(lambda value, _: f"{value:.3g}")
    return [shades(norm(100 * d)) for d in densities]


def mean_line(ax: Axes, x: pd.Series, line: pd.DataFrame, **style: Any) -> None:
    """Mean and band over repetitions; a bar if the line is a single point.

    Args:
        line: mean, least, largest, and seeds: the number of repetitions behind each point.
    """
    ax.plot(x, line["mean"], markeredgecolor="white", markeredgewidth=0.4, **style)
    if len(line) == 1:
        ax.vlines(x, line["least"], line["largest"], color=style["color"], alpha=0.4, linewidth=2.5, zorder=1)
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
