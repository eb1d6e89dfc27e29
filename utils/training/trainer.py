"""Training and evaluating one network for an epoch: the hot path, the same for one process and for many."""

import contextlib
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from harness_params import Config
from utils.conv_type import mask_gradients
from utils.data.loaders import Batch, Data, ResidentLoader
from utils.distributed import Context
from utils.schedulers import learning_rate
from utils.seeds import stable_seed
from utils.state_dicts import check_weights
from utils.training.average import WeightAverage
from utils.training.buckets import settle_buckets
from utils.training.compiling import compile_network, compile_parts
from utils.training.evaluation import Evaluation, sync_statistics
from utils.training.graphs import CudaGraphs, StepGraphs, choose_graphs
from utils.training.hardware import autocast, autocast_dtype, limit_threads
from utils.training.setup import make_timeline, optimizer_state, set_rate, start_optimizer
from utils.training.sparse_allreduce import gradient_hook
from utils.training.tally import FiniteCheck, Tally, finite_losses, training_figures


class Trainer:
    """One network with its optimizer, trained epoch by epoch.

    Attributes:
        graphs_class: what captures CUDA graphs; tests put a recorder for the CPU here.
        model: the bare network: what is pruned, saved and evaluated.
        net: the same network; with several processes, wrapped so that gradients are averaged over them.
        compiled: parts of the run that torch.compile has compiled (`utils.training.compiling.PARTS`).
        optimizer: that of the level in progress; `restart` makes a fresh one.
        graphs: the training steps as CUDA graphs; None where each kernel is launched by itself.
        evaluation: counts what the network comes to on the test set and the validation images.
        average: moving average of the weights; None without ``ema_decay``.
    """

    graphs_class: type[CudaGraphs] = CudaGraphs

    def __init__(self, cfg: Config, ctx: Context, model: nn.Module, data: Data):
        self.cfg, self.ctx, self.data, self.model = cfg, ctx, data, model
        # Rank 0's, so that machines of unlike hardware train one network.
        self.dtype = ctx.broadcast_object(autocast_dtype(cfg.experiment_params.precision, ctx.device))
        limit_threads(cfg, ctx, model)
        self.compiled = compile_network(cfg, ctx, model, data)
        self.params = list(model.parameters())
        self.net = ctx.wrap(model, gradient_hook(cfg, ctx, model))
        self.buckets_settled = ctx.world == 1
        self.timeline = make_timeline(cfg, data)
        decay = cfg.experiment_params.ema_decay
        self.average = WeightAverage(model, decay) if decay else None
        self._set_up_graphs()
        self.restart()

    def autocast(self) -> contextlib.AbstractContextManager:
        """Context of a forward pass in `dtype`, which resuming may change: ``precision: auto`` stays what it was."""
        return autocast(self.ctx.device, self.dtype)

    def compile(self, parts: Collection[str]) -> None:
        """Compiles these parts of the run and no others; to be called before the first step."""
        compile_parts(self.ctx, self.model, self.data, parts)
        self.compiled = parts

    def _set_up_graphs(self) -> None:
        self.graphs: StepGraphs | None = None
        self.own_stream: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext
        graphs = choose_graphs(self.cfg, self.ctx, self.data, self.dtype, self.graphs_class)
        if graphs:
            assert isinstance(self.data.train, ResidentLoader)
            self.graphs = StepGraphs(graphs, self.model, self.data.train, self._step)
            self.own_stream = graphs.own_stream
        self.evaluation = Evaluation(self.ctx, self.model, self.data, self.autocast, graphs)

    # --- the optimizer and its schedule --------------------------------------------------------------------------

    def restart(self, state: dict[str, Any] | None = None) -> None:
        """Makes a fresh optimizer, or one that goes on from `state` (of `optimizer_state_dict`).

        The average of the weights starts anew.
        """
        self.optimizer, self.scaler = start_optimizer(self.cfg, self.model, self.dtype, state)
        if self.average:
            self.average.restart()
        if self.graphs:
            self.graphs.drop()

    def optimizer_state_dict(self) -> dict[str, Any]:
        """Momentum or moments, and loss scale: what `restart` needs to go on."""
        return optimizer_state(self.optimizer, self.scaler)

    def state_dict(self) -> dict[str, Any]:
        """Weights, BatchNorm statistics and masks, and the optimizer's state; tensors are the device's own."""
        average = {"ema": self.average.state_dict()} if self.average else {}
        return {"model": self.model.state_dict(), "optimizer": self.optimizer_state_dict(), **average}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up a `state_dict`, in place.

        Raises:
            RunError: names or shapes are another network's.
        """
        check_weights(self.model, state["model"], "the saved state")
        self.model.load_state_dict(state["model"])
        self.restart(state["optimizer"])
        if self.average and "ema" in state:  # not where a level starts again from the checkpoint before it
            self.average.load_state_dict(state["ema"])

    def rate(self, epoch: int, step: int = 0) -> float:
        """Learning rate of a step; 0-based epoch of the schedule and step of the epoch."""
        place = epoch * self.timeline.steps_per_epoch + step
        return learning_rate(self.cfg.optimizer.scheduler_type, self.cfg.optimizer.lr, place, self.timeline)

    def seed_draws(self, level: int, epoch: int) -> None:
        """Seeds dropout and the like: an epoch's draws depend on (seed, level, epoch, rank) alone."""
        torch.manual_seed(stable_seed(self.cfg.experiment_params.seed, level, epoch, self.ctx.rank))

    # --- an epoch ------------------------------------------------------------------------------------------------

    def new_tally(self, first: int = 0) -> Tally:
        """Zeros, for an epoch that is trained from step `first` on; the tally before is no longer valid."""
        if self.graphs:
            return self.graphs.new_tally(first)
        losses = torch.zeros(self.timeline.steps_per_epoch, dtype=torch.float64, device=self.ctx.device)
        return Tally(losses, torch.zeros((), dtype=torch.int64, device=self.ctx.device), first, first)

    def train_epoch(self, level: int, epoch: int, tally: Tally, stop: Callable[[int], bool]) -> bool:
        """Trains from step ``tally.step`` to the epoch's end; counts into `tally`.

        Args:
            stop: asked after each step, with the steps done; True ends the epoch there.

        Returns:
            whether the epoch was finished.
        """
        self.model.train()
        tally.begin()
        steps = self._graph_steps if self.graphs else self._steps
        with self.own_stream():
            for _ in steps(level, epoch, tally):
                if stop(tally.step):
                    break
        tally.end()
        return tally.step == self.timeline.steps_per_epoch

    def _steps(self, level: int, epoch: int, tally: Tally) -> Iterator[None]:
        """Trains on the loader's batches from ``tally.step`` on, one step per item."""
        train = self.data.train
        for images, labels in self._settled(train.batches(level, epoch, tally.step)):
            set_rate(self.optimizer, self.rate(epoch, tally.step))
            loss, logits = self._step((images, labels), len(labels) / train.global_batch(tally.step))
            tally.count(loss, logits, labels)
            yield

    def _graph_steps(self, level: int, epoch: int, tally: Tally) -> Iterator[None]:
        """The same, each step launched as one CUDA graph."""
        assert self.graphs
        rates = [self.rate(epoch, step) for step in range(self.timeline.steps_per_epoch)]
        return self.graphs.steps(level, epoch, rates, self.optimizer, tally)

    def _step(self, batch: Batch, share: float = 1.0) -> tuple[Tensor, Tensor]:
        """One step of training; returns this rank's part of the loss, and the logits (N, classes).

        Args:
            share: this rank's images over those of the global batch.
        """
        images, labels = batch
        with self.autocast():
            logits = self.net(images)
            loss = F.cross_entropy(logits, labels, label_smoothing=self.cfg.optimizer.label_smoothing)
        loss = self._rank_part(loss, share)
        self._backward(loss)
        self._clip_gradients()
        self._update()
        return loss, logits

    def _rank_part(self, loss: Tensor, share: float) -> Tensor:
        """This rank's part of the mean loss over the global batch, from its own mean over its `share` of the images."""
        return loss * share if self.ctx.world > 1 else loss

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
        if self.average:
            self.average.update()

    def _settled(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The same batches; a process's first one is used for `settle_buckets` first."""
        for images, labels in batches:
            if not self.buckets_settled:
                settle_buckets(self.net, images, labels, self.autocast)
                self.buckets_settled = True
            yield images, labels

    # --- results -------------------------------------------------------------------------------------------------

    def check_finite(self, level: int, epoch: int, tally: Tally) -> list[float]:
        """The losses of the steps so far over all ranks, as `finite_losses`."""
        return finite_losses(self.ctx, self.model, tally.losses[: tally.step], level, epoch)

    def finish_epoch(self, level: int, epoch: int, tally: Tally, evaluate: bool) -> dict[str, float]:
        """Evaluates, if asked to, and reads what the epoch came to: the one time that an epoch waits for the device.

        All ranks call it together.

        Returns:
            over all ranks, by the columns of the CSVs: `training_figures` of the steps trained, and
            `Evaluation.figures`, which are NaN without evaluation.

        Raises:
            RunError: see `check_finite`.
        """
        check = FiniteCheck(self.model, tally.losses[: tally.step])
        counted = self._counted(evaluate)
        counts = self.ctx.sum(torch.cat([tally.correct.double().view(1), counted.flatten(), check.flags]))
        if epoch + 1 < self.timeline.epochs:
            self.data.train.draw_ahead(level, epoch + 1)
        right, *rest = counts.tolist()
        sums, answer = rest[: counted.numel()], rest[counted.numel() :]
        losses = check.losses(answer, level, epoch)[tally.first :]
        sizes = [self.data.train.global_batch(step) for step in range(tally.first, tally.step)]
        return training_figures(losses, sizes, right, tally.training_seconds()) | self.evaluation.figures(sums)

    def evaluate(self) -> tuple[float, float]:
        """(mean cross entropy, accuracy in percent) over the test set, each image counted once over all ranks."""
        figures = self.evaluation.read(self.evaluation.count())
        return figures["test_loss"], figures["test_acc"]

    def _counted(self, evaluate: bool) -> Tensor:
        """float64 (networks * sets, 2): `Evaluation.count` of the network, and of its average if there is one."""
        count = self.evaluation.count if evaluate else self.evaluation.not_counted
        counted = count()
        if not self.average:
            return counted
        with self.average.in_place() if evaluate else contextlib.nullcontext():
            return torch.cat([counted, count()])

    def sync_statistics(self) -> None:
        """Overwrites every rank's BN running statistics with rank 0's."""
        sync_statistics(self.ctx, self.model)
