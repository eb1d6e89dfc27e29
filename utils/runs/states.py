"""Where a run stands (`Position`), and its resume states on disk."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.distributed import Context
from utils.errors import RunError
from utils.training.tally import Tally
from utils.training.trainer import Trainer


@dataclass
class Position:
    """Where a run stands.

    Attributes:
        level: the level in progress, from 0.
        begun: whether it has been pruned and rewound.
        epoch: the epoch of its schedule that is trained next; weight rewinding starts in that of step k.
        tally: counts of the epoch in progress; None at the start of an epoch.
        initial_density: d0, the density of level 0, left by pruning at initialization or the ticket, 0 to 1.
        pruned_accuracy: of the level's network right after pruning, on the test set, in percent.
    """

    level: int = 0
    begun: bool = False
    epoch: int = 0
    tally: Tally | None = None
    initial_density: float = 1.0
    pruned_accuracy: float = math.nan

    @property
    def step(self) -> int:
        """Steps of the epoch that are done, or that lie before the start of the level."""
        return self.tally.step if self.tally else 0

    def begin_level(self, trainer: Trainer, step: int) -> None:
        """Goes to optimizer step `step` of the level's schedule, which may lie in the middle of an epoch."""
        self.begun, self.tally = True, None
        self.epoch, first = divmod(step, trainer.timeline.steps_per_epoch)
        if first:
            self.begin_epoch(trainer, first)

    def begin_epoch(self, trainer: Trainer, first: int = 0) -> None:
        """Begins the counts of the epoch at its step `first`, and its random draws: those of (seed, level, epoch)."""
        self.tally = trainer.new_tally(first)
        trainer.seed_draws(self.level, self.epoch)

    def state_dict(self, ctx: Context) -> dict[str, Any]:
        """Plain values and CPU tensors. In the middle of an epoch all ranks call it together: counts are summed."""
        return {
            "level": self.level,
            "begun": self.begun,
            "epoch": self.epoch,
            "initial_density": self.initial_density,
            "pruned_accuracy": self.pruned_accuracy,
            "step": self.step,
            "mid_epoch": self.tally.state_dict(ctx) if self.tally and self.tally.step else None,
        }

    def load_state_dict(self, state: dict[str, Any], trainer: Trainer) -> None:
        """Takes up the position of `state_dict`, on every rank; random draws go on where they were."""
        self.level, self.begun, self.epoch = state["level"], state["begun"], state["epoch"]
        self.initial_density, self.tally = state["initial_density"], None
        self.pruned_accuracy = state.get("pruned_accuracy", math.nan)  # older states have none
        if state["mid_epoch"]:
            trainer.seed_draws(self.level, self.epoch)  # for a rank that the saved run did not have
            self.tally = trainer.new_tally()
            self.tally.load_state_dict(state["mid_epoch"], trainer.ctx)


def saved_states(run: Path) -> list[dict[str, Any]]:
    """The index of a run's resume states, newest first; empty when none was saved.

    Raises:
        RunError: it is damaged.
    """
    index = run / "artifacts" / "state.json"
    try:
        entries = json.loads(index.read_text())
        sound = [isinstance(entry["file"] + entry["sha256"], str) and entry["level"] >= 0 for entry in entries]
        if isinstance(entries, list) and entries and all(sound):
            return entries
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise RunError(f"{index} is damaged ({error}); start a level again with resume_level") from error
    raise RunError(f"{index} is damaged; start a level again with resume_level")


def trained_levels(run: Path) -> int:
    """How many levels a run has finished, by its newest resume state. Errors as `saved_states`."""
    return next((state["level"] for state in saved_states(run)), 0)
