"""What is known of each pruning method: one table, without torch.

A new method is a score function in utils/pruning/scores.py and one line in `METHODS`. utils/pruning_utils.py looks the
two functions up by name.
"""

from dataclasses import dataclass

NO_METHOD = "just dont"  # prune nothing: the original harness's word for it


@dataclass(frozen=True)
class Method:
    """A score, and an allocation that turns scores into masks.

    Attributes:
        title: its name in figures and tables.
        score: function of utils/pruning/scores.py.
        allocation: function of utils/pruning/allocation.py.
        source: the paper.
        needs_batches: it looks at training batches.
        in_rounds: it scores and prunes again, ``prune_params.synflow_rounds`` times.
        per_layer: each layer keeps a number of weights of its own, at least one.
    """

    title: str
    score: str
    allocation: str
    source: str
    needs_batches: bool = False
    in_rounds: bool = False
    per_layer: bool = False


_ER = "Evci et al. 2020, Gadhikar et al. 2023"

METHODS: dict[str, Method] = {
    "mag": Method("Magnitude", "mag_scores", "global_top_k", "Frankle & Carbin 2019"),
    "snip": Method("SNIP", "snip_scores", "global_top_k", "Lee et al. 2019", needs_batches=True),
    "synflow": Method(
        "SynFlow", "synflow_scores", "global_top_k", "Tanaka et al. 2020", needs_batches=True, in_rounds=True
    ),
    "grasp": Method("GraSP", "grasp_scores", "global_top_k", "Wang et al. 2020", needs_batches=True),
    "random": Method("Random", "random_scores", "global_top_k", "uniform over all weights"),
    "random_erk": Method("Random ERK", "random_scores", "erk", _ER, per_layer=True),
    "random_balanced": Method("Random balanced", "random_scores", "balanced", "Gadhikar et al. 2023", per_layer=True),
    # The same two, by the names under which they prune at initialization.
    "er_erk": Method("ERK", "random_scores", "erk", _ER, per_layer=True),
    "er_balanced": Method("Balanced", "random_scores", "balanced", "Gadhikar et al. 2023", per_layer=True),
}
