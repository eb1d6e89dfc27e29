"""State dicts (weights, buffers and masks by name) of a model with masks: checked, and copied into it."""

import torch
from torch import Tensor, nn

from utils.conv_type import MASK_SUFFIX, masked_params
from utils.errors import RunError


def load_weights(model: nn.Module, state: dict[str, Tensor], source: str) -> None:
    """Copies weights and buffers (BN statistics) of `state` into the model in place; masks stay the model's own.

    Raises:
        RunError: names or shapes are another model's.
    """
    check_weights(model, state, source)
    masks = {name + MASK_SUFFIX for name, _, _ in masked_params(model)}
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name not in masks:
                tensor.copy_(state[name])


def check_weights(model: nn.Module, state: object, source: str) -> None:
    """Checks that `state` is a state_dict of this model, masks included.

    Raises:
        RunError: names or shapes are another model's, or it holds no tensors by name.
    """
    own = model.state_dict()
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise RunError(f"{source} holds no weights of a network")
    wrong = sorted(own.keys() ^ state.keys()) or [n for n in own if own[n].shape != state[n].shape]
    if wrong:
        raise RunError(f"{source} holds another model: {', '.join(wrong[:3])} differ{'s' if len(wrong) == 1 else ''}")
