"""Training and evaluating one network for an epoch: the hot path, the same for one process and for many."""

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from harness_params import Config
from utils.conv_type import MASK_SUFFIX, check_weights, mask_gradients
from utils.data.loaders import Batch, Data
from utils.distributed import Context
from utils.schedulers import learning_rate
from utils.seeds import stable_seed
from utils.training.hardware import autocast_dtype, compile_network, limit_threads
from utils.training.setup import make_timeline, optimizer_state, start_optimizer
from utils.training.sparse_allreduce import gradient_hook
from utils.training.tally import Tally, finite_losses


class Trainer:
    """One network with its optimizer, trained epoch by epoch.

    Attributes:
        model: the bare network: what is pruned, saved and evaluated.
        net: the same network; with several processes, wrapped so that gradients are averaged over them.
        optimizer: SGD of the level in progress; `restart` makes a fresh one.
    """

    def __init__(self, cfg: Config, ctx: Context, model: nn.Module, data: Data):
        self.cfg, self.ctx, self.data, self.model = cfg, ctx, data, model
        # Rank 0's, so that machines of unlike hardware train one network.
        self.dtype = ctx.broadcast_object(autocast_dtype(cfg.experiment_params.precision, ctx.device))
        limit_threads(cfg, ctx, model)
        compile_network(cfg, ctx, model)
        self.params = list(model.parameters())
        self.net = ctx.wrap(model, gradient_hook(cfg, ctx, model))
        self.buckets_settled = ctx.world == 1
        self.timeline = make_timeline(cfg, data)
        self.restart()

    # --- the optimizer and its schedule --------------------------------------------------------------------------

    def restart(self, state: dict[str, Any] | None = None) -> None:
        """Makes a fresh optimizer, or one that goes on from `state` (of `optimizer_state_dict`)."""
        self.optimizer, self.scaler = start_optimizer(self.cfg, self.model, self.dtype, state)

    def optimizer_state_dict(self) -> dict[str, Any]:
        """Momentum and loss scale: what `restart` needs to go on."""
        return optimizer_state(self.optimizer, self.scaler)

    def state_dict(self) -> dict[str, Any]:
        """Weights, BatchNorm statistics and masks, and the optimizer's state; tensors are the device's own."""
        return {"model": self.model.state_dict(), "optimizer": self.optimizer_state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up a `state_dict`, in place.

        Raises:
            RunError: names or shapes are another network's.
        """
        check_weights(self.model, state["model"], "the saved state")
        self.model.load_state_dict(state["model"])
        self.restart(state["optimizer"])

    def rate(self, epoch: int, step: int = 0) -> float:
        """Learning rate of a step; 0-based epoch of the schedule and step of the epoch."""
        place = epoch * self.timeline.steps_per_epoch + step
        return learning_rate(self.cfg.optimizer.scheduler_type, self.cfg.optimizer.lr, place, self.timeline)

    def seed_draws(self, level: int, epoch: int) -> None:
        """Seeds dropout and the like: an epoch's draws depend on (seed, level, epoch, rank) alone."""
        torch.manual_seed(stable_seed(self.cfg.experiment_params.seed, level, epoch, self.ctx.rank))

    # --- an epoch ------------------------------------------------------------------------------------------------

    def new_tally(self, first: int = 0) -> Tally:
        """Zeros, for an epoch that is trained from step `first` on."""
        losses = torch.zeros(self.timeline.steps_per_epoch, dtype=torch.float64, device=self.ctx.device)
        return Tally(losses, torch.zeros((), dtype=torch.int64, device=self.ctx.device), first, first)

    def train_epoch(self, level: int, epoch: int, tally: Tally, stop: Callable[[int], bool]) -> bool:
        """Trains from step ``tally.step`` to the epoch's end; counts into `tally`.

        Args:
            stop: asked after each step, with the steps done; True ends the epoch there.

        Returns:
            whether the epoch was finished.
        """
        smoothing, train = self.cfg.optimizer.label_smoothing, self.data.train
        self.model.train()
        for images, labels in self._settled(train.batches(level, epoch, tally.step)):
            self._set_rate(self.rate(epoch, tally.step))
            with self.autocast():
                logits = self.net(images)
                loss = F.cross_entropy(logits, labels, label_smoothing=smoothing)
            loss = self._rank_part(loss, len(labels), train.global_batch(tally.step))
            self._backward(loss)
            self._clip_gradients()
            self._update()
            tally.count(loss, logits, labels)
            if stop(tally.step):
                break
        return tally.step == self.timeline.steps_per_epoch

    def autocast(self) -> contextlib.AbstractContextManager:
        """Context of a forward pass; nothing in plain float32, where to enter autocast would only take time."""
        if self.dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.ctx.device.type, dtype=self.dtype)

    def _set_rate(self, rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def _rank_part(self, loss: Tensor, images: int, global_images: int) -> Tensor:
        """This rank's part of the mean loss over the global batch, from its own mean over `images`."""
        return loss * (images / global_images) if self.ctx.world > 1 else loss

    def _backward(self, loss: Tensor) -> None:
        """Gradients of the global mean loss: DDP averages over the ranks, where their parts are to be summed."""
        self.scaler.scale(loss * self.ctx.world if self.ctx.world > 1 else loss).backward()

    def _clip_gradients(self) -> None:
        """``optimizer.grad_clip``: the norm is that of the kept weights' gradients."""
        if self.cfg.optimizer.grad_clip:
            self.scaler.unscale_(self.optimizer)
            mask_gradients(self.model)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.cfg.optimizer.grad_clip)

    def _update(self) -> None:
        """The optimizer's step, after which its hook applies the masks; gradients are freed."""
        self.scaler.step(self.optimizer)
        self.scaler.update()
        for param in self.params:  # optimizer.zero_grad's own wrapping costs 20 times as much
            param.grad = None

    def _settled(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The same batches; a process's first one is used for `_settle_buckets` first."""
        for images, labels in batches:
            if not self.buckets_settled:
                self._settle_buckets(images, labels)
            yield images, labels

    def _settle_buckets(self, images: Tensor, labels: Tensor) -> None:
        """Runs a throw-away step so that DDP rebuilds its buckets of gradients, which it does after its first step.

        With three processes and more the layout of the buckets decides in which order gradients are summed, hence the
        last bits: without this, the first step after a resume would differ from the same step of an unbroken run.
        """
        devices = [self.ctx.device] if self.ctx.device.type == "cuda" else []
        before = [buffer.clone() for buffer in self.model.buffers()]
        with torch.random.fork_rng(devices):
            with self.autocast():
                loss = F.cross_entropy(self.net(images), labels)
            loss.backward()
        self.optimizer.zero_grad(set_to_none=True)
        for buffer, value in zip(self.model.buffers(), before):
            buffer.copy_(value)
        self.buckets_settled = True

    # --- results -------------------------------------------------------------------------------------------------

    def check_finite(self, level: int, epoch: int, tally: Tally) -> list[float]:
        """The losses of the steps so far over all ranks, as `finite_losses`."""
        return finite_losses(self.ctx, self.model, tally.losses[: tally.step], level, epoch)

    def epoch_result(self, level: int, epoch: int, tally: Tally) -> tuple[float, float]:
        """(mean training loss, training accuracy in percent) over all images of the steps trained, of all ranks.

        Raises:
            RunError: see `check_finite`.
        """
        train = self.data.train
        correct = self.ctx.sum(tally.correct.clone())
        losses, right = self.check_finite(level, epoch, tally)[tally.first :], int(correct)
        sizes = [train.global_batch(step) for step in range(tally.first, tally.step)]
        return math.fsum(n * loss for n, loss in zip(sizes, losses)) / sum(sizes), 100 * right / sum(sizes)

    @torch.no_grad()
    def evaluate(self) -> tuple[float, float]:
        """(mean cross entropy, accuracy in percent) over the test set, each image counted once over all ranks.

        BN running statistics are taken from rank 0 first, so that all ranks evaluate, and rank 0 saves, one network.
        """
        self.sync_statistics()
        self.model.eval()
        sums = torch.zeros(2, dtype=torch.float64, device=self.ctx.device)
        for images, labels in self.data.test.batches():
            with self.autocast():
                logits = self.model(images)
                sums[0] += F.cross_entropy(logits, labels, reduction="sum")
            sums[1] += (logits.argmax(1) == labels).sum()
        loss, right = self.ctx.sum(sums).tolist()
        return loss / self.data.test.num_images, 100 * right / self.data.test.num_images

    def sync_statistics(self) -> None:
        """Overwrites every rank's BN running statistics with rank 0's."""
        self.ctx.broadcast_tensors([b for name, b in self.model.named_buffers() if not name.endswith(MASK_SUFFIX)])
