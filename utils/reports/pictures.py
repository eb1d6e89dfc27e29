"""The figures of a report: those of utils/plots as SVG, with the values that the page shows under the mouse."""

import base64
import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import matplotlib.style
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MultipleLocator

from utils.analysis.command import progress
from utils.errors import ConfigError, DataError
from utils.plots.figures import PANELS, draw_accuracy, draw_curves, draw_layers
from utils.plots.groups import Group
from utils.plots.lines import METRICS, chosen_levels, layer_frame, mean_density, points
from utils.reports.study import Study
from utils.wording import percent_text

# Names are text, not formulas: a "$" in a name stays one. Letters are drawn as shapes, as the reader may lack the font.
SVG = {"text.parse_math": False, "svg.fonttype": "path"}
SVG_DPI = 72  # of matplotlib's SVG, whatever is asked for
PIXELS_PER_INCH = 115
CURVE_SPOTS = 40  # values that a curve shows at most under the mouse

Spot = tuple[float, float, str]


@dataclass(frozen=True)
class Picture:
    """One figure.

    Attributes:
        name: what the page calls it where there are several.
        source: the SVG as a data URI; empty if it cannot be drawn.
        width: pixels, unless the window is narrower.
        spots: (x, y, text) of each point: its place as fractions of width and height from the top left corner, and
            its values in words.
        problem: why it cannot be drawn.
    """

    name: str
    source: str = ""
    width: int = 0
    spots: Sequence[Spot] = ()
    problem: str = ""


@dataclass(frozen=True)
class Plan:
    """A picture to draw. `draw` gives the figure; `describe`, called once it is laid out, its spots."""

    name: str
    draw: Callable[[], Figure]
    describe: Callable[[Figure], Iterable[Spot]]

    def picture(self) -> Picture:
        """Draw it. A figure that these runs do not allow becomes a picture that says why."""
        with matplotlib.style.context(SVG):
            try:
                figure = self.draw()
            except (ConfigError, DataError) as error:
                return Picture(self.name, problem=str(error))
            figure.set_dpi(SVG_DPI)
            buffer = io.BytesIO()
            figure.savefig(buffer, format="svg", metadata={"Date": None})
            source = "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()
            width = round(PIXELS_PER_INCH * figure.get_figwidth())
            return Picture(self.name, source, width, list(self.describe(figure)))


def draw(plans: Sequence[Plan], what: str) -> list[Picture]:
    """The pictures, with a progress bar that says `what` they show."""
    return [plan.picture() for plan in progress(plans, len(plans), f"figures: {what}")]


def _xy(line: Line2D) -> np.ndarray:
    """The points of a line as it is drawn: (n, 2), in the units of its axes."""
    return np.column_stack([line.get_xdata(), line.get_ydata()]).astype(float)


def _spots(figure: Figure, ax: Axes, xy: np.ndarray, texts: Sequence[str]) -> Iterator[Spot]:
    """A spot at each of the points that lies within the axes."""
    inside = ax.bbox.padded(2)
    for (x, y), text in zip(ax.transData.transform(xy), texts, strict=True):
        if inside.contains(x, y):  # not-a-number is nowhere
            yield round(x / figure.bbox.width, 4), round(1 - y / figure.bbox.height, 4), text


# --- accuracy against density ----------------------------------------------------------------------------------------


def accuracy_plans(study: Study) -> list[Plan]:
    """Accuracy against density, with a logarithmic and with a linear axis."""
    metric = next(name for name, (column, _) in METRICS.items() if column == study.column)

    def logarithmic() -> Figure:
        return draw_accuracy(study.methods, metric)

    def linear() -> Figure:
        figure = logarithmic()
        _linear_axis(figure.axes[0])
        return figure

    def describe(figure: Figure) -> Iterator[Spot]:
        for group, line in zip(study.methods, figure.axes[0].lines):
            yield from _spots(figure, figure.axes[0], _xy(line), _accuracy_texts(group, study.column))

    return [Plan("logarithmic density axis", logarithmic, describe), Plan("linear density axis", linear, describe)]


def _linear_axis(ax: Axes) -> None:
    ax.set_xscale("linear")
    ax.set_xlim(102, -1)
    ax.xaxis.set_major_locator(MultipleLocator(20))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _accuracy_texts(group: Group, column: str) -> list[str]:
    texts = []
    for point in points(group, column).to_dict("records"):
        text = f"{group.label}\n{100 * point['density']:.3g}% kept: {point['mean']:.2f}%"
        if point["seeds"] > 1:
            text += f" ({point['least']:.2f} to {point['largest']:.2f}, {point['seeds']} seeds)"
        texts.append(text)
    return texts


# --- layers and curves -----------------------------------------------------------------------------------------------


def layer_plans(study: Study) -> list[Plan]:
    """Density of each layer: of all methods at each compared density, and of each method at every level."""

    def plan(name: str, groups: Sequence[Group], density: float | None) -> Plan:
        def describe(figure: Figure) -> Iterator[Spot]:
            names = _line_names(groups, density)
            layers = list(layer_frame(groups[0]).columns)
            return _layer_spots(figure, names, layers)

        return Plan(name, lambda: draw_layers(groups, density), describe)

    return _plans(study, plan)


def _layer_spots(figure: Figure, names: Sequence[str], layers: Sequence[str]) -> Iterator[Spot]:
    """Crosses are the layers without a weight left of the line before them."""
    ax, remaining, name = figure.axes[0], iter(names), ""
    for line in ax.lines:
        dead = line.get_marker() == "x"
        name = name if dead else next(remaining)
        xy = _xy(line)
        texts = [f"{name}\n{layers[int(x)]}: {'no weight left' if dead else f'{y:.3g}% kept'}" for x, y in xy]
        yield from _spots(figure, ax, xy, texts)


def curve_plans(study: Study) -> list[Plan]:
    """Loss and accuracy by epoch: of all methods at each compared density, and of each method at every level."""

    def plan(name: str, groups: Sequence[Group], density: float | None) -> Plan:
        return Plan(
            name,
            lambda: draw_curves(groups, density=density),
            lambda figure: _curve_spots(figure, _line_names(groups, density)),
        )

    return _plans(study, plan)


def _curve_spots(figure: Figure, names: Sequence[str]) -> Iterator[Spot]:
    for ax, (_, label) in zip(figure.axes, PANELS):
        for line, name in zip(ax.lines, names):
            xy = _xy(line)
            xy = xy[::-1][:: -(-len(xy) // CURVE_SPOTS) or 1]  # from the end: the last epoch counts most
            texts = [f"{name}\nepoch {epoch:g}: {label.lower()} {value:.4g}" for epoch, value in xy]
            yield from _spots(figure, ax, xy, texts)


def _line_names(groups: Sequence[Group], density: float | None) -> list[str]:
    lines = chosen_levels(groups, density)
    return [f"{group.label}, level {level} ({100 * mean_density(group, level):.3g}%)" for group, level in lines]


def _plans(study: Study, plan: Callable[[str, Sequence[Group], float | None], Plan]) -> list[Plan]:
    several = len({group.label for group in study.networks}) > 1
    at = study.densities if several or not study.deep else []
    plans = [plan(f"all methods near {100 * density:.3g}%", study.networks, density) for density in at]
    return plans + [plan(f"{group.label}: every level", [group], None) for group in study.deep]


def points_table(study: Study) -> pd.DataFrame:
    """The points of accuracy against density, as text."""
    parts = [points(group, study.column).assign(method=group.label) for group in study.methods]
    frame = pd.concat(parts)
    shown = {"method": frame["method"], "density (%)": [percent_text(density, 4) for density in frame["density"]]}
    for column, name in {"mean": "accuracy (%)", "least": "lowest seed", "largest": "highest seed"}.items():
        shown[name] = [f"{value:.2f}" for value in frame[column]]
    return pd.DataFrame({**shown, "seeds": frame["seeds"].astype(str)})
