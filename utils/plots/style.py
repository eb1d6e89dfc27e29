"""How the figures of utils/plots/figures.py look: colours, type, axes.

Colours are those of Okabe & Ito (2008) that show on white, told apart by the common kinds of colour blindness, with
one of Tol's and a violet added; markers and dashes tell the lines apart in grey.
"""

from collections.abc import Iterable, Sequence

import matplotlib
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

# As many as the grids in configs/grids have methods.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#882255", "#9010E0"]
MARKERS = ["o", "s", "^", "D", "v", "P", "X", "<", ">"]
DASHES = ["-", "--"]  # of the first lines, one a colour, and of the next ones
# More could not be told apart, nor does the legend have room for them.
MOST_LINES = len(COLOURS) * len(DASHES)
DENSE = "#767676"
STYLE = {
    "font.size": 9, "axes.titlesize": 9, "axes.labelsize": 9, "xtick.labelsize": 8, "ytick.labelsize": 8,
    "legend.fontsize": 8, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "grid.color": "#E3E3E3", "grid.linewidth": 0.6, "axes.axisbelow": True, "lines.linewidth": 1.4,
    "lines.markersize": 4, "legend.frameon": False, "figure.dpi": 100, "savefig.dpi": 200,
    "pdf.fonttype": 42, "ps.fonttype": 42,  # TrueType: journals refuse Type 3
}  # fmt: skip
LEGEND_INCHES = 2.2  # room for the names of methods alone; a figure with longer ones is made wider
# Ticks of logarithmic axes, as fractions.
NICE = [m * 10.0**d for d in range(-9, 1) for m in (1, 2, 5)][:-2]


def line_style(place: int) -> dict[str, str]:
    """Of a figure's line number `place`, below MOST_LINES: where colours begin again, markers and dashes change."""
    lap, colour = divmod(place, len(COLOURS))
    marker = MARKERS[(place + lap) % len(MARKERS)]
    return {"color": COLOURS[colour], "marker": marker, "linestyle": DASHES[lap]}


def legend_beside(figure: Figure, ax: Axes, title: str) -> None:
    """A legend of the lines of `ax`, right of all axes, which keep their width however long the names are."""
    legend = figure.legend(
        *ax.get_legend_handles_labels(), loc="outside right center", alignment="left", handlelength=2.6, title=title
    )
    wider = legend.get_window_extent().width / figure.dpi - LEGEND_INCHES
    figure.set_figwidth(figure.get_figwidth() + max(0.0, wider))


def check_lines(number: int, narrow: str) -> None:
    """Raises ValueError if they are too many for one figure; `narrow` says how to ask for fewer."""
    if number > MOST_LINES:
        raise ValueError(f"{number} lines are asked for, {MOST_LINES} at most can be told apart: {narrow}")


def density_axis(ax: Axes, sparsest: float) -> None:
    """Logarithmic, densest left as in most papers on pruning, ticks at 1, 2 and 5 times powers of ten."""
    low = 100 * sparsest
    ax.set_xlim(100 * 1.08, low / 1.08 if low < 100 else 50)  # first: a lone point has no range to be logarithmic in
    ax.set_xscale("log")
    percent_ticks(ax.xaxis, sparsest / 1.08)
    ax.set_xlabel("Density (% of prunable weights kept)")


def percent_ticks(axis: Axis, least: float) -> None:
    """Ticks from the fraction `least` up to 1, in percent; only powers of ten when the others get too many."""
    ticks = [tick for tick in NICE if tick >= least]
    if len(ticks) > 10:
        ticks = [tick for tick in ticks if f"{tick:e}"[0] == "1"]
    axis.set_major_locator(FixedLocator([100 * tick for tick in ticks]))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def seeds_told(seeds: Iterable[int], band: bool = True) -> str:
    """What lines, and bands if there are any, are, for the head of the legend; `seeds` of each point that is drawn."""
    counts = sorted(set(seeds))
    if counts == [1]:
        return "one seed"
    number = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return f"mean and range\nof {number} seeds" if band else f"mean of {number} seeds"


def level_colours(figure: Figure, ax: Axes, densities: Sequence[float]) -> list:
    """A colour a level, light for dense and dark for sparse, with a colour bar of densities."""
    lowest = min(densities) if min(densities) < 1 else 0.5
    norm = matplotlib.colors.LogNorm(100 * lowest, 100)
    # viridis from its dark end: its yellow end hardly shows on white.
    shades = matplotlib.colors.LinearSegmentedColormap.from_list("levels", plt.get_cmap("viridis")(np.linspace(0, 0.9)))
    bar = figure.colorbar(matplotlib.cm.ScalarMappable(norm, shades), ax=ax, pad=0.02)
    bar.set_label("Density of the network (%)")
    # The ends, and what lies well between them.
    between = [tick for tick in NICE if 1.2 * lowest < tick < 1 / 1.2]
    bar.set_ticks([100 * lowest, *(100 * tick for tick in between), 100])
    bar.minorticks_off()
    bar.formatter = FuncFormatter(lambda value, _: f"{value:.3g}")
    return [shades(norm(100 * d)) for d in densities]
