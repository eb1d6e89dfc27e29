"""How fast is it, on this machine, against what: one table.

    python -m utils.benchmark [--config FILE] [--section.key=value ...] [--rounds 5] [--steps 20] [--synthetic N]

"plain loop" is the same network, dense, in a well-written PyTorch loop on the same data in memory
(tests/benchmarks/plain_loop.py); "usual harness" is how pruning harnesses usually do it
(tests/benchmarks/usual_harness.py). They take turns within each round. Figures are medians over the rounds with the
smallest and largest in brackets; ratios are medians of the rounds' own. A first round warms up and is not counted.
Under torchrun several processes are measured (training alone).
"""

import argparse
import dataclasses
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from torch import Tensor

from harness import build_model
from harness_params import Config, ConfigError, load_config
from tests.benchmarks import level_change, usual_harness
from tests.benchmarks.plain_loop import PlainLoop
from utils import distributed
from utils.conv_type import apply_masks
from utils.dataset import DATASETS, Data, augment_recipe, data_root, load_data
from utils.distributed import Context
from utils.memory_loader import MemoryTestLoader, MemoryTrainLoader, Normalizer
from utils.pruning_utils import prune
from utils.training import Trainer, autocast_dtype, configure_kernels

NAMES = ("ours", "plain loop", "usual harness")
DENSITY = 0.2  # of the networks that have masks
RATE = 1e-3  # too small to diverge on images without meaning; the arithmetic is the same

Arrays = tuple[np.ndarray, np.ndarray]
Figures = dict[str, list[float]]  # by contender: one a round


def machine() -> str:
    """Hardware and versions, in two lines."""
    model = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), model)
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    hardware = f"{model}, {len(os.sched_getaffinity(0))} core(s); {', '.join(gpus) or 'no GPU'}"
    versions = f"torch {torch.__version__}, torchvision {torchvision.__version__}, Python {platform.python_version()}"
    return f"{hardware}; load average {os.getloadavg()[0]:.1f}\n{versions}; {platform.system()} {platform.release()}"


# --- data ------------------------------------------------------------------------------------------------------------


def load(cfg: Config, ctx: Context, synthetic: int) -> tuple[Data, Arrays]:
    """The data, and its training arrays for the usual harness; `synthetic`: as many random images in its stead."""
    spec = DATASETS[cfg.dataset.dataset_name]
    if not synthetic:
        if spec.files is None:
            raise ConfigError([f"dataset.dataset_name: {spec.name} is a tree of files; measured with --synthetic N"])
        return load_data(cfg, ctx), spec.files.read(data_root(cfg), train=True)
    pixels = cfg.dataset.resolution or 224
    shape, classes = spec.image_shape or (3, pixels, pixels), spec.num_classes or cfg.dataset.num_classes or 1000
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (synthetic, *shape[1:], shape[0]), dtype=np.uint8)
    arrays = images, rng.integers(0, classes, synthetic)
    normalize = Normalizer(spec.mean, spec.std, shape, ctx.device, channels_last=cfg.experiment_params.channels_last)
    crop, flip = augment_recipe(cfg, spec)
    train = MemoryTrainLoader(
        *arrays, normalize, crop, flip, cfg.dataset.alternate_flip, batch_size=cfg.dataset.batch_size,
        drop_last=cfg.dataset.drop_last, seed=0, rank=ctx.rank, world=ctx.world,
    )  # fmt: skip
    test = MemoryTestLoader(images[:1000], arrays[1][:1000], normalize, ctx.rank, ctx.world)
    return Data(train, test, classes, shape), arrays


class OneBatch:
    """A training loader whose every batch is the same, and there already."""

    def __init__(self, loader: Any, channels_last: bool = True):
        images, labels = next(iter(loader.batches(0, 0)))
        self.batch = (images if channels_last else images.contiguous()), labels
        self.size, self.steps_per_epoch = loader.global_batch(0), loader.steps_per_epoch

    def global_batch(self, step: int) -> int:
        return self.size

    def batches(self, level: int = 0, epoch: int = 0, start_step: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(start_step, self.steps_per_epoch):
            yield self.batch


# --- training --------------------------------------------------------------------------------------------------------


class Ours:
    """This harness's own training code."""

    def __init__(self, cfg: Config, ctx: Context, data: Data):
        self.data, self.trainer = data, Trainer(cfg, ctx, build_model(cfg, data, ctx), data)
        prune(self.trainer.model, "mag", DENSITY)
        apply_masks(self.trainer.model)

    def train(self, loader: Any, steps: int) -> tuple[int, float]:
        """The first `steps` steps of an epoch, the reading of its counts included: (images of all ranks, seconds)."""
        self.trainer.data = dataclasses.replace(self.data, train=loader)
        start, tally = time.perf_counter(), self.trainer.new_tally()
        self.trainer.train_epoch(0, 0, tally, stop=lambda done: done == steps)
        self.trainer.epoch_result(0, 0, tally)
        return sum(map(loader.global_batch, range(tally.step))), time.perf_counter() - start


Timed = Callable[[], tuple[int, float]]


def contenders(cfg: Config, ctx: Context, data: Data, arrays: Arrays, steps: int) -> dict[str, dict[str, Timed]]:
    """{name: {what is timed: how}}; each returns (images of all ranks, seconds)."""
    ours = Ours(cfg, ctx, data)
    compiled = cfg.experiment_params.compile
    plain = PlainLoop(cfg, ctx, data, ours.trainer.dtype, compiled == "on" or (compiled == "auto" and _on_gpu(ctx)))
    told = usual_settings(cfg, data)
    loader = usual_harness.make_loader(*arrays, told, ctx.rank, ctx.world)
    usual = usual_harness.UsualHarness(told, ctx.device, ctx.world)
    usual_harness.prune(usual.model, DENSITY)
    one, contiguous = OneBatch(data.train), OneBatch(data.train, channels_last=False)
    return {
        "ours": {"step": lambda: ours.train(one, steps), "epoch": lambda: ours.train(data.train, steps)},
        "plain loop": {
            "step": lambda: plain.train(one.batches(), steps),
            "epoch": lambda: plain.train(data.train.batches(0, 0), steps),
        },
        "usual harness": {
            "step": lambda: usual.train(contiguous.batches(), steps),
            "epoch": lambda: usual.train(loader, steps),
        },
    }


def usual_settings(cfg: Config, data: Data) -> dict[str, Any]:
    """What the usual harness needs to know."""
    spec = DATASETS[cfg.dataset.dataset_name]
    crop, flip = augment_recipe(cfg, spec)
    return {
        "model": cfg.model_params.model_name, "classes": data.num_classes, "shape": list(data.image_shape),
        "mean": spec.mean, "std": spec.std, "crop": crop, "flip": flip, "batch": cfg.dataset.batch_size,
        "workers": cfg.dataset.num_workers, "lr": cfg.optimizer.lr, "momentum": cfg.optimizer.momentum,
        "weight_decay": cfg.optimizer.weight_decay, "threads": torch.get_num_threads(),
    }  # fmt: skip


def _on_gpu(ctx: Context) -> bool:
    return ctx.device.type == "cuda"


def images_a_second(ctx: Context, made: dict[str, dict[str, Timed]], what: str, rounds: int) -> Figures:
    """Rounds of all contenders in turn, each round starting with another one; the first round is left out."""
    found: Figures = {name: [] for name in made}
    names = list(made)
    for number in range(rounds + 1):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            ctx.barrier()
            images, seconds = made[name][what]()
            found[name].append(images / seconds)
    return {name: rates[1:] for name, rates in found.items()}


# --- memory ----------------------------------------------------------------------------------------------------------


def peak_memory(argv: list[str]) -> Figures:
    """Peak MB of a process that trains a few steps: of the GPU where there is one, else resident."""
    found = {}
    for name in NAMES:
        words = [sys.executable, "-m", "utils.benchmark", *argv, f"--only={name}"]
        done = subprocess.run(words, capture_output=True, text=True, cwd=Path(__file__).parents[1])
        if done.returncode:
            raise RuntimeError(f"measuring the memory of {name} failed:\n{done.stderr}")
        found[name] = [json.loads(done.stdout.splitlines()[-1])]
    return found


def train_alone(cfg: Config, ctx: Context, args: argparse.Namespace) -> float:
    """Trains a few steps of the contender ``args.only`` and returns this process's peak in MB."""
    data, arrays = load(cfg, ctx, args.synthetic)
    steps = min(3, data.train.steps_per_epoch)
    if args.only == "ours":
        Ours(cfg, ctx, data).train(data.train, steps)
    elif args.only == "plain loop":
        PlainLoop(cfg, ctx, data, autocast_dtype(cfg.experiment_params.precision, ctx.device), False).train(
            data.train.batches(0, 0), steps
        )
    else:
        told = usual_settings(cfg, data)
        data.train = data.test = None  # its data are the arrays
        loader = usual_harness.make_loader(*arrays, told)
        usual_harness.UsualHarness(told, ctx.device).train(loader, steps)
    if _on_gpu(ctx):
        return torch.cuda.max_memory_allocated() / 1e6
    # Not getrusage's ru_maxrss, which a process has from its parent when that was larger.
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 1e3


# --- the table -------------------------------------------------------------------------------------------------------


def row(what: str, found: Figures, unit: str, smaller: bool = False) -> str:
    """A line of the table: medians with the spread, and how many times better ours is than each of the others."""

    def told(values: list[float] | None) -> str:
        if not values:
            return ""
        digits = 2 if statistics.median(values) < 100 else 0
        spread = f" ({min(values):,.{digits}f}-{max(values):,.{digits}f})" if len(values) > 1 else ""
        return f"{statistics.median(values):,.{digits}f}{spread}"

    def times(name: str) -> str:
        pairs = zip(found["ours"], found.get(name, []))
        ratios = [(b / a if smaller else a / b) for a, b in pairs if a > 0]
        return f"{statistics.median(ratios):.2f}x" if ratios else ""

    cells = [f"{what}, {unit}", *(told(found.get(name)) for name in NAMES), *(times(name) for name in NAMES[1:])]
    return f"| {' | '.join(cells)} |"


def measure(cfg: Config, ctx: Context, args: argparse.Namespace, argv: list[str]) -> Iterator[str]:
    """The lines of the table, as they are found."""
    data, arrays = load(cfg, ctx, args.synthetic)
    total = data.train.steps_per_epoch
    steps = min(args.steps or total, total)
    made = contenders(cfg, ctx, data, arrays, steps)
    size, threads = cfg.dataset.batch_size, torch.get_num_threads()
    precision = str(autocast_dtype(cfg.experiment_params.precision, ctx.device) or torch.float32).removeprefix("torch.")
    yield f"{machine()}; {ctx.world} process(es) of {threads} thread(s)"
    images = f"{args.synthetic} random images of its shape" if args.synthetic else f"{data.train.num_images} images"
    yield (
        f"{cfg.model_params.model_name} on {cfg.dataset.dataset_name} ({images}), batch {size}, {precision}, "
        f"compile {cfg.experiment_params.compile}, masks at density {DENSITY}, n = {args.rounds} rounds\n"
    )
    yield f"| | {' | '.join(NAMES)} | ours / plain | ours / usual |\n|---|---|---|---|---|---|"
    yield row(f"training step (one batch, {steps} steps)", images_a_second(ctx, made, "step", args.rounds), "images/s")
    part = "an epoch" if steps == total else f"the first {steps} of {total} steps of an epoch"
    yield row(part, images_a_second(ctx, made, "epoch", args.rounds), "images/s")
    if ctx.world > 1:
        return
    made.clear()
    changes = level_change.ours(cfg, ctx, data, args.rounds)
    usual = level_change.usual(usual_settings(cfg, data), arrays, max(1, args.rounds // 2))
    found = {"ours": [c["all"] for c in changes], "usual harness": [c["all"] for c in usual]}
    yield row("between two levels", found, "s", smaller=True)
    for part in level_change.PARTS:
        yield row(f"- {part}", {"ours": [c[part] for c in changes]}, "s")
    kind = "peak GPU memory" if _on_gpu(ctx) else "peak resident memory, without loader workers"
    yield row(kind, peak_memory(argv), "MB", smaller=True)


def main(argv: list[str] | None = None) -> int:
    """Prints the table; returns 0, or 2 after a fault in the config."""
    parser = argparse.ArgumentParser(prog="python -m utils.benchmark", description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20, help="of a round; 0 = a whole epoch")
    parser.add_argument("--synthetic", type=int, default=0, metavar="N", help="N random images instead of the data set")
    parser.add_argument("--only", default="", choices=["", *NAMES], help=argparse.SUPPRESS)
    argv = sys.argv[1:] if argv is None else argv
    args, rest = parser.parse_known_args(argv)
    try:
        cfg = load_config(rest)
        o = cfg.optimizer
        cfg = cfg.replace({"optimizer": {"lr": RATE, "lr_min": o.lr_min * RATE / o.lr}})
        configure_kernels(cfg.experiment_params.deterministic)
        with distributed.join(cfg.dist_params.backend, cfg.dist_params.timeout_minutes, cfg.dist_params.threads) as ctx:
            if args.only:
                print(train_alone(cfg, ctx, args))
                return 0
            for line in measure(cfg, ctx, args, argv):
                if ctx.is_main:
                    print(line, flush=True)
    except ConfigError as error:
        for fault in error.faults:
            print(f"benchmark: {fault}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
