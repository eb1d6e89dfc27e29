"""Counts of the epoch in progress."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from utils.distributed import Context


@dataclass
class Tally:
    """Counts of the epoch in progress, on the device, so that no step waits for it.

    Attributes:
        losses: (steps of the epoch,) this rank's part of each step's mean loss over the global batch; float64, so that
            sums over ranks come out the same however often the epoch was stopped.
        correct: (), images that this rank classified right.
        step: steps done.
        seconds: time they took before the epoch was last stopped.
    """

    losses: Tensor
    correct: Tensor
    step: int = 0
    seconds: float = 0.0

    def count(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Counts a step. Args: this rank's part of the loss; logits (N, classes) and labels (N,) of its images."""
        self.losses[self.step] = loss.detach()
        self.correct += (logits.detach().argmax(1) == labels).sum()
        self.step += 1

    def state_dict(self, ctx: Context) -> dict[str, Any]:
        """Counts summed over the ranks, and each rank's random state. All ranks call it together."""
        rng = {"cpu": torch.get_rng_state()}
        if ctx.device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state(ctx.device)
        return {
            "step": self.step,
            "seconds": self.seconds,
            "losses": ctx.sum(self.losses.clone()).cpu(),
            "correct": int(ctx.sum(self.correct.clone())),  # read once, where training stops anyway
            "rng": ctx.gather_objects(rng),
        }

    def load_state_dict(self, state: dict[str, Any], ctx: Context) -> None:
        """Takes up counts on rank 0, which has the sums, and this rank's random state, if there is one."""
        self.step, self.seconds = state["step"], state["seconds"]
        if ctx.is_main:
            self.losses.copy_(state["losses"])
            self.correct.fill_(state["correct"])
        if ctx.rank < len(state["rng"]):
            rng = state["rng"][ctx.rank]
            torch.set_rng_state(rng["cpu"])
            if "cuda" in rng and ctx.device.type == "cuda":
                torch.cuda.set_rng_state(rng["cuda"], ctx.device)
