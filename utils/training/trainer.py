"""Training and evaluating one network for an epoch: the hot path, the same for one process and for many."""

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from harness_params import Config, ConfigError
from utils.conv_type import MASK_SUFFIX, insert_masks, keep_masked, mask_gradients
from utils.data.loaders import Data
from utils.distributed import Context
from utils.errors import RunError
from utils.models import create_model
from utils.schedulers import Timeline, learning_rate
from utils.training.hardware import autocast_dtype, compile_network, is_small_mlp
from utils.training.sparse_allreduce import gradient_hook


def make_optimizer(cfg: Config, model: nn.Module) -> torch.optim.SGD:
    """SGD, fused, with the masks kept after every step (`keep_masked`)."""
    o, params = cfg.optimizer, list(model.parameters())
    groups = [{"params": params, "weight_decay": o.weight_decay}]
    if o.no_decay_bn:  # BatchNorm's and LayerNorm's parameters and all biases are vectors; layers' weights never are
        groups[0]["params"] = [p for p in params if p.ndim > 1]
        groups.append({"params": [p for p in params if p.ndim <= 1], "weight_decay": 0.0})
    optimizer = torch.optim.SGD(groups, lr=o.lr, momentum=o.momentum, nesterov=o.nesterov, fused=True)
    if cfg.experiment_params.precision == "fp16" and o.momentum:
        # Where the loss scale overflows in the first step, the fused kernel leaves a momentum that was never written,
        # and the next step goes on with it. From zeros the first step is the same: 0 * momentum + gradient.
        for param in params:
            optimizer.state[param]["momentum_buffer"] = torch.zeros_like(param)
    keep_masked(optimizer, model)
    return optimizer


@dataclass
class Tally:
    """What an epoch has counted so far, on the device, so that no step waits for it.

    Attributes:
        losses: (steps,) this rank's part of each step's mean loss over the global batch; float64, so that sums over
            ranks come out the same however often the epoch was stopped.
        correct: (), images classified right by this rank.
        step: steps done.
        seconds: what they took in the runs before this one, when the epoch was stopped in its middle.
    """

    losses: Tensor
    correct: Tensor
    step: int = 0
    seconds: float = 0.0


class Trainer:
    """One network with its optimizer, trained epoch by epoch.

    Attributes:
        model: the bare network: what is pruned, saved and evaluated.
        net: the same, wrapped for gradient averaging when there are several processes.
        optimizer: SGD of the level in progress; `restart` makes a fresh one.
    """

    def __init__(self, cfg: Config, ctx: Context, model: nn.Module, data: Data):
        self.cfg, self.ctx, self.data, self.model = cfg, ctx, data, model
        # Rank 0's, so that machines of unlike hardware train one network.
        self.dtype = ctx.broadcast_object(autocast_dtype(cfg.experiment_params.precision, ctx.device))
        if ctx.device.type == "cpu" and not cfg.dist_params.threads and is_small_mlp(model):
            torch.set_num_threads(1)
        compile_network(cfg, ctx, model)
        self.params = list(model.parameters())
        self.net = ctx.wrap(model, gradient_hook(cfg, ctx, model))
        self.buckets_settled = ctx.world == 1
        self.timeline = Timeline(
            epochs=cfg.experiment_params.epochs_per_level,
            steps_per_epoch=data.train.steps_per_epoch,
            warmup_epochs=cfg.optimizer.warmup_epochs,
            milestones=tuple(cfg.optimizer.milestones),
            gamma=cfg.optimizer.gamma,
            floor=cfg.optimizer.lr_min / cfg.optimizer.lr,
        )
        self.restart()

    def restart(self, optimizer_state: dict[str, Any] | None = None) -> None:
        """A fresh optimizer, or one that goes on from `optimizer_state` (of `optimizer_state_dict`)."""
        self.optimizer = make_optimizer(self.cfg, self.model)
        self.scaler = torch.amp.GradScaler(self.ctx.device.type, enabled=self.dtype is torch.float16)
        if optimizer_state is not None:
            self.optimizer.load_state_dict(optimizer_state["sgd"])
            for param, state in self.optimizer.state.items():
                # The fused kernel walks both in memory order; a run resumed with another channels_last has other ones.
                if state.get("momentum_buffer") is not None:
                    state["momentum_buffer"] = torch.empty_like(param).copy_(state["momentum_buffer"])
            self.scaler.load_state_dict(optimizer_state["scaler"])

    def optimizer_state_dict(self) -> dict[str, Any]:
        """Momentum and loss scale: what `restart` needs to go on."""
        return {"sgd": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}

    def rate(self, epoch: int, step: int = 0) -> float:
        """Learning rate of a step; 0-based epoch of the schedule and step of the epoch."""
        place = epoch * self.timeline.steps_per_epoch + step
        return learning_rate(self.cfg.optimizer.scheduler_type, self.cfg.optimizer.lr, place, self.timeline)

    def new_tally(self) -> Tally:
        """Zeros, for the start of an epoch."""
        losses = torch.zeros(self.timeline.steps_per_epoch, dtype=torch.float64, device=self.ctx.device)
        return Tally(losses, torch.zeros((), dtype=torch.int64, device=self.ctx.device))

    def train_epoch(self, level: int, epoch: int, tally: Tally, stop: Callable[[int], bool]) -> bool:
        """Trains from step ``tally.step`` to the epoch's end; counts into `tally`.

        Args:
            stop: asked after each step, with the steps done; True ends the epoch there.

        Returns:
            whether the epoch was finished.
        """
        o, train = self.cfg.optimizer, self.data.train
        self.model.train()
        for images, labels in train.batches(level, epoch, tally.step):
            rate = self.rate(epoch, tally.step)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            if not self.buckets_settled:
                self._settle_buckets(images, labels)
            with self._autocast():
                logits = self.net(images)
                loss = F.cross_entropy(logits, labels, label_smoothing=o.label_smoothing)
            if self.ctx.world > 1:  # this rank's part of the global mean, however unequal the ranks' shares
                loss = loss * (len(labels) / train.global_batch(tally.step))
            # DDP averages gradients over the ranks, where a sum is wanted.
            self.scaler.scale(loss * self.ctx.world if self.ctx.world > 1 else loss).backward()
            if o.grad_clip:
                self.scaler.unscale_(self.optimizer)
                mask_gradients(self.model)
                nn.utils.clip_grad_norm_(self.model.parameters(), o.grad_clip)
            self.scaler.step(self.optimizer)
            self.scaler.update()
            for param in self.params:  # optimizer.zero_grad's own wrapping costs 20 times as much
                param.grad = None
            tally.losses[tally.step] = loss.detach()
            tally.correct += (logits.detach().argmax(1) == labels).sum()
            tally.step += 1
            if stop(tally.step):
                break
        return tally.step == self.timeline.steps_per_epoch

    def _autocast(self) -> contextlib.AbstractContextManager:
        """What a forward pass runs in: nothing in plain float32, where to enter autocast would only take time."""
        if self.dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.ctx.device.type, dtype=self.dtype)

    def _settle_buckets(self, images: Tensor, labels: Tensor) -> None:
        """One step for nothing: after its first, a process's DDP lays out its buckets of gradients anew.

        With three processes and more the layout decides in which order their gradients are summed, hence the last bits:
        without this, the first step after a resume would differ from the same step of a run that went on.
        """
        devices = [self.ctx.device] if self.ctx.device.type == "cuda" else []
        before = [buffer.clone() for buffer in self.model.buffers()]
        with torch.random.fork_rng(devices):
            with self._autocast():
                loss = F.cross_entropy(self.net(images), labels)
            loss.backward()
        self.optimizer.zero_grad(set_to_none=True)
        for buffer, value in zip(self.model.buffers(), before):
            buffer.copy_(value)
        self.buckets_settled = True

    def check_finite(self, level: int, epoch: int, tally: Tally) -> list[float]:
        """The losses of the steps so far over all ranks, once it is sure that they and the network are finite.

        All ranks call it, before a state is saved; its cost is one pass over the network and one wait for the device.

        Raises:
            RunError: a step's loss was not finite, or a gradient was while the losses were: tells where.
        """
        losses = self.ctx.sum(tally.losses.clone())[: tally.step]
        tensors = {name: t for name, t in self.model.state_dict().items() if t.is_floating_point()}
        broken = torch.stack([~t.isfinite().all() for t in tensors.values()]).to(torch.int32)
        flags = self.ctx.sum(broken)
        numbers, flags = losses.tolist(), flags.tolist()
        for step, loss in enumerate(numbers):
            if not math.isfinite(loss):
                raise RunError(f"training loss is {loss} at level {level}, epoch {epoch}, step {step}")
        for name, flag in zip(tensors, flags):
            if flag:
                raise RunError(
                    f"{name} is no longer finite at level {level}, epoch {epoch}, after step {tally.step - 1}, though "
                    "every loss was: a gradient was not"
                )
        return numbers

    def epoch_result(self, level: int, epoch: int, tally: Tally) -> tuple[float, float]:
        """(mean training loss over the epoch's images, training accuracy in percent), summed over the ranks.

        Raises:
            RunError: see `check_finite`.
        """
        train = self.data.train
        correct = self.ctx.sum(tally.correct.clone())
        losses, right = self.check_finite(level, epoch, tally), int(correct)
        sizes = [train.global_batch(step) for step in range(len(losses))]
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
            with self._autocast():
                logits = self.model(images)
                sums[0] += F.cross_entropy(logits, labels, reduction="sum")
            sums[1] += (logits.argmax(1) == labels).sum()
        loss, right = self.ctx.sum(sums).tolist()
        return loss / self.data.test.num_images, 100 * right / self.data.test.num_images

    def sync_statistics(self) -> None:
        """Overwrites every rank's BN running statistics with rank 0's."""
        self.ctx.broadcast_tensors([b for name, b in self.model.named_buffers() if not name.endswith(MASK_SUFFIX)])


def build_model(cfg: Config, data: Data, ctx: Context) -> nn.Module:
    """The network with its masks, the same on every rank, on the rank's device."""
    torch.manual_seed(cfg.experiment_params.seed)
    try:
        m = cfg.model_params
        model = create_model(m.model_name, data.num_classes, data.image_shape, m.blurpool, data.other_shapes)
        insert_masks(model, cfg.prune_params.exclude)
    except ValueError as error:
        raise ConfigError([str(error)]) from error
    if cfg.dist_params.sync_bn and ctx.world > 1:
        if ctx.device.type != "cuda":
            raise ConfigError("dist_params.sync_bn: true is not allowed here: torch has it for GPUs only")
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    memory_format = torch.channels_last if cfg.experiment_params.channels_last else torch.contiguous_format
    model = model.to(ctx.device, memory_format=memory_format)
    ctx.broadcast_tensors(list(model.state_dict().values()))
    return model
