"""The table of pruning methods. Imports no torch.

To add a method, write a score function in utils/pruning/scores.py and one line in `METHODS`. utils/pruning_utils.py
finds the functions by their names. A plugin's line has the function itself.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

from utils.registry import Facts, Table

NO_METHOD = "just dont"  # prune nothing; the name that the original harness has for it


@dataclass(frozen=True)
class Method:
    """A score, and an allocation that turns scores into masks.

    Attributes:
        title: its name in figures and tables.
        score: name of a function of utils/pruning/scores.py, or a function as those: the largest scores are kept.
        allocation: name of a function of utils/pruning/allocation.py, or a function as those.
        source: the papers, as the table of methods in configs/README.md names them; "" if there is none.
        needs_batches: needs training batches.
        in_rounds: scores and prunes ``prune_params.synflow_rounds`` times.
        per_layer: sets the number of kept weights per layer, at least one.
    """

    title: str
    score: str | Callable[..., Any]
    allocation: str | Callable[..., Any] = "global_top_k"
    source: str = ""
    needs_batches: bool = False
    in_rounds: bool = False
    per_layer: bool = False


_ER = "Evci et al. 2020, Gadhikar et al. 2023"


def _stand_in(name: str, facts: Facts) -> Method:
    """A method of a saved run, as far as its facts are known."""
    return replace(Method(name, ""), **facts)


_LINES = {
    "mag": Method("Magnitude", "mag_scores", "global_top_k", "Frankle & Carbin 2019"),
    "snip": Method("SNIP", "snip_scores", "global_top_k", "Lee et al. 2019", needs_batches=True),
    "synflow": Method(
        "SynFlow", "synflow_scores", "global_top_k", "Tanaka et al. 2020", needs_batches=True, in_rounds=True
    ),
    "grasp": Method("GraSP", "grasp_scores", "global_top_k", "Wang et al. 2020", needs_batches=True),
    "random": Method("Random", "random_scores", "global_top_k", ""),
    "random_erk": Method("Random ERK", "random_scores", "erk", _ER, per_layer=True),
    "random_balanced": Method("Random balanced", "random_scores", "balanced", "Gadhikar et al. 2023", per_layer=True),
    # The same two, by their names as prune_params.er_method (pruning at initialization).
    "er_erk": Method("ERK", "random_scores", "erk", _ER, per_layer=True),
    "er_balanced": Method("Balanced", "random_scores", "balanced", "Gadhikar et al. 2023", per_layer=True),
}
METHODS: Table[Method] = Table("criterion", Method, _LINES, _stand_in)


def layer_wise() -> list[str]:
    """Methods that prune_params.scope can make layer-wise: those that share out no weights themselves, in one round."""
    return [name for name, method in METHODS.items() if not method.per_layer and not method.in_rounds]


class AtInitialization(Protocol):
    """The options of pruning at initialization, of section prune_params."""

    er_method: str
    er_init: float


def initial_density(prune_params: AtInitialization) -> float:
    """Density after pruning at initialization, 0 to 1; 1 without that pruning."""
    return prune_params.er_init if prune_params.er_method != NO_METHOD else 1.0


def levels_to_reach(target: float, start: float, prune_rate: float) -> int:
    """The fewest levels of which the last has at most the density `target`, up to rounding.

    Args:
        start: density of level 0.
    """
    steps = math.log(target / start) / math.log1p(-prune_rate)
    return 1 + max(0, math.ceil(steps - 1e-9))


def level_density(start: float, prune_rate: float, level: int) -> float:
    """Density of a level, pruned from the density `start` of level 0."""
    return start * (1 - prune_rate) ** level
