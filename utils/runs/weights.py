"""Weights and masks: copied off the device, and back into a network."""

from typing import Any

import torch
from torch import Tensor, nn

from utils.conv_type import MASK_SUFFIX, masked_params
from utils.errors import RunError


def cpu_copy(obj: Any) -> Any:
    """`obj` with every tensor in it copied to the CPU, safe to write while training goes on; tuples become lists."""
    if isinstance(obj, Tensor):
        return obj.detach().to("cpu", copy=True)
    if isinstance(obj, dict):
        return {key: cpu_copy(value) for key, value in obj.items()}
    if isinstance(obj, list | tuple):
        return [cpu_copy(value) for value in obj]
    return obj


def load_weights(model: nn.Module, state: dict[str, Tensor], source: str) -> None:
    """Copies weights and buffers (BN statistics) of `state` into the model in place; masks stay the model's own.

    Raises:
        RunError: names or shapes are another model's.
    """
    own = model.state_dict()
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise RunError(f"{source} holds no weights of a network")
    masks = {name + MASK_SUFFIX for name, _, _ in masked_params(model)}
    wrong = sorted(own.keys() ^ state.keys()) or [n for n in own if own[n].shape != state[n].shape]
    if wrong:
        raise RunError(f"{source} holds another model: {', '.join(wrong[:3])} differ{'s' if len(wrong) == 1 else ''}")
    with torch.no_grad():
        for name, tensor in own.items():
            if name not in masks:
                tensor.copy_(state[name])


def load_masks(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Copies the masks of `state` into the model in place."""
    for name, _, mask in masked_params(model):
        mask.copy_(state[name + MASK_SUFFIX])
