"""Exponential moving average of a network's weights, for evaluation: training does not read it."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


class WeightAverage:
    """Average of weights and BatchNorm statistics, a += (1 - decay) * (w - a) after each step (Polyak & Juditsky 1992).

    It starts anew with every level, from the weights that the level starts from. Of weights that are masked after each
    step it is masked too. Buffers that are no floats (counts of batches, masks) are the network's own.

    Attributes:
        values: {name in the state_dict: average}; they change in place, so that a step captured as a CUDA graph finds
            them.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.model, self.decay = model, decay
        floats = [(name, b) for name, b in model.named_buffers() if b.is_floating_point()]
        saved = model.state_dict()
        own = {**dict(model.named_parameters()), **{name: b for name, b in floats if name in saved}}
        self.own = {name: tensor.detach() for name, tensor in own.items()}
        self.values = {name: tensor.clone() for name, tensor in self.own.items()}

    def restart(self) -> None:
        """Starts anew from the network as it is."""
        self._copy(self.values, self.own)

    @torch.no_grad()
    def update(self) -> None:
        """Takes in the weights after a step."""
        torch._foreach_lerp_(list(self.values.values()), list(self.own.values()), 1 - self.decay)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """The network has the averages inside, and its own weights again afterwards, bit for bit."""
        kept = {name: tensor.clone() for name, tensor in self.own.items()}
        self._copy(self.own, self.values)
        try:
            yield
        finally:
            self._copy(self.own, kept)

    @torch.no_grad()
    def _copy(self, to: dict[str, Tensor], source: dict[str, Tensor]) -> None:
        torch._foreach_copy_(list(to.values()), [source[name] for name in to])

    def state_dict(self) -> dict[str, Any]:
        """A state_dict of the network with the averages in it, masks included."""
        return {**self.model.state_dict(), **self.values}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up the averages of a `state_dict`."""
        self._copy(self.values, state)
