"""The contenders of the benchmark: this harness, a plain PyTorch loop, and the usual pruning harness.

- "ours": the training code of this harness, with masks.
- "plain loop": the same network, dense, in a well-written PyTorch loop. What could be reached without pruning.
- "usual harness": masks multiplied in every forward, PIL images, `.item()` in every step; in usual_harness.py, since
  each of its levels is a process of its own.

All train on the same images, in memory. Each has its own number of CPU threads: ours as the harness chooses it, the
others all that the process has.
"""

import dataclasses
import time
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.nn import functional as F

from harness_params import Config
from utils.bench import usual_harness
from utils.bench.data import Arrays, OneBatch
from utils.conv_type import apply_masks
from utils.data.loaders import Data, TrainLoader, augment_recipe
from utils.data.specs import DATASETS
from utils.distributed import Context
from utils.models import create_model
from utils.pruning_utils import prune
from utils.training.hardware import autocast_dtype, compile_network
from utils.training.setup import build_model
from utils.training.trainer import Trainer

NAMES = ("ours", "plain loop", "usual harness")
DENSITY = 0.2  # of the networks that have masks

Figures = dict[str, list[float]]  # by contender, one per round
Timed = Callable[[], tuple[int, float]]  # runs what is timed; returns (images of all ranks, seconds)


class Ours:
    """The training code of this harness, with a network pruned to `DENSITY`."""

    def __init__(self, cfg: Config, ctx: Context, data: Data):
        before = torch.get_num_threads()
        self.data, self.trainer = data, Trainer(cfg, ctx, build_model(cfg, data, ctx), data)
        self.threads = torch.get_num_threads()  # the trainer's choice, made for the whole process
        torch.set_num_threads(before)
        prune(self.trainer.model, "mag", DENSITY)
        apply_masks(self.trainer.model)

    def train(self, loader: TrainLoader, steps: int) -> tuple[int, float]:
        """Trains the first `steps` steps of an epoch and reads its counts; returns (images of all ranks, seconds)."""
        torch.set_num_threads(self.threads)
        self.trainer.data = dataclasses.replace(self.data, train=loader)
        start, tally = time.perf_counter(), self.trainer.new_tally()
        self.trainer.train_epoch(0, 0, tally, stop=lambda done: done == steps)
        self.trainer.epoch_result(0, 0, tally)
        return sum(map(loader.global_batch, range(tally.step))), time.perf_counter() - start


class PlainLoop:
    """The same network, dense, in a well-written PyTorch loop: no masks and no harness.

    Images already on the device, channels_last, autocast, fused SGD, no wait for the device within an epoch; in the
    precision and compiled as the config says.
    """

    def __init__(self, cfg: Config, ctx: Context, data: Data):
        torch.manual_seed(cfg.experiment_params.seed)
        self.dtype = autocast_dtype(cfg.experiment_params.precision, ctx.device)
        self.device, self.world = ctx.device, ctx.world
        self.smoothing, self.threads = cfg.optimizer.label_smoothing, torch.get_num_threads()
        layout = torch.channels_last if cfg.experiment_params.channels_last else torch.contiguous_format
        m = cfg.model_params
        model = create_model(
            m.model_name, data.num_classes, data.image_shape, blurpool=m.blurpool, arguments=m.model_args
        )
        self.model = model.to(ctx.device).to(memory_format=layout)
        compile_network(cfg, ctx, self.model)
        self.net = ctx.wrap(self.model)
        o = cfg.optimizer
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), o.lr, o.momentum, weight_decay=o.weight_decay, nesterov=o.nesterov, fused=True
        )
        self.scaler = torch.amp.GradScaler(ctx.device.type, enabled=self.dtype is torch.float16)

    def train(self, batches: Iterable[tuple[Tensor, Tensor]], steps: int) -> tuple[int, float]:
        """Trains on the first `steps` of `batches`; returns (images of all ranks, seconds)."""
        torch.set_num_threads(self.threads)
        start, seen = time.perf_counter(), 0
        total, correct = torch.zeros((), device=self.device), torch.zeros((), dtype=torch.int64, device=self.device)
        self.net.train()
        for step, (images, labels) in enumerate(batches, start=1):
            with torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype is not None):
                logits = self.net(images)
                loss = F.cross_entropy(logits, labels, label_smoothing=self.smoothing)
            self.scaler.scale(loss).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.optimizer.zero_grad(set_to_none=True)
            total += loss.detach()
            correct += (logits.detach().argmax(1) == labels).sum()
            seen += len(labels)
            if step == steps:
                break
        total.item(), correct.item()  # the epoch's one wait for the device
        return seen * self.world, time.perf_counter() - start


def usual_settings(cfg: Config, data: Data) -> usual_harness.Settings:
    """The config, as the usual harness reads it."""
    spec = DATASETS[cfg.dataset.dataset_name]
    crop, flip = augment_recipe(cfg, spec)
    return {
        "model": cfg.model_params.model_name, "blurpool": cfg.model_params.blurpool, "classes": data.num_classes,
        "shape": data.image_shape, "arguments": cfg.model_params.model_args,
        "mean": spec.mean, "std": spec.std, "crop": crop, "flip": flip, "batch": cfg.dataset.batch_size,
        "workers": cfg.dataset.num_workers, "lr": cfg.optimizer.lr, "momentum": cfg.optimizer.momentum,
        "weight_decay": cfg.optimizer.weight_decay, "threads": torch.get_num_threads(),
    }  # fmt: skip


def contenders(
    cfg: Config, ctx: Context, data: Data, arrays: Arrays, steps: int, epoch_steps: int
) -> tuple[dict[str, dict[str, Timed]], dict[str, int]]:
    """Sets up all contenders.

    Args:
        steps: training steps of "step", which repeats one batch that is already there.
        epoch_steps: training steps of "epoch", which takes the data as they come.

    Returns:
        ({name: {"step": timed, "epoch": timed}}, {name: CPU threads}).
    """
    ours, plain, settings = Ours(cfg, ctx, data), PlainLoop(cfg, ctx, data), usual_settings(cfg, data)
    loader = usual_harness.make_loader(*arrays, settings, ctx.rank, ctx.world)
    usual = usual_harness.UsualHarness(settings, ctx.device, ctx.world)
    usual_harness.prune(usual.model, DENSITY)
    one, contiguous = OneBatch(data.train), OneBatch(data.train, channels_last=False)
    made: dict[str, dict[str, Timed]] = {
        "ours": {"step": lambda: ours.train(one, steps), "epoch": lambda: ours.train(data.train, epoch_steps)},
        "plain loop": {
            "step": lambda: plain.train(one.batches(), steps),
            "epoch": lambda: plain.train(data.train.batches(0, 0), epoch_steps),
        },
        "usual harness": {
            "step": lambda: usual.train(contiguous.batches(), steps),
            "epoch": lambda: usual.train(loader, epoch_steps),
        },
    }
    return made, dict(zip(NAMES, (ours.threads, plain.threads, usual.threads)))


def images_per_second(ctx: Context, made: dict[str, dict[str, Timed]], what: str, rounds: int) -> Figures:
    """Times all contenders in turn, each round starting with another one; the first round is left out."""
    found: Figures = {name: [] for name in made}
    names = list(made)
    for number in range(rounds + 1):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            ctx.barrier()
            images, seconds = made[name][what]()
            found[name].append(images / seconds)
    return {name: rates[1:] for name, rates in found.items()}
