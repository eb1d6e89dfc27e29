"""Sharpness of a minimum: the largest eigenvalue and the trace of the Hessian of the mean training loss.

The Hessian is that of the free parameters alone: kept weights and parameters without a mask. Directions of pruned
weights, along which training cannot move, are left out: it is P H P for the projection P on the free ones. BatchNorm is
in eval mode, with the statistics of the checkpoint. Products H v are two backward passes (Pearlmutter 1994); the
largest eigenvalue by power iteration and the trace by Hutchinson's estimator, as in Yao et al. 2020 (PyHessian).
"""

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from utils.conv_type import masked_params
from utils.errors import RunError
from utils.pruning.scores import scoring
from utils.seeds import stable_seed

Batch = tuple[Tensor, Tensor]
POWER_DRAW, TRACE_DRAW = 1, 2  # constants of their own in the seeds of the two methods


@dataclass(frozen=True)
class Eigenvalue:
    """An eigenvalue found by power iteration.

    Attributes:
        value: with its sign.
        residual: norm of H v - value * v for the unit vector v found: some eigenvalue of H is at most that far away.
        iterations: products H v.
        converged: whether the residual is at most the tolerance times abs(value).
    """

    value: float
    residual: float
    iterations: int
    converged: bool


@dataclass(frozen=True)
class Trace:
    """The trace as estimated by `samples` random vectors, and the standard error of their mean (nan for one)."""

    value: float
    standard_error: float
    samples: int


class Hessian:
    """The Hessian of the mean cross-entropy over all images of `batches`, as a linear map of lists of tensors.

    Args:
        model: with its masks, if it has any; it is copied.
        batches: gives (images, labels) on the model's device, the same ones at each call; called once per product,
            whose memory is that of one batch.
        dtype: of the computation; float64 makes small eigenvalues and tight tolerances meaningful.
        label_smoothing: of the loss.

    Attributes:
        size: number of free parameters.

    Raises:
        ValueError: no image.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Callable[[], Iterable[Batch]],
        dtype: torch.dtype = torch.float32,
        label_smoothing: float = 0.0,
    ):
        self.images = sum(len(labels) for _, labels in batches())
        if not self.images:
            raise ValueError("the Hessian of a training loss needs at least one image")
        self.model, self.batches = copy.deepcopy(model).to(dtype), batches
        self.dtype, self.smoothing = dtype, label_smoothing
        masks = {id(param): mask for _, param, mask in masked_params(self.model)}
        self.params = [param.requires_grad_() for param in self.model.parameters()]
        self.free = [masks.get(id(param), torch.ones_like(param, dtype=torch.bool)) for param in self.params]
        self.size = sum(int(mask.count_nonzero()) for mask in self.free)

    def product(self, vector: Sequence[Tensor]) -> list[Tensor]:
        """H v; entries of `vector` at pruned weights are taken as zero, and those of the product are.

        Raises:
            RunError: the loss is not finite.
        """
        inside = [v * free for v, free in zip(vector, self.free)]
        total = [torch.zeros_like(param) for param in self.params]
        with scoring(self.model):
            for images, labels in self.batches():
                logits = self.model(images.to(self.dtype))
                loss = F.cross_entropy(logits, labels, reduction="sum", label_smoothing=self.smoothing) / self.images
                if not loss.isfinite():
                    raise RunError(f"the training loss is {loss.item()}: it has no Hessian")
                torch._foreach_add_(total, self._of_batch(loss, inside))
        return [t.mul_(free) for t, free in zip(total, self.free)]

    def _of_batch(self, loss: Tensor, vector: Sequence[Tensor]) -> list[Tensor]:
        grads = torch.autograd.grad(loss, self.params, create_graph=True, materialize_grads=True, allow_unused=True)
        pairs = [(grad, v) for grad, v in zip(grads, vector) if grad.requires_grad]  # others are constants
        if not pairs:
            return [torch.zeros_like(v) for v in vector]
        outputs, grad_outputs = zip(*pairs)
        return list(torch.autograd.grad(outputs, self.params, grad_outputs, allow_unused=True, materialize_grads=True))

    def random(self, generator: torch.Generator, signs: bool) -> list[Tensor]:
        """A random vector, zero at pruned weights: signs (Rademacher) or standard normal values.

        Drawn on the CPU, in float64: the same on any device.
        """
        drawn = []
        for param, free in zip(self.params, self.free):
            if signs:
                values = torch.randint(0, 2, param.shape, generator=generator).double().mul_(2).sub_(1)
            else:
                values = torch.randn(param.shape, generator=generator, dtype=torch.float64)
            drawn.append(values.to(param) * free)
        return drawn


def top_eigenvalue(hessian: Hessian, seed: int = 0, tolerance: float = 1e-3, most: int = 200) -> Eigenvalue:
    """The largest eigenvalue, the most positive one, of the Hessian.

    Power iteration finds the eigenvalue of largest absolute value. If that is negative, -a, it goes on with H + a: its
    eigenvalues are not negative, and its largest one is that of H, plus a.

    Args:
        tolerance: of the residual, relative to the eigenvalue found (with H + a, to that of H + a).
        most: products H v at most, for either part.
    """
    found = _power_iteration(hessian, 0.0, seed, tolerance, most)
    if found.value >= 0:
        return found
    shifted = _power_iteration(hessian, -found.value, seed, tolerance, most)
    return Eigenvalue(
        shifted.value + found.value, shifted.residual, found.iterations + shifted.iterations, shifted.converged
    )


def _power_iteration(hessian: Hessian, shift: float, seed: int, tolerance: float, most: int) -> Eigenvalue:
    """The eigenvalue of H + shift of largest absolute value."""
    vector = hessian.random(torch.Generator().manual_seed(stable_seed(seed, POWER_DRAW) % 2**63), signs=False)
    value = residual = math.nan
    for iteration in range(1, most + 1):
        norm = math.sqrt(_dot(vector, vector))
        if norm == 0:  # H v = 0 for a random v: H is zero
            return Eigenvalue(0.0, 0.0, iteration - 1, True)
        vector = [v / norm for v in vector]
        product = hessian.product(vector)
        if shift:
            product = [p.add(v, alpha=shift) for p, v in zip(product, vector)]
        value = _dot(vector, product)
        rest = [p.sub(v, alpha=value) for p, v in zip(product, vector)]
        residual = math.sqrt(_dot(rest, rest))
        if residual <= tolerance * abs(value):
            return Eigenvalue(value, residual, iteration, True)
        vector = product
    return Eigenvalue(value, residual, most, False)


def trace(hessian: Hessian, samples: int, seed: int = 0) -> Trace:
    """Hutchinson's estimate: the mean of z . H z over random signs z, whose expectation is the trace.

    Raises:
        ValueError: no sample is asked for.
    """
    if samples < 1:
        raise ValueError(f"samples: {samples} is not allowed: at least 1")
    generator = torch.Generator().manual_seed(stable_seed(seed, TRACE_DRAW) % 2**63)
    found = []
    for _ in range(samples):
        signs = hessian.random(generator, signs=True)
        found.append(_dot(signs, hessian.product(signs)))
    mean = math.fsum(found) / samples
    variance = math.fsum((value - mean) ** 2 for value in found) / (samples - 1) if samples > 1 else math.nan
    return Trace(mean, math.sqrt(variance / samples), samples)


def _dot(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    """The scalar product, summed in float64."""
    return float(torch.stack([(a.double() * b.double()).sum() for a, b in zip(one, other)]).sum())
