"""What a ticket takes from its source, and what it changes: masks and weights by ``ticket_params``.

Weights; "the rest" are the parameters without masks (biases, BatchNorm) and the BatchNorm statistics:

- ``init``: weights and the rest as the source run began with them: the lottery ticket (Frankle & Carbin 2019).
- ``rewind``: both as at step k of the source's level 0 (its rewind point, or one of its ``save_steps``), with the
  optimizer of that step. Level 0 goes on from there, at step k of the schedule: what weight rewinding does with this
  mask (Frankle et al. 2020), except for the order of the images, which depends on the number of the level.
- ``final``: both as at the end of the level; or as in the file.
- ``reinit``: the network's own initialization, drawn anew, weights and the rest: the mask alone is taken, as in the
  reinitialization experiment of Frankle & Carbin 2019. Drawn from the seed, a constant, and how often the source's own
  weights were drawn anew before: never the weights of init, also with the same seed, also of a branch of a branch.
- ``init_signs``: sizes and the rest of ``reinit``; each masked weight has the sign that it has in ``init``
  ("reinit, constant sign" of Zhou et al. 2019).
- ``final_signs``: sizes and the rest of ``init``; each masked weight has the sign that it has in ``final``.

Masks are permuted within each layer, which keeps the count of each layer, or over all layers, which keeps the total
(Frankle et al. 2021). All random numbers are drawn on the CPU of rank 0 by (seed, a constant of their own): the
permutation, too, so the shuffled masks of two levels are nested as the masks are.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from harness_params import Config
from utils.conv_type import MASK_SUFFIX, density_of
from utils.data.loaders import Data
from utils.errors import ConfigError
from utils.output import note
from utils.runs.points import Point
from utils.runs.records import redraws, saved_ticket
from utils.runs.ticket_files import NetworkFiles, State
from utils.runs.ticket_source import Source
from utils.seeds import stable_seed
from utils.training.setup import new_network
from utils.wording import density_text

# Take the place of the level in a seed; PRUNING_DRAWS and FLIP_DRAWS take that of the epoch.
REINIT_DRAWS, SHUFFLE_DRAWS = -3, -4


def note_ticket(option: str, text: str) -> None:
    """Print a note on an option of ``ticket_params``."""
    note(f"ticket_params.{option}: {text}")


class TicketReader:
    """Reads masks and weights of one ticket, as CPU tensors by the names of the network's parameters."""

    def __init__(self, cfg: Config, data: Data, model: nn.Module, source: Source, point: Point | None):
        self.cfg, self.data, self.source, self.point = cfg, data, source, point
        self.files = NetworkFiles(model)

    def read(self) -> tuple[dict[str, Tensor], State]:
        """(masks, all weights and statistics), as ``ticket_params`` asks for them."""
        masks, weights = self._masks(), self.source.weights
        if weights == "reinit":
            return masks, self._fresh()
        if self.point:
            file = self.source.checkpoint("rewind" if self.source.step == -1 else f"step_{self.source.step}")
            return masks, self._checked(self.files.fitting(self.point.weights, file), masks, file)
        if weights == "final":
            file = self.source.mask_file
            return masks, self._checked(self.files.read(file), masks, file)
        init = self._init(masks)
        if weights == "init_signs":
            return masks, self._signed(self._fresh(), init)
        if weights == "final_signs":
            return masks, self._signed(init, self.files.read(self.source.mask_file))
        return masks, init

    # --- masks -------------------------------------------------------------------------------------------------------

    def _masks(self) -> dict[str, Tensor]:
        kind = self.cfg.ticket_params.mask
        if kind == "none":
            return {name: torch.ones(self.files.shapes[name], dtype=torch.bool) for name in self.files.masked}
        state = self.files.read(self.source.mask_file)
        masks = self.files.masks_in(state)
        if masks is None:
            masks = {name: state[name] != 0 for name in self.files.masked}
            share = f"density {density_text(density_of(list(masks.values())))}"
            note_ticket("mask", f"{self.source.path} holds no masks: {kind} keeps its weights that are not 0: {share}")
        generator = torch.Generator().manual_seed(stable_seed(self.cfg.experiment_params.seed, SHUFFLE_DRAWS))
        return SHUFFLES[kind](masks, generator)

    # --- weights -----------------------------------------------------------------------------------------------------

    def _fresh(self) -> State:
        """The network's own initialization, drawn anew."""
        before = redraws(saved_ticket(self.source.run)) if self.source.run else 0
        depth = [before] if before else []  # with none before, the seed of runs that know no depth
        return self._drawn(self.cfg, stable_seed(self.cfg.experiment_params.seed, REINIT_DRAWS, *depth))

    def _drawn(self, cfg: Config, seed: int) -> State:
        with torch.random.fork_rng(devices=[]):
            return new_network(cfg, self.data, seed).state_dict()

    def _init(self, masks: dict[str, Tensor]) -> State:
        """The weights that the source run began with, also those that it pruned at initialization.

        Its checkpoint holds zeros there. Where other weights are to be kept, they are drawn again from the run's seed
        and compared with those that it has.
        """
        file = self.source.checkpoint("init")
        init = self.files.read(file)
        own = self.files.masks_in(init) or {}
        if not any((masks[name] & ~mask).any() for name, mask in own.items()):
            return init
        assert self.source.cfg is not None
        drawn = self._drawn(self.source.cfg, self.source.cfg.experiment_params.seed)
        expected = {name: tensor * own[name] if name in own else tensor for name, tensor in drawn.items()}
        weights = [name for name in init if not name.endswith(MASK_SUFFIX)]
        if not all(name in expected and torch.equal(expected[name], init[name]) for name in weights):
            raise ConfigError(
                f"ticket_params.mask: {self.cfg.ticket_params.mask} is not allowed: {file} holds no weights where its "
                "run was pruned at initialization, and they cannot be drawn again from its seed"
            )
        return {name: drawn[name] for name in weights}

    def _signed(self, sizes: State, signs: State) -> State:
        """Sizes and the rest of one state, signs of the masked weights of another.

        The sign of a zero is its sign bit: plus for 0.0, minus for the -0.0 that a product with a mask may leave.
        """
        return {**sizes, **{name: sizes[name].abs().copysign(signs[name]) for name in self.files.masked}}

    def _checked(self, state: State, masks: dict[str, Tensor], file: Path) -> State:
        """The state. Weights are zero where their own checkpoint has them pruned: no shuffled mask may keep them.

        Raises:
            ConfigError: it would.
        """
        own = self.files.masks_in(state) or {}
        lost = sum(int((masks[name] & ~mask).sum()) for name, mask in own.items())
        if not lost:
            return state
        kept = sum(int(mask.sum()) for mask in masks.values())
        zeros = f"{lost} of {kept} weights are 0 in {file}, which has them pruned"
        if self.cfg.ticket_params.mask != "none":
            raise ConfigError(f"ticket_params.mask: {self.cfg.ticket_params.mask} is not allowed: {zeros}")
        note_ticket("mask", f"none keeps all weights: {zeros}")
        return state


def same(masks: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
    """The masks as they are."""
    return masks


def shuffle_layer(masks: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
    """Each layer's mask permuted: the same count in each layer."""
    return {
        name: mask.flatten()[torch.randperm(mask.numel(), generator=generator)].view(mask.shape)
        for name, mask in masks.items()
    }


def shuffle_global(masks: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
    """All masks permuted as one: the same count in all."""
    flat = torch.cat([mask.flatten() for mask in masks.values()])
    flat = flat[torch.randperm(len(flat), generator=generator)]
    parts = flat.split([mask.numel() for mask in masks.values()])
    return {name: part.view(mask.shape) for (name, mask), part in zip(masks.items(), parts)}


Shuffle = Callable[[dict[str, Tensor], torch.Generator], dict[str, Tensor]]
SHUFFLES: dict[str, Shuffle] = {"same": same, "shuffle_layer": shuffle_layer, "shuffle_global": shuffle_global}
