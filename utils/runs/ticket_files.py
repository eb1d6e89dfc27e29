"""Files of weights that a ticket may be taken from: ours, torchvision's, and such that other programs have wrapped."""

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from utils.conv_type import MASK_SUFFIX, masked_params
from utils.errors import ConfigError
from utils.runs.run import read_saved
from utils.runs.weights import load, tensors_by_name

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
        return self.fitting(unwrapped(_load(file), file), file)

    def fitting(self, state: State, file: Path) -> State:
        """`state`, which is that of `file`, if it has the network's names and shapes. Raises as `read`."""
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
    state = tensors_by_name(content, file)
    for prefix in PREFIXES:
        if all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return state


def _load(file: Path) -> Any:
    return read_saved(file) if file.parent.name == "checkpoints" else load(file)
