"""The contenders of the benchmark: this harness, a plain PyTorch loop, and the usual pruning harness.

- "ours": the training code of this harness, with masks.
- "ours, no graphs": on a GPU, the same with ``experiment_params.cuda_graphs: off``.
- "plain loop": the same network, dense, in a well-written PyTorch loop. What could be reached without pruning.
- "usual harness": masks multiplied in every forward, PIL images, `.item()` in every step; in usual_harness.py, since
  each of its levels is a process of its own.

All train on the same images, in memory. A CUDA graph of ours makes its batch too, from images in memory. So on a GPU
the step of ours and of the plain loop includes that; on a CPU it repeats one batch that is already there. Each has its
own number of CPU threads: ours as the harness chooses it, the others all that the process has.
"""

import dataclasses
import time
from collections.abc import Callable, Collection, Iterable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from harness_params import Config
from utils.bench import usual_harness
from utils.bench.data import Arrays, OneBatch
from utils.conv_type import apply_masks
from utils.data.loaders import Data, augment_recipe
from utils.data.specs import DATASETS
from utils.distributed import Context
from utils.models import create_model
from utils.pruning_utils import prune
from utils.training.compiling import compile_network
from utils.training.hardware import autocast_dtype
from utils.training.setup import build_model
from utils.training.trainer import Trainer

OURS, NO_GRAPHS, PLAIN, USUAL = "ours", "ours, no graphs", "plain loop", "usual harness"
NAMES = (OURS, NO_GRAPHS, PLAIN, USUAL)
DENSITY = 0.2  # of the networks that have masks

Figures = dict[str, list[float]]  # by contender, one per round
Timed = Callable[[], tuple[int, float]]  # runs what is timed; returns (images of all ranks, seconds)


def names_on(cfg: Config, ctx: Context, skip: Collection[str] = ()) -> tuple[str, ...]:
    """Contenders that differ here, without those of `skip`."""
    graphs = ctx.device.type == "cuda" and cfg.experiment_params.cuda_graphs != "off"
    return tuple(name for name in NAMES if name not in skip and (graphs or name != NO_GRAPHS))


def without_graphs(cfg: Config) -> Config:
    """The config of `NO_GRAPHS`."""
    return cfg.replace({"experiment_params": {"cuda_graphs": "off"}})


class Ours:
    """The training code of this harness, with a network pruned to `DENSITY`."""

    def __init__(self, cfg: Config, ctx: Context, data: Data):
        before = torch.get_num_threads()
        self.trainer = Trainer(cfg, ctx, build_model(cfg, data, ctx), data)
        self.threads = torch.get_num_threads()  # the trainer's choice, made for the whole process
        torch.set_num_threads(before)
        prune(self.trainer.model, "mag", DENSITY)
        apply_masks(self.trainer.model)

    def train(self, steps: int) -> tuple[int, float]:
        """Trains the first `steps` steps of an epoch and reads its counts; returns (images of all ranks, seconds)."""
        torch.set_num_threads(self.threads)
        start, tally = time.perf_counter(), self.trainer.new_tally()
        self.trainer.train_epoch(0, 0, tally, stop=lambda done: done == steps)
        self.trainer.finish_epoch(0, 0, tally, evaluate=False)
        return sum(map(self.trainer.data.train.global_batch, range(tally.step))), time.perf_counter() - start


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
        compile_network(cfg, ctx, self.model, data)
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
    cfg: Config,
    ctx: Context,
    data: Data,
    arrays: Arrays,
    steps: int,
    epoch_steps: int,
    names: Collection[str] = (OURS, PLAIN, USUAL),
) -> tuple[dict[str, dict[str, Timed]], dict[str, int]]:
    """Sets up the contenders `names`.

    Args:
        steps: training steps of "step", which on a CPU repeats one batch that is already there.
        epoch_steps: training steps of "epoch", which takes the data as they come.

    Returns:
        ({name: {"step": timed, "epoch": timed}}, {name: CPU threads}).
    """
    one = data.train if ctx.device.type == "cuda" else OneBatch(data.train)

    def ours(config: Config) -> tuple[Timed, Timed, int]:
        made = Ours(config, ctx, data)
        # A trainer each: a CUDA graph belongs to a loader.
        on_one = made if one is data.train else Ours(config, ctx, dataclasses.replace(data, train=one))
        return lambda: on_one.train(steps), lambda: made.train(epoch_steps), made.threads

    def plain() -> tuple[Timed, Timed, int]:
        made = PlainLoop(cfg, ctx, data)
        epoch = partial(data.train.batches, 0, 0)
        return lambda: made.train(one.batches(0, 0), steps), lambda: made.train(epoch(), epoch_steps), made.threads

    def usual() -> tuple[Timed, Timed, int]:
        settings, contiguous = usual_settings(cfg, data), OneBatch(data.train, channels_last=False)
        loader = usual_harness.make_loader(*arrays, settings, ctx.rank, ctx.world)
        made = usual_harness.UsualHarness(settings, ctx.device, ctx.world)
        usual_harness.prune(made.model, DENSITY)
        return lambda: made.train(contiguous.batches(), steps), lambda: made.train(loader, epoch_steps), made.threads

    make = {OURS: lambda: ours(cfg), NO_GRAPHS: lambda: ours(without_graphs(cfg)), PLAIN: plain, USUAL: usual}
    found = {name: make[name]() for name in names}
    timed: dict[str, dict[str, Timed]] = {n: {"step": step, "epoch": epoch} for n, (step, epoch, _) in found.items()}
    return timed, {name: threads for name, (_, _, threads) in found.items()}


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
