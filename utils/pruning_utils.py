"""Pruning: a criterion scores the weights, an allocation turns scores into masks, and `prune` sets the masks.

A new criterion is one function in utils/pruning/scores.py and one line in `METHODS` (utils/pruning/methods.py). Only
`prune` changes masks.

    insert_masks(model)                                 # utils.conv_type
    keep_masked(optimizer, model)                       # or the optimizer brings pruned weights back
    prune(model, "snip", 0.1, batches=[(inputs, labels)])
"""

import difflib
from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from types import ModuleType

import torch
from torch import Tensor, nn

from utils.conv_type import apply_masks, density_of, kept_counts, masked_params
from utils.output import warn
from utils.pruning import allocation
from utils.pruning import scores as score_functions
from utils.pruning.allocation import Allocation, best_of, global_top_k_alive, keep_count, per_layer, round_counts
from utils.pruning.methods import METHODS, Method
from utils.pruning.scores import SYNFLOW_ROUNDS, Batches, Inputs, Scores, random_scores, scoring


@dataclass(frozen=True)
class Criterion:
    """A `Method` with its functions.

    Attributes:
        score: the score of each weight; the largest stay.
        allocate: turns scores into masks.
    """

    method: Method
    score: Scores
    allocate: Allocation


class _Criteria(Mapping[str, Criterion]):
    """The lines of `METHODS`, those of plugins included, with their functions."""

    def __getitem__(self, name: str) -> Criterion:
        method = METHODS[name]
        score = _function(name, "score", method.score, score_functions)
        return Criterion(method, score, _function(name, "allocation", method.allocation, allocation))

    def __iter__(self) -> Iterator[str]:
        return iter(METHODS)

    def __len__(self) -> int:
        return len(METHODS)


def _function(name: str, key: str, given: str | Callable, module: ModuleType) -> Callable:
    """The function that a line of `METHODS` has itself, or names.

    Raises:
        ValueError: there is none of this name.
    """
    found = given if callable(given) else getattr(module, given, None)
    if found is None:
        raise ValueError(f"criterion {name}: {key} {given!r} is no function of {module.__name__}")
    return found


CRITERIA: MutableMapping[str, Criterion] = ChainMap({}, _Criteria())  # type: ignore[arg-type]


def prune(
    model: nn.Module,
    method: str,
    density: float,
    batches: Batches | None = None,
    generator: torch.Generator | None = None,
    *,
    rounds: int = SYNFLOW_ROUNDS,
    dtype: torch.dtype | None = None,
    shares: Sequence[int] | None = None,
    invert_scores: bool = False,
) -> float:
    """Prunes `model` to `density`, changing masks in place and zeroing the weights that go.

    Exactly ``max(1, floor(density * N + 0.5))`` of the N weights under masks stay. Masks only lose ones, and they
    change together at the very end: a call that raises leaves the model as it was. Nothing else ever changes: kept
    weights, biases, BN statistics, train/eval modes, gradients and the global random states stay as they are.

    Args:
        method: a key of `CRITERIA`.
        density: fraction to keep, in (0, 1], of all weights under masks (not of those that are left).
        batches: re-iterable of (images (N, C, H, W) or tokens (N, T), labels (N,)) on the model's device. snip and
            grasp use all of it, synflow only the shape of the first images (of tokens: the first).
        generator: for the random methods; one number is drawn from it. None: a new one with torch's initial seed.
        rounds: synflow only: number of rounds of scoring and pruning; the densities are those of `round_counts`.
        shares: weights that each layer keeps, `density` in all, in place of the method's allocation; not in rounds.
        invert_scores: keep the lowest scores (an ablation, Frankle et al. 2021); no effect on the random methods.
        dtype: snip and grasp only: torch.float32 or float64 to compute in. None: the weights' own, at least float32.

    Returns:
        the density achieved.

    Raises:
        ValueError: an unknown method; no masks; batches missing or not pairs of tensors; a density outside (0, 1],
            above what is left or too low for a weight per layer; no logits; a score that is not finite; a DTensor.
    """
    criterion = _criterion(method, batches, invert_scores, shares)
    inputs = Inputs(() if batches is None else batches, generator, dtype, rounds)
    masks = [mask for _, _, mask in masked_params(model)]
    keep = _checked_keep(method, density, masks)
    apply_masks(model)  # criteria score the weights as they are: pruned ones must be zero
    try:
        total = sum(mask.numel() for mask in masks)
        counts = round_counts(density, density_of(masks), total, rounds) if criterion.method.in_rounds else [keep]
        chosen = _choose(model, masks, counts, criterion, inputs)
    except ValueError as error:
        raise ValueError(f"{method} to density {density:g}: {error}") from error
    _set_masks(model, masks, chosen)
    _warn_of_dead_layers(model, f"{method} to density {density:g}")
    return density_of(masks)


def _set_masks(model: nn.Module, masks: Sequence[Tensor], chosen: Sequence[Tensor]) -> None:
    for mask, new in zip(masks, chosen):
        mask.copy_(new)
    apply_masks(model)


def _warn_of_dead_layers(model: nn.Module, what: str) -> None:
    if dead := dead_layers(model):
        warn(f"dead network: {what} leaves no weight in {', '.join(dead)}")


def unreachable(model: nn.Module, method: str, density: float) -> str:
    """Why `method` cannot prune a network without dead layers to `density`; empty if it can."""
    masks = [mask for _, _, mask in masked_params(model)]
    keep = keep_count(density, sum(mask.numel() for mask in masks))
    if method in METHODS and METHODS[method].per_layer and keep < len(masks):
        return f"{method} keeps at least one weight in each of {len(masks)} layers; density {density:.2e} keeps {keep}"
    return ""


def dead_layers(model: nn.Module) -> list[str]:
    """Names of the masked parameters that have no weight left."""
    entries = list(masked_params(model))
    kept = kept_counts([mask for _, _, mask in entries])
    return [name for (name, _, _), count in zip(entries, kept) if count == 0]


def _criterion(method: str, batches: Batches | None, invert_scores: bool, shares: Sequence[int] | None) -> Criterion:
    """The criterion by its name, its scores inverted and its allocation given if asked for, its inputs checked."""
    if method not in CRITERIA:
        nearest = difflib.get_close_matches(method, CRITERIA, n=len(CRITERIA), cutoff=0.0)
        raise ValueError(
            f"prune_params.prune_method / er_method: {method!r} is not allowed: choose from {', '.join(nearest)}"
        )
    criterion = CRITERIA[method]
    if criterion.method.needs_batches and batches is None:
        raise ValueError(f"{method} needs batches of (images, labels), and got none")
    if shares is not None:
        assert not criterion.method.in_rounds
        criterion = replace(criterion, allocate=lambda scores, masks, _keep: per_layer(scores, masks, shares))
    return replace(criterion, score=_inverted(criterion.score)) if invert_scores else criterion


def _inverted(score: Scores) -> Scores:
    """The negative scores: the largest of them are the lowest ones. Random scores stay as they are."""
    if score is random_scores:
        return score
    return lambda model, masks, inputs: [-values for values in score(model, masks, inputs)]


def _checked_keep(method: str, density: float, masks: Sequence[Tensor]) -> int:
    """Number of weights to keep, after checking that enough are left."""
    if not masks:
        raise ValueError("the model has no masks: call insert_masks first")
    if not 0.0 < density <= 1.0:
        raise ValueError(f"{method} to density {density}: not allowed: above 0 and at most 1")
    total, left = sum(mask.numel() for mask in masks), sum(kept_counts(masks))
    keep = keep_count(density, total)
    if keep > left:
        raise ValueError(
            f"{method} to density {density:g}: it would keep {keep} of {total} weights, but only {left} are left "
            f"(density {left / total:g}), and pruned weights never come back"
        )
    return keep


def _choose(
    model: nn.Module, masks: Sequence[Tensor], counts: Sequence[int], criterion: Criterion, inputs: Inputs
) -> Sequence[Tensor]:
    """New masks with ``counts[-1]`` ones; `counts` is the number of weights left after each round."""
    keep = counts[-1]
    if keep == sum(kept_counts(masks)):
        return masks  # nothing to prune, nothing to score
    with scoring(model):
        if criterion.method.in_rounds:
            return _in_rounds(model, masks, counts, criterion, inputs)
        scores = _scored(model, masks, criterion, inputs)
        chosen = criterion.allocate(scores, masks, keep)
        if criterion.score is not random_scores:
            _warn_of_ties_at_zero(scores, masks, chosen)
        return chosen


def _in_rounds(
    model: nn.Module, masks: Sequence[Tensor], counts: Sequence[int], criterion: Criterion, inputs: Inputs
) -> Sequence[Tensor]:
    """Score and prune once per entry of `counts` (Tanaka et al. 2020, algorithm 1).

    The paper shows that no layer collapses while others have weights. That holds for chains of layers. In residual
    networks the flow has another path around shortcuts and bottlenecks, and those do die. At the end each dead layer
    regains its best weight; the worst kept weight goes. So the rounds are the paper's, and the result differs from it
    by one weight per dead layer. A round that cuts all flow, so that every score is zero, is repeated with the best
    weight of each layer kept.
    """
    # One batch is enough for its shape; a DataLoader would start its workers again for every round.
    inputs = replace(inputs, batches=list(islice(inputs.batches, 1)))
    left, keep = sum(kept_counts(masks)), counts[-1]
    lost: dict[int, Tensor] = {}  # by dead layer: a mask of the best weight of its last round
    before_death = None
    for aim in counts:
        if aim == left:
            continue
        scores = _scored(model, masks, criterion, inputs)
        if before_death is not None and not any(score.any() for score in scores):
            masks = global_top_k_alive(*before_death, left)
            lost = {layer: best for layer, best in lost.items() if not masks[layer].any()}
            scores = _scored(model, masks, criterion, inputs)
        before, masks, left = masks, criterion.allocate(scores, masks, aim), aim
        dying = [n for n, (was, now) in enumerate(zip(kept_counts(before), kept_counts(masks))) if was and not now]
        lost |= {layer: best_of(scores[layer], before[layer]) for layer in dying}
        before_death = (scores, before) if dying else None
        if aim == keep:
            if lost:
                candidates = [mask | lost[n] if n in lost else mask for n, mask in enumerate(before)]
                masks = global_top_k_alive(scores, candidates, keep)
            _warn_of_ties_at_zero(scores, before, masks)
            break
    return masks


def _scored(model: nn.Module, masks: Sequence[Tensor], criterion: Criterion, inputs: Inputs) -> list[Tensor]:
    scores = criterion.score(model, masks, inputs)
    shapes, expected = ([tuple(tensor.shape) for tensor in tensors] for tensors in (scores, masks))
    if shapes != expected:  # of a plugin's
        raise ValueError(f"scores of shapes {shapes} for weights of shapes {expected}, in the order of masked_params")
    _check_finite(model, scores, masks)
    return scores


def _check_finite(model: nn.Module, scores: Sequence[Tensor], masks: Sequence[Tensor]) -> None:
    # Quick check: a sum is not finite if a score is not. Only if it fails, look at the kept weights alone: the score of
    # a pruned one does not matter, and the sum itself may overflow.
    sums = torch.stack([score.sum().double() for score in scores])
    for (name, _, _), score, mask, fine in zip(masked_params(model), scores, masks, sums.isfinite().tolist()):
        bad = 0 if fine else (~score[mask].isfinite()).count_nonzero().item()
        if bad:
            raise ValueError(f"scores are not finite in {name}: {bad} of {mask.count_nonzero().item()} weights")


def _warn_of_ties_at_zero(scores: Sequence[Tensor], before: Sequence[Tensor], after: Sequence[Tensor]) -> None:
    zeros = [mask & (score == 0) for score, mask in zip(scores, before)]
    stay = sum(kept_counts([zero & mask for zero, mask in zip(zeros, after)]))
    if 0 < stay < sum(kept_counts(zeros)):
        warn(
            f"{stay} of the {sum(kept_counts(after))} weights kept have score 0, as have weights that go: their "
            "position alone decided (no signal reaches them, or they are zero)"
        )
