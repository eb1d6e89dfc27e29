"""Barriers of pairs of networks: each pair's line measured on one bench, as rows; and one row per pair from them."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import pandas as pd

from utils.analysis.barrier import PlaceOnLine, State, along_line, alphas, barrier, with_masks
from utils.analysis.command import progress_bar
from utils.analysis.networks import Bench
from utils.analysis.sources import Pair
from utils.conv_type import density_of
from utils.runs.loading import masks_in
from utils.runs.tables import Row
from utils.state_dicts import check_weights

PAIR_COLUMNS = ["a", "b", "level"]


@dataclass(frozen=True)
class LineOptions:
    """How a line is measured.

    Attributes:
        points: on the line, both ends included.
        split: test or train, the images of loss and error.
        batchnorm: recompute or interpolate the statistics.
        batchnorm_images: training images to recompute them on; 0 = all.
        union: masks may differ; what either keeps is kept.
    """

    points: int = 31
    split: str = "test"
    batchnorm: str = "recompute"
    batchnorm_images: int = 10_000
    union: bool = False


def measured(bench: Bench, pairs: Callable[[], Iterator[Pair]], count: int, options: LineOptions) -> list[Row]:
    """A row per point of each pair's line: a, b, level, density, alpha, loss, error, loss_barrier, error_barrier.

    Args:
        pairs: gives the pairs, from their files: once to check all of them, since to measure one may take long, and
            once to measure them.
        count: how many they are.

    Raises:
        RunError: a state is another network's.
        DataError: the masks of a pair differ, without ``union``.
    """
    for pair in pairs():
        _checked(bench, pair, options)
    statistics = bench.images("train", options.batchnorm_images) if options.batchnorm == "recompute" else None
    images, places = bench.images(options.split), alphas(options.points)
    rows: list[Row] = []
    with progress_bar(count * len(places), "points") as bar:
        for pair in pairs():
            states = _checked(bench, pair, options)
            line = []
            for point in along_line(bench.model, *states, places, images, statistics):
                line.append(point)
                bar.update()
            rows += _rows(pair, density_of(list(masks_in(states[0], pair.names[0]).values())), line)
    return rows


def _checked(bench: Bench, pair: Pair, options: LineOptions) -> tuple[State, State]:
    for state, label in zip(pair.states, pair.labels):
        check_weights(bench.model, state, label)
    return with_masks(*pair.states, pair.labels, options.union)


def _rows(pair: Pair, density: float, line: Sequence[PlaceOnLine]) -> list[Row]:
    first = {"a": pair.names[0], "b": pair.names[1], "level": pair.level, "density": density}
    last = {
        "loss_barrier": barrier([point.loss for point in line]),
        "error_barrier": barrier([point.error for point in line]),
    }
    return [{**first, "alpha": point.alpha, "loss": point.loss, "error": point.error, **last} for point in line]


def barriers_of(frame: pd.DataFrame, more: Sequence[str] = ()) -> pd.DataFrame:
    """One row per pair and level of the rows of `measured`: its barriers, the errors of its ends and the highest one.

    Args:
        more: further columns that tell pairs apart.
    """
    found = []
    keys = [*more, *PAIR_COLUMNS]
    for _, line in frame.groupby(keys, sort=False):
        row = line.iloc[0][[*keys, "density", "error_barrier", "loss_barrier"]].to_dict()
        ends = {"error_a": line["error"].iloc[0], "error_b": line["error"].iloc[-1], "error_max": line["error"].max()}
        found.append(row | ends)
    return pd.DataFrame(found)
