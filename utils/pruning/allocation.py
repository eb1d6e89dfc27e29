"""Allocation: pure functions from scores or layer shapes, and a number of weights to keep, to masks.

Every allocation takes ``(scores, masks, keep)``: one score tensor and one bool mask per layer, in model order, and the
number of weights to keep over all layers. It returns new masks with exactly `keep` ones in all, each a subset of the
old one, and changes none of its arguments.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from utils.conv_type import kept_counts

Allocation = Callable[[Sequence[Tensor], Sequence[Tensor], int], list[Tensor]]


def keep_count(density: float, total: int) -> int:
    """`density` of `total` weights as a number of weights: rounded half up, and at least one."""
    return max(1, math.floor(density * total + 0.5))


def round_counts(density: float, start: float, total: int, rounds: int) -> list[int]:
    """Number of weights left after each of `rounds` rounds of equal ratio (Tanaka et al. 2020, algorithm 1).

    Round i of R prunes ``int((1 - d_i) * total)`` of all weights, where ``d_i = start * (density / start) ** (i / R)``:
    the count of the authors' public code, to the weight, since SynFlow's masks depend on it. The last round leaves
    `keep_count` weights.

    Args:
        density: fraction of all weights to keep in the end, below `start`.
        start: fraction of all weights that is left now, in (0, 1].
        total: number of all weights.

    Returns:
        one count per round; the counts never rise.
    """
    keep, left = keep_count(density, total), round(start * total)
    densities = [start * (density / start) ** (i / rounds) for i in range(1, rounds)]
    return [min(left, max(keep, total - int((1 - d) * total))) for d in densities] + [keep]


# --- which weights: exact top-k --------------------------------------------------------------------------------------


def _kth_largest(scores: Sequence[Tensor], masks: Sequence[Tensor], room: Sequence[int], k: int) -> float:
    """The k-th largest score among the weights that are left. A Python float holds any float32 or 64 exactly."""
    flat = [(score.flatten(), mask.flatten()) for score, mask in zip(scores, masks)]
    if not scores[0].is_cpu:
        # Sort: kthvalue runs on a single block of a GPU and takes 20 times as long (pytorch issue 75599).
        return torch.cat([score[mask] for score, mask in flat]).sort().values[-k].item()
    # On a CPU numpy's vectorised selection works in place and is some eight times faster than kthvalue, which also
    # needs an int64 copy as large as two float32 models. One buffer, filled layer by layer, takes one copy's memory.
    values = np.empty(sum(room), dtype=np.result_type(*{score.numpy().dtype for score, _ in flat}))
    ends = np.cumsum(room)
    for (score, mask), end, count in zip(flat, ends, room):
        values[end - count : end] = score.numpy()[mask.numpy()]
    values.partition(len(values) - k)
    return float(values[-k])


@torch.no_grad()
def global_top_k(scores: Sequence[Tensor], masks: Sequence[Tensor], keep: int) -> list[Tensor]:
    """Keep the `keep` largest scores among the weights that are left, over all layers.

    One threshold for all layers. Exact also where scores tie: of equal scores at the threshold, the first in model
    order (lowest flat index) stay.

    Args:
        scores: float32 or wider, finite where the mask is one; elsewhere any values.

    Raises:
        ValueError: `keep` is below 0 or more than is left.
    """
    room = kept_counts(masks)
    if not 0 <= keep <= sum(room):
        raise ValueError(f"cannot keep {keep} of {sum(room)} weights")
    if keep == sum(room):
        return [mask.clone() for mask in masks]
    if keep == 0:
        return [torch.zeros_like(mask) for mask in masks]
    threshold = _kth_largest(scores, masks, room, keep)
    new = [(score >= threshold).logical_and_(mask) for score, mask in zip(scores, masks)]
    surplus = sum(kept_counts(new)) - keep
    for score, chosen in zip(reversed(scores), reversed(new)):
        if surplus == 0:
            break
        # nonzero() walks in flat index order whatever the memory layout (channels_last weights too).
        ties = (chosen & (score == threshold)).nonzero()[-surplus:]
        chosen[tuple(ties.T)] = False
        surplus -= len(ties)
    return new


def best_of(score: Tensor, mask: Tensor) -> Tensor:
    """A mask of one weight: that with the largest score where `mask` is one; of equal scores, the first."""
    place = torch.where(mask, score, -torch.inf).flatten().argmax()
    best = torch.zeros_like(mask)
    best[torch.unravel_index(place, mask.shape)] = True
    return best


@torch.no_grad()
def global_top_k_alive(scores: Sequence[Tensor], masks: Sequence[Tensor], keep: int) -> list[Tensor]:
    """`global_top_k`, except that a layer that would lose its last weight keeps the best one.

    Where no layer would die, or `keep` is smaller than the number of layers, the masks are those of `global_top_k`.
    Otherwise the best weight of every layer is set aside and the others compete for the rest, so the masks differ by at
    most one weight per dying layer.
    """
    new = global_top_k(scores, masks, keep)
    alive = [count > 0 for count in kept_counts(masks)]
    if keep < sum(alive) or not any(was and now == 0 for was, now in zip(alive, kept_counts(new))):
        return new
    best = [best_of(score, mask) if was else mask for score, mask, was in zip(scores, masks, alive)]
    rest = global_top_k(scores, [mask & ~chosen for mask, chosen in zip(masks, best)], keep - sum(alive))
    return [other | chosen for other, chosen in zip(rest, best)]


# --- how many weights per layer --------------------------------------------------------------------------------------


def share(quotas: Sequence[float], room: Sequence[int], keep: int) -> list[int]:
    """Distribute `keep` weights over layers in proportion to `quotas`, at most its `room` to each.

    The real-valued problem is ``n_l = min(room_l, e * quota_l)`` with the one e for which ``sum(n_l) = keep``. That is
    the papers' rule "a layer that would pass 1 is kept dense and the rest is solved again": solving for e, fixing the
    layers with ``e * quota_l > room_l`` at their room and solving again for the others only ever raises e, so the fixed
    layers stay fixed, and the loop ends at exactly this e.

    In whole numbers, ``n_l(e) = clamp(round(e * quota_l), 1, room_l)`` and e is raised until the sum is `keep` (the
    divisor method of Webster and Sainte-Lague). Each n_l only grows with e, hence with `keep`: the shares are monotone
    in density, which largest-remainder rounding of the real solution is not (the Alabama paradox). The sum is exact.
    Where several layers step up at the same e, the first in model order go first.

    Args:
        quotas: positive, one per layer.
        room: number of weights left, per layer. A layer without any gets none; any other gets at least one.

    Raises:
        ValueError: `keep` is more than all room, or less than one per layer.
    """
    alive = sum(has > 0 for has in room)
    if keep > sum(room):
        raise ValueError(f"cannot keep {keep} of {sum(room)} weights")
    if keep < alive:
        raise ValueError(f"{keep} weights are fewer than the {alive} layers, each of which must keep at least one")

    def counts(e: float) -> list[int]:
        return [min(max(math.floor(e * quota + 0.5), 1), has) for quota, has in zip(quotas, room)]

    low, high = 0.0, max(room) / min(quotas) + 1.0  # one weight per layer; every layer full
    if sum(counts(high)) == keep:
        return counts(high)
    while low < (middle := (low + high) / 2) < high:  # until low and high are neighbouring floats
        if sum(counts(middle)) <= keep:
            low = middle
        else:
            high = middle
    shares = counts(low)
    left = keep - sum(shares)
    for index, above in enumerate(counts(high)):
        step = min(left, above - shares[index])
        shares[index] += step
        left -= step
    assert left == 0 and all(0 <= n <= has for n, has in zip(shares, room))
    return shares


def erk_quotas(shapes: Sequence[Sequence[int]]) -> list[int]:
    """Number of weights per layer by Erdos-Renyi-Kernel (Evci et al. 2020), up to the common factor e.

    The paper sets a convolution's density to ``e * (n_in + n_out + k_h + k_w) / (n_in * n_out * k_h * k_w)`` and a
    linear layer's to ``e * (n_in + n_out) / (n_in * n_out)``. The denominator is the number of weights, so the number
    kept is e times the numerator: the sum of the weight's shape. For a grouped convolution n_in is the weight's own,
    in_channels / groups, as in the authors' code. An attention's packed in_proj is the linear layer it is: E to 3E.
    """
    return [sum(shape) for shape in shapes]


def layer_counts(
    rates: Sequence[float], totals: Sequence[int], left: Sequence[int], level: int, dense: bool
) -> list[int]:
    """Number of weights that each layer keeps at `level`, where each layer is pruned at a rate of its own.

    Args:
        rates: share of a layer's remaining weights that goes before each level, per layer.
        totals: number of all weights, per layer.
        left: number of weights left now, after the level before, per layer.
        dense: level 0 had all weights. Then a layer keeps ``(1 - rate)^level`` of all its weights, so that rounding
            does not add up over the levels; otherwise ``1 - rate`` of those that are left.

    Returns:
        one count per layer: at least 1, and 0 for a layer that has none left.
    """
    if dense:
        return [keep_count((1 - rate) ** level, total) for rate, total in zip(rates, totals)]
    return [keep_count(1 - rate, has) if has else 0 for rate, has in zip(rates, left)]


def per_layer(scores: Sequence[Tensor], masks: Sequence[Tensor], shares: Sequence[int]) -> list[Tensor]:
    """Keep the largest scores of each layer: ``shares[i]`` of layer i."""
    return [global_top_k([score], [mask], n)[0] for score, mask, n in zip(scores, masks, shares)]


def erk(scores: Sequence[Tensor], masks: Sequence[Tensor], keep: int) -> list[Tensor]:
    """Keep the largest scores of each layer, in Erdos-Renyi-Kernel numbers (Evci et al. 2020). Errors as `share`."""
    return per_layer(scores, masks, share(erk_quotas([mask.shape for mask in masks]), kept_counts(masks), keep))


def balanced(scores: Sequence[Tensor], masks: Sequence[Tensor], keep: int) -> list[Tensor]:
    """Keep the largest scores of each layer, the same number in each (Gadhikar et al. 2023).

    A layer with fewer weights keeps all, and the rest is shared out again. Errors as `share`.
    """
    return per_layer(scores, masks, share([1] * len(masks), kept_counts(masks), keep))
