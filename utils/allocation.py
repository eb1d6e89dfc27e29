"""Allocation: scores or layer shapes, and a number of weights to keep, in; masks out. Pure functions.

Every allocation takes ``(scores, masks, keep)``: one score tensor and one bool mask a layer, in model order, and the
number of weights to keep over all layers. It returns new masks with exactly `keep` ones, each a subset of the old one.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Allocation = Callable[[Sequence[Tensor], Sequence[Tensor], int], list[Tensor]]


def keep_count(density: float, total: int) -> int:
    """`density` of `total` weights as a number: rounded half up, and at least one."""
    return max(1, math.floor(density * total + 0.5))


def kept_counts(masks: Sequence[Tensor]) -> list[int]:
    """Ones in each mask, with one transfer to the host for all of them."""
    return torch.stack([mask.count_nonzero() for mask in masks]).tolist()


def _kth_largest(values: Tensor, k: int) -> float:
    """The k-th largest of a flat tensor, which may be overwritten. Exact: a Python float holds any float32 or 64."""
    place = values.numel() - k
    if values.is_cuda:
        return values.kthvalue(place + 1).values.item()
    # numpy's vectorised quickselect works in place and is some ten times faster on a CPU than kthvalue, which also
    # needs an int64 copy as large as two float32 models.
    array = values.numpy()
    array.partition(place)
    return float(array[place])


@torch.no_grad()
def global_top_k(scores: Sequence[Tensor], masks: Sequence[Tensor], keep: int) -> list[Tensor]:
    """Keeps the `keep` largest scores among the weights still there, all layers together.

    Exact also where scores tie: of equal scores at the threshold, those first in model order (lowest flat index) stay.
    One threshold over the concatenated scores; no layer is sorted.

    Args:
        scores: finite where the mask is one; what stands elsewhere does not matter.

    Raises:
        ValueError: `keep` is below 0 or more than is left.
    """
    room = sum(kept_counts(masks))
    if not 0 <= keep <= room:
        raise ValueError(f"cannot keep {keep} of {room} weights")
    if keep == room:
        return [mask.clone() for mask in masks]
    if keep == 0:
        return [torch.zeros_like(mask) for mask in masks]
    threshold = _kth_largest(torch.cat([score[mask] for score, mask in zip(scores, masks)]), keep)
    new = [(score > threshold) & mask for score, mask in zip(scores, masks)]
    missing = keep - sum(kept_counts(new))
    for score, mask, chosen in zip(scores, masks, new):
        if missing == 0:
            break
        # nonzero() walks in flat index order whatever the memory layout (channels_last weights too).
        ties = ((score == threshold) & mask).nonzero()[:missing]
        chosen[tuple(ties.T)] = True
        missing -= len(ties)
    return new
