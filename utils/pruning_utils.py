"""Pruning: a criterion scores the weights, an allocation turns scores into masks, and `prune` changes the masks."""

import difflib
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from utils.allocation import Allocation, global_top_k, keep_count, kept_counts
from utils.conv_type import apply_masks, masked_params

log = logging.getLogger(__name__)


def mag_scores(model: nn.Module) -> list[Tensor]:
    """|w| (Frankle & Carbin 2019)."""
    return [param.detach().abs() for _, param, _ in masked_params(model)]


@dataclass(frozen=True)
class Criterion:
    score: Callable[[nn.Module], list[Tensor]]
    allocate: Allocation
    source: str


CRITERIA: dict[str, Criterion] = {
    "mag": Criterion(mag_scores, global_top_k, "Frankle & Carbin 2019"),
}


def dead_layers(model: nn.Module) -> list[str]:
    """Names of the masked parameters that have no weight left."""
    entries = list(masked_params(model))
    return [name for (name, _, _), kept in zip(entries, kept_counts([mask for _, _, mask in entries])) if kept == 0]


def prune(
    model: nn.Module,
    method: str,
    density: float,
    batches: Iterable[tuple[Tensor, Tensor]] | None = None,
    generator: torch.Generator | None = None,
) -> float:
    """Prunes `model` to `density` (kept weights over all maskable weights) and returns the density achieved."""
    if method not in CRITERIA:
        near = difflib.get_close_matches(method, CRITERIA, n=len(CRITERIA), cutoff=0.0)
        raise ValueError(f"prune_params.prune_method: {method!r} is not allowed: choose from {', '.join(near)}")
    entries = list(masked_params(model))
    masks = [mask for _, _, mask in entries]
    total = sum(mask.numel() for mask in masks)
    criterion = CRITERIA[method]
    new = criterion.allocate(criterion.score(model), masks, keep_count(density, total))
    for mask, chosen in zip(masks, new):
        mask.copy_(chosen)
    apply_masks(model)
    return sum(kept_counts(masks)) / total
