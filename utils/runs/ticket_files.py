"""Files of weights that a ticket may be taken from: ours, torchvision's, and such that other programs have wrapped."""

import json
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from utils.conv_type import MASK_SUFFIX, masked_params
from utils.errors import ConfigError, RunError
from utils.files import sha256
from utils.runs.weights import load

# Keys below which programs put their weights, and what wrappers put before each name.
WRAPPERS, PREFIXES = ("state_dict", "model", "model_state_dict"), ("module.", "_orig_mod.")

State = dict[str, Tensor]


class NetworkFiles:
    """Reads files of weights that fit one network.

    Attributes:
        shapes: of all weights, statistics and masks, by name.
        masked: names of the masked parameters, in model order.
    """

    def __init__(self, model: nn.Module):
        self.shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        self.masked = [name for name, _, _ in masked_params(model)]
        self.mask_names = {name + MASK_SUFFIX for name in self.masked}

    def masks_in(self, state: State) -> dict[str, Tensor] | None:
        """The masks that a checkpoint holds; None if it holds none."""
        if not self.mask_names & state.keys():
            return None
        return {name: state[name + MASK_SUFFIX].bool() for name in self.masked}

    def read(self, file: Path) -> State:
        """The state_dict of a file, with the network's names and shapes.

        Raises:
            ConfigError: names or shapes are another network's.
            RunError: the file is missing or damaged, or holds no weights.
        """
        state = unwrapped(load_checked(file), file)
        wanted = set(self.shapes) if self.mask_names & state.keys() else self.shapes.keys() - self.mask_names
        wanted = {name for name in wanted if name in state or not name.endswith("num_batches_tracked")}
        if wrong := self._misfits(state, wanted):
            more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
            raise ConfigError(f"ticket_params.source: {file} does not fit the network: {'; '.join(wrong[:3])}{more}")
        return state

    def _misfits(self, state: State, wanted: set[str]) -> list[str]:
        wrong = []
        for name in [*(name for name in self.shapes if name in wanted), *sorted(state.keys() - wanted)]:
            if name not in state:
                wrong.append(f"{name} is missing in it")
            elif name not in self.shapes:
                excluded = name.endswith(MASK_SUFFIX) and name.removesuffix(MASK_SUFFIX) in self.shapes
                wrong.append(f"{name} is not in the network" + (" (prune_params.exclude)" if excluded else ""))
            elif state[name].shape != self.shapes[name]:
                there, here = tuple(state[name].shape), tuple(self.shapes[name])
                wrong.append(f"{name} is {there} in it and {here} in the network")
        return wrong


def unwrapped(content: Any, file: Path) -> State:
    """The state_dict in a file's content, out of {"state_dict": ...} and the like, without DataParallel's prefix.

    Raises:
        RunError: it holds no tensors by name.
    """
    for key in WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
            break
    if not (isinstance(content, dict) and content and all(isinstance(value, Tensor) for value in content.values())):
        raise RunError(f"{file} holds no weights of a network")
    for prefix in PREFIXES:
        if all(name.startswith(prefix) for name in content):
            content = {name.removeprefix(prefix): tensor for name, tensor in content.items()}
    return content


def load_checked(file: Path) -> Any:
    """Content of a file; one of a run must be as the run wrote it.

    Raises:
        RunError: it is missing or damaged, holds more than tensors, or was changed since its run wrote it.
    """
    index = file.parent.parent / "artifacts" / "checkpoints.json"
    try:
        known = json.loads(index.read_text()).get(file.name)
    except (OSError, ValueError, AttributeError):
        known = None
    if known and file.exists() and sha256(file) not in known:
        raise RunError(f"{file} was changed since its run wrote it: it is damaged, or another checkpoint")
    return load(file)
