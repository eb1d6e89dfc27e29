"""How fast is it, on this machine, against what: one table.

    python -m utils.benchmark [--config FILE] [--section.key=value ...] [--rounds 5] [--steps 20] [--epoch_steps 0]
                              [--synthetic N]

"plain loop" is the same network, dense, in a well-written PyTorch loop on the same data in memory
(utils/bench/plain_loop.py); "usual harness" is how pruning harnesses usually do it
(utils/bench/usual_harness.py). They take turns within each round, each on its own number of CPU threads: ours as
the harness chooses it, the others on all that the process has. Figures are medians over the rounds with the
smallest and largest in brackets; ratios are medians of the rounds' own. A first round warms up and is not counted.
Under torchrun several processes are measured (training alone).
"""

import argparse
import contextlib
import dataclasses
import gc
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

import torch
import torchvision

from harness_params import Config, ConfigError, load_config
from utils import distributed
from utils.bench import level_change, usual_harness
from utils.bench.arithmetic import Matmul, step_flops
from utils.bench.data import Arrays, OneBatch, load
from utils.bench.plain_loop import PlainLoop
from utils.conv_type import apply_masks
from utils.data.loaders import Data, augment_recipe
from utils.data.specs import DATASETS
from utils.distributed import Context
from utils.processes.place import available_cores, started_by_launcher
from utils.pruning_utils import prune
from utils.training.hardware import autocast_dtype, configure_kernels
from utils.training.setup import build_model
from utils.training.trainer import Trainer

NAMES = ("ours", "plain loop", "usual harness")
DENSITY = 0.2  # of the networks that have masks
RATE = 1e-3  # too small to diverge on images without meaning; the arithmetic is the same

Figures = dict[str, list[float]]  # by contender: one a round


def machine() -> str:
    """Hardware and versions, in two lines."""
    model = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), model)
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    hardware = f"{model}, {available_cores()} core(s); {', '.join(gpus) or 'no GPU'}"
    versions = f"torch {torch.__version__}, torchvision {torchvision.__version__}, Python {platform.python_version()}"
    return f"{hardware}; load average {os.getloadavg()[0]:.1f}\n{versions}; {platform.system()} {platform.release()}"


# --- training --------------------------------------------------------------------------------------------------------


class Ours:
    """This harness's own training code."""

    def __init__(self, cfg: Config, ctx: Context, data: Data):
        before = torch.get_num_threads()
        self.data, self.trainer = data, Trainer(cfg, ctx, build_model(cfg, data, ctx), data)
        self.threads = torch.get_num_threads()  # the trainer's choice, made for the whole process
        torch.set_num_threads(before)
        prune(self.trainer.model, "mag", DENSITY)
        apply_masks(self.trainer.model)

    def train(self, loader: Any, steps: int) -> tuple[int, float]:
        """The first `steps` steps of an epoch, the reading of its counts included: (images of all ranks, seconds)."""
        torch.set_num_threads(self.threads)
        self.trainer.data = dataclasses.replace(self.data, train=loader)
        start, tally = time.perf_counter(), self.trainer.new_tally()
        self.trainer.train_epoch(0, 0, tally, stop=lambda done: done == steps)
        self.trainer.epoch_result(0, 0, tally)
        return sum(map(loader.global_batch, range(tally.step))), time.perf_counter() - start


Timed = Callable[[], tuple[int, float]]


def contenders(
    cfg: Config, ctx: Context, data: Data, arrays: Arrays, steps: int, epoch_steps: int
) -> tuple[dict[str, dict[str, Timed]], dict[str, int]]:
    """{name: {what is timed: how}}, where each returns (images of all ranks, seconds); {name: CPU threads}."""
    ours, plain, told = Ours(cfg, ctx, data), PlainLoop(cfg, ctx, data), usual_settings(cfg, data)
    loader = usual_harness.make_loader(*arrays, told, ctx.rank, ctx.world)
    usual = usual_harness.UsualHarness(told, ctx.device, ctx.world)
    usual_harness.prune(usual.model, DENSITY)
    one, contiguous = OneBatch(data.train), OneBatch(data.train, channels_last=False)
    made = {
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


def usual_settings(cfg: Config, data: Data) -> dict[str, Any]:
    """What the usual harness needs to know."""
    spec = DATASETS[cfg.dataset.dataset_name]
    crop, flip = augment_recipe(cfg, spec)
    return {
        "model": cfg.model_params.model_name, "blurpool": cfg.model_params.blurpool, "classes": data.num_classes,
        "shape": list(data.image_shape),
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
    if args.only != "usual harness":
        del arrays
    told = usual_settings(cfg, data)
    if args.only == "usual harness":
        data.train = data.test = None  # its data are the arrays
    forget_peak(ctx)
    if args.only == "ours":
        Ours(cfg, ctx, data).train(data.train, steps)
    elif args.only == "plain loop":
        PlainLoop(cfg, ctx, data).train(data.train.batches(0, 0), steps)
    else:
        loader = usual_harness.make_loader(*arrays, told)
        usual_harness.UsualHarness(told, ctx.device).train(loader, steps)
    if _on_gpu(ctx):
        return torch.cuda.max_memory_allocated() / 1e6
    # Not getrusage's ru_maxrss, which a process has from its parent when that was larger.
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 1e3


def forget_peak(ctx: Context) -> None:
    """Loading has a peak of its own, which is no contender's."""
    gc.collect()
    if _on_gpu(ctx):
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


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
    if total < 2:
        raise ConfigError(
            f"dataset.batch_size: {cfg.dataset.batch_size} makes an epoch of one step: nothing to measure"
        )
    steps, epoch_steps = (min(asked or total, total) for asked in (args.steps, args.epoch_steps))
    told, all_threads = usual_settings(cfg, data), torch.get_num_threads()
    made, threads = contenders(cfg, ctx, data, arrays, steps, epoch_steps)
    size, dtype = cfg.dataset.batch_size, autocast_dtype(cfg.experiment_params.precision, ctx.device)
    precision = str(dtype or torch.float32).removeprefix("torch.")
    graphs = ", CUDA graphs" if cfg.experiment_params.cuda_graphs else ""
    each = ", ".join(f"{name} {number}" for name, number in threads.items())
    yield f"{machine()}; {ctx.world} process(es), threads of each: {each}"
    images = f"{args.synthetic} random images of its shape" if args.synthetic else f"{data.train.num_images} images"
    yield (
        f"{cfg.model_params.model_name} on {cfg.dataset.dataset_name} ({images}), batch {size}, {precision}, "
        f"compile {cfg.experiment_params.compile}{graphs}, masks at density {DENSITY}, n = {args.rounds} rounds\n"
    )
    yield f"| | {' | '.join(NAMES)} | ours / plain | ours / usual |\n|---|---|---|---|---|---|"
    found = images_a_second(ctx, {**made, "matmul": {"step": Matmul(ctx, dtype).multiply}}, "step", args.rounds)
    yield row(f"training step (one batch, {steps} steps)", found, "images/s")
    flops, rates = step_flops(cfg, data), found["matmul"]
    share = {name: [100 * flops * a / b for a, b in zip(found[name], rates)] for name in NAMES}
    yield row(f"step, share of matmul rate ({statistics.median(rates) / 1e12:.3g} TFLOP/s, {precision})", share, "%")
    part = "an epoch's training" if epoch_steps == total else f"the first {epoch_steps} of {total} steps of an epoch"
    yield row(part, images_a_second(ctx, made, "epoch", args.rounds), "images/s")
    if ctx.world > 1:
        return
    made.clear()
    torch.set_num_threads(all_threads)
    changes = level_change.ours(cfg, ctx, data, args.rounds)
    usual = level_change.usual(told, arrays, max(1, args.rounds // 2))
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
    parser.add_argument("--steps", type=int, default=20, help="of a round on one batch; 0 = as many as an epoch has")
    parser.add_argument("--epoch_steps", type=int, default=0, help="of a round on the data; 0 = a whole epoch")
    parser.add_argument("--synthetic", type=int, default=0, metavar="N", help="N random images instead of the data set")
    parser.add_argument("--only", default="", choices=["", *NAMES], help=argparse.SUPPRESS)
    argv = sys.argv[1:] if argv is None else argv
    args, rest = parser.parse_known_args(argv)
    if args.rounds < 1:
        parser.error(f"--rounds: {args.rounds}: at least 1")
    try:
        cfg = load_config(rest)
        o, nproc = cfg.optimizer, cfg.dist_params.nproc
        if cfg.dist_params.distributed and nproc > 1 and not started_by_launcher():
            raise ConfigError([
                f"dist_params.nproc: {nproc} is not started from here: "
                f"torchrun --nproc_per_node={nproc} -m utils.benchmark ..."
            ])  # fmt: skip
        unlike = [key for key in ("grad_clip", "no_decay_bn") if getattr(o, key)]
        if unlike:  # it would be compared with less work
            raise ConfigError([f"optimizer.{key}: {getattr(o, key)}: the other contenders have none" for key in unlike])
        for note in cfg.notes:
            print(f"benchmark: note: {note}", file=sys.stderr)
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
