"""What runs are, for the lines of a figure: runs that differ only in their seeds are repetitions of one line."""

from collections.abc import Sequence

import pandas as pd

from utils.analysis.sources import Source
from utils.plots.groups import labels_of
from utils.plots.runs import read_run
from utils.wording import percent_text

Recipe = tuple[str, float]  # (label, density that the run starts from)


def recipes(sources: Sequence[Source]) -> dict[str, Recipe]:
    """{name of a source: its recipe}; a checkpoint is a recipe of its own.

    Raises:
        DataError: a run does not say what it is.
    """
    if not sources[0].is_run:
        return {source.name: (source.name, 1.0) for source in sources}
    runs = [read_run(source.path, partial=True) for source in sources]
    return {source.name: (label, run.start) for source, run, label in zip(sources, runs, labels_of(runs), strict=True)}


def with_recipes(frame: pd.DataFrame, found: dict[str, Recipe]) -> pd.DataFrame:
    """The rows of runs (column run), with the columns ``recipe`` and ``start``: a line, and where on it it begins."""
    chosen = [found[name] for name in frame["run"]]
    return frame.assign(recipe=[label for label, _ in chosen], start=[start for _, start in chosen])


def with_pair_recipes(frame: pd.DataFrame, found: dict[str, Recipe]) -> pd.DataFrame:
    """As `with_recipes`, for the rows of pairs (columns a, b).

    Pairs of runs of one recipe are a line; so are those of two recipes, and of runs that start from two densities.
    """
    chosen = [_of_pair(found[a], found[b]) for a, b in zip(frame["a"], frame["b"])]
    return frame.assign(recipe=[label for label, _ in chosen], start=[start for _, start in chosen])


def _of_pair(a: Recipe, b: Recipe) -> Recipe:
    if a == b:
        return a
    (label_a, start_a), (label_b, start_b) = sorted((a, b))
    if start_a != start_b:
        label_a, label_b = f"{label_a} {percent_text(start_a)}%", f"{label_b} {percent_text(start_b)}%"
    return f"{label_a} with {label_b}", (start_a + start_b) / 2
