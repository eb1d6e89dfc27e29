"""What papers published: the rows of configs/papers/published.csv, each with the config of its experiment.

A row's experiment is the file ``configs/papers/<config>.yaml`` with the row's ``options`` added, as on the command line
of harness.py. ``ticket_params.source`` stands there for a run of the same experiment without a ticket. The density is
a column of its own: it is that of a level, or of a run pruned once.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from harness_params import load_config
from utils.data.specs import DATASETS
from utils.plots.names import effective_options, method_name

PAPERS = Path(__file__).parents[2] / "configs" / "papers"
PUBLISHED = PAPERS / "published.csv"
COLUMNS = (
    "paper", "config", "setting", "method", "options", "density", "figure", "value", "spread", "n", "at", "source",
)  # fmt: skip
ACCURACY = "accuracy"  # percent; every other figure is a difference to another method's accuracy, in points
OVER = "over "  # before that method's name
# A difference of which only the sign is published, and one that a paper calls none.
SIGNS = {"<0": "below", "0": "as", ">0": "above"}


@dataclass(frozen=True)
class PublishedFigure:
    """One row.

    Attributes:
        figure: `ACCURACY`, or `OVER` and a method.
        density: 0..1.
        value: percent or points, or one of `SIGNS`.
        spread, n: as published; "" = not stated.
        at: epoch of a level that the accuracy is of; "" = not stated.
        source: where it was read.
    """

    figure: str
    density: float
    value: str
    spread: str
    n: str
    at: str
    source: str


@dataclass(frozen=True)
class Experiment:
    """A paper's config with the options of one of its settings and methods.

    Attributes:
        place: of its first row in the file.
        paper, config, setting, method: as in the file.
        words: the options on the command line.
        model: name of the network.
        name: of its method, as figures name it.
        options: as `effective_options`.
        images: (training, test) images of its data set, those held out included; None if the files decide.
        figures: its rows.
    """

    place: int
    paper: str
    config: str
    setting: str
    method: str
    words: tuple[str, ...]
    model: str
    name: str
    options: dict[str, Any]
    images: tuple[int, int] | None
    figures: list[PublishedFigure] = field(default_factory=list)


def read_published(configs: Sequence[str] = ()) -> list[Experiment]:
    """The experiments in the order of the file.

    Args:
        configs: only those of these configs; all if there are none.
    """
    table = pd.read_csv(PUBLISHED, dtype=str, keep_default_na=False)
    found: dict[tuple[str, ...], Experiment] = {}
    for place, row in enumerate(table.to_dict("records")):
        if configs and row["config"] not in configs:
            continue
        key = (row["config"], row["setting"], row["method"])
        if key not in found:
            found[key] = _experiment(place, row["paper"], *key, tuple(row["options"].split()))
        found[key].figures.append(
            PublishedFigure(
                row["figure"], float(row["density"]), row["value"], row["spread"], row["n"], row["at"], row["source"]
            )
        )
    return list(found.values())


def published_configs() -> list[str]:
    """The configs that `published.csv` has figures of."""
    return list(dict.fromkeys(pd.read_csv(PUBLISHED, dtype=str)["config"]))


def _experiment(place: int, paper: str, config: str, setting: str, method: str, words: tuple[str, ...]) -> Experiment:
    file = ["--config", str(PAPERS / f"{config}.yaml")]
    cfg = load_config([*file, *words])
    ticket = None
    if cfg.ticket_params.source:  # as a run notes it: see utils/runs/tickets.py
        own = ("--ticket_params.", "--prune_params.num_levels=")
        source = load_config([*file, *(word for word in words if not word.startswith(own))])
        t = cfg.ticket_params
        weights = "init" if t.weights == "auto" else t.weights
        ticket = {"level": t.level, "step": t.step, "mask": t.mask, "weights": weights, "options": source.to_dict()}
    return Experiment(
        place, paper, config, setting, method, words, cfg.model_params.model_name, method_name(cfg, ticket),
        effective_options(cfg, ticket), DATASETS[cfg.dataset.dataset_name].images,
    )  # fmt: skip
