"""Counts of the epoch in progress, and the check that they and the network are finite."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from utils.data.mixing import hard_labels
from utils.distributed import Context
from utils.errors import RunError

Moment = float | torch.cuda.Event


def moment(device: torch.device) -> Moment:
    """Now, in the order of the device's work: nothing waits for the device."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds_between(start: Moment, end: Moment) -> float:
    """Seconds between two moments; waits for the device to reach the later one."""
    if isinstance(start, float) or isinstance(end, float):
        assert isinstance(start, float) and isinstance(end, float)
        return end - start
    end.synchronize()
    return start.elapsed_time(end) / 1000


@dataclass
class Tally:
    """Counts of the epoch in progress, on the device, so that no step waits for it.

    Attributes:
        losses: (steps of the epoch,) this rank's part of each step's mean loss over the global batch; float64, so that
            sums over ranks come out the same however often the epoch was stopped.
        correct: (), images that this rank classified right.
        step: steps done, those before `first` included.
        first: the step at which training of the epoch begins: 0, but where a level starts in the middle of an epoch.
        seconds: time they took before the epoch was last stopped.
    """

    losses: Tensor
    correct: Tensor
    step: int = 0
    first: int = 0
    seconds: float = 0.0

    def count(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Counts a step. Args: this rank's part of the loss; logits (N, classes) and labels of its images.

        Of mixed images the label of the larger share counts.
        """
        self.losses[self.step] = loss.detach()
        self.correct += (logits.detach().argmax(1) == hard_labels(labels)).sum()
        self.step += 1

    def begin(self) -> None:
        """Notes when the steps begin, and what those before the epoch was stopped took."""
        self.before, self.began = self.seconds, moment(self.losses.device)

    def end(self) -> None:
        """Notes when the steps end."""
        self.ended = moment(self.losses.device)

    def training_seconds(self) -> float:
        """Time of all steps; waits for the device to have done them."""
        return self.before + seconds_between(self.began, self.ended)

    def state_dict(self, ctx: Context) -> dict[str, Any]:
        """Counts summed over the ranks, and each rank's random state. All ranks call it together."""
        rng = {"cpu": torch.get_rng_state()}
        if ctx.device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state(ctx.device)
        return {
            "step": self.step,
            "first": self.first,
            "seconds": self.seconds,
            "losses": ctx.sum(self.losses.clone()).cpu(),
            "correct": int(ctx.sum(self.correct.clone())),  # read once, where training stops anyway
            "rng": ctx.gather_objects(rng),
        }

    def load_state_dict(self, state: dict[str, Any], ctx: Context) -> None:
        """Takes up counts on rank 0, which has the sums, and this rank's random state, if there is one."""
        self.step, self.seconds = state["step"], state["seconds"]
        self.first = state.get("first", 0)  # states of older code have none
        if ctx.is_main:
            self.losses.copy_(state["losses"])
            self.correct.fill_(state["correct"])
        if ctx.rank < len(state["rng"]):
            rng = state["rng"][ctx.rank]
            torch.set_rng_state(rng["cpu"])
            if "cuda" in rng and ctx.device.type == "cuda":
                torch.cuda.set_rng_state(rng["cuda"], ctx.device)


def training_figures(losses: Sequence[float], sizes: Sequence[int], right: float, seconds: float) -> dict[str, float]:
    """What the steps of an epoch come to, by the columns of the CSVs.

    Args:
        losses: mean over the global batch of each step.
        sizes: images of each step.
        right: how many of them were classified right.
        seconds: time of the steps.
    """
    images = sum(sizes)
    return {
        "train_loss": math.fsum(size * loss for size, loss in zip(sizes, losses, strict=True)) / images,
        "train_acc": 100 * right / images,
        "images_per_second": images / seconds,
    }


class FiniteCheck:
    """Whether losses and network are finite: asked of the device now, read later, with whatever else is read then.

    Attributes:
        flags: float64 (steps done + tensors of the network,): to be summed over the ranks and read.
    """

    def __init__(self, model: nn.Module, losses: Tensor):
        tensors = {name: t for name, t in model.state_dict().items() if t.is_floating_point() and t.numel()}
        self.names, self.steps = list(tensors), len(losses)
        # The largest absolute value of a tensor is finite if and only if all its values are.
        largest = torch._foreach_norm(list(tensors.values()), math.inf)
        broken = ~torch.stack(largest).isfinite()
        self.flags = torch.cat([losses, broken.double()])

    def losses(self, answer: list[float], level: int, epoch: int) -> list[float]:
        """The losses of the steps over all ranks. Args: answer: the sums of `flags` over the ranks.

        Raises:
            RunError: a loss or a weight is not finite; names the step or the weight.
        """
        losses, flags = answer[: self.steps], answer[self.steps :]
        for step, loss in enumerate(losses):
            if not math.isfinite(loss):
                raise RunError(f"training loss is {loss} at level {level}, epoch {epoch}, step {step}")
        for name, flag in zip(self.names, flags, strict=True):
            if flag:
                raise RunError(
                    f"{name} is no longer finite at level {level}, epoch {epoch}, after step {len(losses) - 1}, though "
                    "every loss was: a gradient was not"
                )
        return losses


def finite_losses(ctx: Context, model: nn.Module, losses: Tensor, level: int, epoch: int) -> list[float]:
    """The losses of an epoch's steps over all ranks, after checking that losses and network are finite.

    All ranks call it together, before a state is saved. It costs one pass over the network and one wait for the device.

    Args:
        losses: (steps done,) this rank's part of each step's loss.

    Raises:
        RunError: a loss or a weight is not finite; names the step or the weight.
    """
    check = FiniteCheck(model, losses)
    return check.losses(ctx.sum(check.flags).tolist(), level, epoch)
