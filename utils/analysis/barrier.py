"""Loss and error along the line between two networks, and the barrier on it."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from utils.conv_type import MASK_SUFFIX
from utils.data.loaders import Batch
from utils.errors import DataError

State = dict[str, Tensor]
Batches = Callable[[], Iterable[Batch]]


@dataclass(frozen=True)
class Point:
    """A network on the line.

    Attributes:
        alpha: 0 at the first end, 1 at the second.
        loss: mean cross entropy over the images.
        error: misclassified images, in percent.
    """

    alpha: float
    loss: float
    error: float


def barrier(heights: Sequence[float]) -> float:
    """Largest height on the line minus the mean of those of its ends (Frankle et al. 2020, section 2).

    The ends are points of the line, so it is at least half of the difference between them, and never negative.
    """
    return max(heights) - (heights[0] + heights[-1]) / 2


def alphas(points: int) -> list[float]:
    """`points` places on the line at equal distances, 0 and 1 among them.

    Raises:
        ValueError: fewer than 2.
    """
    if points < 2:
        raise ValueError(f"{points} points make no line: at least 2")
    return [place / (points - 1) for place in range(points)]


def along_line(
    model: nn.Module, a: State, b: State, places: Iterable[float], images: Batches, statistics: Batches | None
) -> Iterator[Point]:
    """Evaluates (1 - alpha) * a + alpha * b at each place; the model is left at the last one, in evaluation mode.

    Args:
        model: a network of which `a` and `b` are state_dicts; masks are taken from `a` and change nothing.
        places: values of alpha.
        images: yields the batches to evaluate on.
        statistics: yields training batches on which BatchNorm statistics are recomputed at each place, ends included;
            None interpolates the statistics like weights.
    """
    for alpha in places:
        model.load_state_dict(interpolated(a, b, alpha))
        if statistics is not None:
            recompute_statistics(model, statistics())
        yield Point(alpha, *evaluate(model, images()))


def interpolated(a: State, b: State, alpha: float) -> State:
    """(1 - alpha) * a + alpha * b, of floating-point tensors; masks and counters are those of `a`."""
    return {
        name: torch.lerp(tensor, b[name], alpha) if tensor.is_floating_point() else tensor for name, tensor in a.items()
    }


@torch.no_grad()
def evaluate(model: nn.Module, batches: Iterable[Batch]) -> tuple[float, float]:
    """(mean cross entropy, error in percent) of the network in evaluation mode, in float32."""
    model.eval()
    sums, images = torch.zeros(2, dtype=torch.float64, device=next(model.parameters()).device), 0
    for inputs, labels in batches:
        logits = model(inputs)
        sums[0] += F.cross_entropy(logits, labels, reduction="sum")
        sums[1] += (logits.argmax(1) != labels).sum()
        images += len(labels)
    loss, wrong = (sums / images).tolist()
    return loss, 100 * wrong


@torch.no_grad()
def recompute_statistics(model: nn.Module, batches: Iterable[Batch]) -> None:
    """Sets BatchNorm's running statistics to the mean of the batches' own, each batch weighted by its images.

    Only BatchNorm layers are in training mode meanwhile: dropout stays off. A network without them is left alone.
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    model.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.train()
    seen = 0
    try:
        for inputs, _ in batches:
            seen += len(inputs)
            for norm in norms:  # running = (1 - momentum) * running + momentum * batch: the mean over the images so far
                norm.momentum = len(inputs) / seen
            model(inputs)
    finally:
        for norm, momentum in zip(norms, momenta):
            norm.momentum = momentum
        model.eval()


def whole_batches(batches: Iterable[Batch], images: int) -> Iterator[Batch]:
    """Batches until they hold `images` images at least; all of them where there are fewer, or where it is 0."""
    seen = 0
    for batch in batches:
        yield batch
        seen += len(batch[1])
        if images and seen >= images:
            return


def with_masks(a: State, b: State, names: tuple[str, str], union: bool) -> tuple[State, State]:
    """Both states, with the same masks in each.

    Args:
        union: masks may differ; a weight is then kept where either keeps it.

    Raises:
        DataError: the masks differ, without `union`.
    """
    masks = [name for name in a if name.endswith(MASK_SUFFIX)]
    different = [name for name in masks if not torch.equal(a[name], b[name])]
    if different and not union:
        raise DataError(
            f"{names[0]} and {names[1]} have different masks ({len(different)} of {len(masks)} layers); "
            "--union keeps what either keeps"
        )
    either = {name: a[name] | b[name] for name in masks}
    return {**a, **either}, {**b, **either}
