"""Overlap of the masks of a report's networks, method by method, at the compared densities."""

import itertools
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from utils.analysis.command import progress
from utils.errors import DataError, RunError
from utils.plots.lines import chosen_levels, mean_density
from utils.reports.study import Study
from utils.runs.tables import Row
from utils.wording import percent_text

METHODS = operator.attrgetter("methods")
SEEDS = 3  # runs per method whose masks are compared


@dataclass(frozen=True)
class Network:
    """The network of a run that stands for its method at a density."""

    method: int  # place in `Overlaps.methods`
    path: Path  # of its run
    name: str
    level: int
    density: float


class Pair(NamedTuple):
    """Two networks, and the row of `overlap_rows` that is of all their layers."""

    a: Network
    b: Network
    whole: Row

    @property
    def methods(self) -> tuple[int, int]:
        """Places of the two methods in `Overlaps.methods`."""
        return self.a.method, self.b.method


@dataclass
class Overlaps:
    """Overlap at one density.

    Attributes:
        name: the density in words.
        methods: with the density of each one's networks.
        cells: per method one row of text, a cell for each method up to itself: mean intersection over union, and in
            brackets that of random masks with the same densities of layers. "" where no two networks are compared.
        notes: networks that could not be compared, and why.
    """

    name: str
    methods: list[str] = field(default_factory=list)
    cells: list[list[tuple[str, str]]] = field(default_factory=list)
    pairs: list[Pair] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def has_checkpoints(study: Study) -> bool:
    """Whether a run has the checkpoint of a level. Loads nothing."""
    return any(next((run.path / "checkpoints").glob("model_level_*.pt"), None) for run in study.runs)


def overlaps(study: Study) -> list[Overlaps]:
    """Overlap at each compared density: of every two runs, at most `SEEDS` per method, at the level closest to it."""
    return [_overlap_at(study, density) for density in study.densities]


def _overlap_at(study: Study, density: float) -> Overlaps:
    found = Overlaps(f"networks near {100 * density:.3g}%")
    networks = []
    for group, level in chosen_levels(study.networks, density):
        if mean_density(group, level) == 1:  # dense networks have everything in common
            continue
        runs = [run for run in group.runs if level < len(run.summary)]
        if len(runs) > SEEDS:
            found.notes.append(f"{group.label}: the first {SEEDS} of {len(runs)} runs")
        for run in runs[:SEEDS]:
            own = float(run.summary["density"].iloc[level])
            networks.append(Network(len(found.methods), run.path, study.names[run.path], level, own))
        found.methods.append(f"{group.label} ({100 * mean_density(group, level):.3g}%)")
    found.pairs = _compare(networks, found.notes)
    found.cells = _cells(found)
    return found


def _compare(networks: Sequence[Network], notes: list[str]) -> list[Pair]:
    """Every two networks; adds a note for each network without masks and each pair of different layers."""
    from utils.analysis.overlap import overlap_rows  # imports torch, which the rest of a report does not need
    from utils.runs.loading import level_checkpoint, masks_in, read_state

    masks = {}
    for network in progress(networks, len(networks), "checkpoints"):
        try:
            file = level_checkpoint(network.path, network.level)
            masks[network] = masks_in(read_state(file), str(file))
        except (DataError, RunError) as error:
            notes.append(str(error))
    found = []
    pairs = list(itertools.combinations(masks, 2))
    for a, b in progress(pairs, len(pairs), "pairs"):
        try:
            found.append(Pair(a, b, overlap_rows(masks[a], masks[b], (a.name, b.name))[0]))
        except DataError as error:
            notes.append(str(error))
    return found


def _cells(found: Overlaps) -> list[list[tuple[str, str]]]:
    """Text of the triangle of methods: mean IoU, and that of random masks, over the pairs of each two methods."""
    cells = [[("", "")] * (place + 1) for place in range(len(found.methods))]
    for (low, high), pairs in itertools.groupby(sorted(found.pairs, key=METHODS), key=METHODS):
        mean = pd.DataFrame([pair.whole for pair in pairs])[["iou", "layerwise_iou"]].mean()
        cells[high][low] = (f"{mean['iou']:.3f}", f"{mean['layerwise_iou']:.3f}")
    return cells


def pairs_table(found: Overlaps) -> pd.DataFrame:
    """The pairs as text."""
    rows = []
    for pair in found.pairs:
        names: dict[str, str] = {}
        for side, network in (("A", pair.a), ("B", pair.b)):
            names |= {side: network.name, f"level {side}": str(network.level)}
            names |= {f"density {side} (%)": percent_text(network.density, 4)}
        ious = {"IoU": "iou", "random in each layer": "layerwise_iou", "random": "random_iou"}
        rows.append({**names, **{name: f"{pair.whole[key]:.4f}" for name, key in ious.items()}})
    return pd.DataFrame(rows)
