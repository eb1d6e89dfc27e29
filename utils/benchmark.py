"""Speed on this machine of this harness, a plain PyTorch loop and the usual pruning harness: one table.

    python -m utils.benchmark [--config FILE] [--section.key=value ...] [--rounds 5] [--steps 20] [--epoch_steps 0]
                              [--synthetic N]

utils/bench/contenders.py describes the three contenders. They take turns within each round. Figures are
medians over the rounds, with the smallest and largest in brackets; ratios are medians of the ratios of each round. A
first round warms up and is not counted. Under torchrun several processes are measured (training alone).
"""

import argparse
import os
import platform
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
import torchvision

from harness_params import Config, load_config
from utils import distributed
from utils.bench import level_change
from utils.bench.arithmetic import Matmul, step_flops
from utils.bench.contenders import DENSITY, NAMES, Figures, contenders, images_per_second, usual_settings
from utils.bench.data import Arrays, load
from utils.bench.memory import peak_memory, train_alone
from utils.data.loaders import Data
from utils.distributed import Context
from utils.errors import ConfigError, DataError, RunError, report
from utils.processes.place import available_cores, started_by_launcher
from utils.training.hardware import autocast_dtype, configure_kernels

RATE = 1e-3  # too small to diverge on images without meaning; the arithmetic is the same


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


# --- the table -------------------------------------------------------------------------------------------------------


def row(what: str, found: Figures, unit: str, smaller: bool = False) -> str:
    """A line of the table: medians with their spread, and how many times better ours is than each of the others."""

    def cell(values: list[float] | None) -> str:
        if not values:
            return ""
        digits = 2 if statistics.median(values) < 100 else 0
        spread = f" ({min(values):,.{digits}f}-{max(values):,.{digits}f})" if len(values) > 1 else ""
        return f"{statistics.median(values):,.{digits}f}{spread}"

    def times(name: str) -> str:
        pairs = zip(found["ours"], found.get(name, []))
        ratios = [(b / a if smaller else a / b) for a, b in pairs if a > 0]
        return f"{statistics.median(ratios):.2f}x" if ratios else ""

    cells = [f"{what}, {unit}", *(cell(found.get(name)) for name in NAMES), *(times(name) for name in NAMES[1:])]
    return f"| {' | '.join(cells)} |"


def heading(cfg: Config, ctx: Context, data: Data, threads: dict[str, int], args: argparse.Namespace) -> Iterator[str]:
    """What was measured and on what, and the table's first lines."""
    each = ", ".join(f"{name} {number}" for name, number in threads.items())
    yield f"{machine()}; {ctx.world} process(es), threads of each: {each}"
    images = f"{args.synthetic} random images of its shape" if args.synthetic else f"{data.train.num_images} images"
    graphs = "" if cfg.experiment_params.cuda_graphs == "off" else f", CUDA graphs {cfg.experiment_params.cuda_graphs}"
    yield (
        f"{cfg.model_params.model_name} on {cfg.dataset.dataset_name} ({images}), batch {cfg.dataset.batch_size}, "
        f"{_precision(cfg, ctx)}, compile {cfg.experiment_params.compile}{graphs}, masks at density {DENSITY}, "
        f"n = {args.rounds} rounds\n"
    )
    yield f"| | {' | '.join(NAMES)} | ours / plain | ours / usual |\n|---|---|---|---|---|---|"


def _precision(cfg: Config, ctx: Context) -> str:
    return str(autocast_dtype(cfg.experiment_params.precision, ctx.device) or torch.float32).partition(".")[2]


def measure(cfg: Config, ctx: Context, args: argparse.Namespace, argv: list[str]) -> Iterator[str]:
    """The lines of the table, as they are found.

    Raises:
        ConfigError: an epoch has fewer than two steps.
    """
    data, arrays = load(cfg, ctx, args.synthetic)
    if data.train.steps_per_epoch < 2:
        raise ConfigError(
            f"dataset.batch_size: {cfg.dataset.batch_size} makes an epoch of one step: nothing to measure"
        )
    all_threads = torch.get_num_threads()
    yield from training_rows(cfg, ctx, data, arrays, args)
    if ctx.world > 1:
        return
    torch.set_num_threads(all_threads)
    yield from level_rows(cfg, ctx, data, arrays, args.rounds)
    kind = "peak GPU memory" if ctx.device.type == "cuda" else "peak resident memory, without loader workers"
    yield row(kind, peak_memory(argv), "MB", smaller=True)


def training_rows(cfg: Config, ctx: Context, data: Data, arrays: Arrays, args: argparse.Namespace) -> Iterator[str]:
    """The heading; training steps on one batch, their share of the machine's matmul rate, and an epoch."""
    total = data.train.steps_per_epoch
    steps, epoch_steps = (min(asked or total, total) for asked in (args.steps, args.epoch_steps))
    made, threads = contenders(cfg, ctx, data, arrays, steps, epoch_steps)
    yield from heading(cfg, ctx, data, threads, args)
    matmul = Matmul(ctx, autocast_dtype(cfg.experiment_params.precision, ctx.device))
    found = images_per_second(ctx, {**made, "matmul": {"step": matmul.multiply}}, "step", args.rounds)
    yield row(f"training step (one batch, {steps} steps)", found, "images/s")
    flops, rates = step_flops(cfg, data), found["matmul"]
    share = {name: [100 * flops * a / b for a, b in zip(found[name], rates)] for name in NAMES}
    rate = f"{statistics.median(rates) / 1e12:.3g} TFLOP/s, {_precision(cfg, ctx)}"
    yield row(f"step, share of matmul rate ({rate})", share, "%")
    part = "an epoch's training" if epoch_steps == total else f"the first {epoch_steps} of {total} steps of an epoch"
    yield row(part, images_per_second(ctx, made, "epoch", args.rounds), "images/s")


def level_rows(cfg: Config, ctx: Context, data: Data, arrays: Arrays, rounds: int) -> Iterator[str]:
    """Time between two levels, as a whole and, of ours, in parts."""
    changes = level_change.ours(cfg, ctx, data, rounds)
    usual = level_change.usual(usual_settings(cfg, data), arrays, max(1, rounds // 2))
    found = {"ours": [c["all"] for c in changes], "usual harness": [c["all"] for c in usual]}
    yield row("between two levels", found, "s", smaller=True)
    for part in level_change.PARTS:
        yield row(f"- {part}", {"ours": [c[part] for c in changes]}, "s")


# --- the command -----------------------------------------------------------------------------------------------------


def make_parser() -> argparse.ArgumentParser:
    """Options of the benchmark; those of the config go on to `load_config`."""
    parser = argparse.ArgumentParser(prog="python -m utils.benchmark", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5, help="counted rounds; one more warms up")
    parser.add_argument(
        "--steps", type=int, default=20, help="steps per round on one batch; 0: as many as an epoch has"
    )
    parser.add_argument("--epoch_steps", type=int, default=0, help="steps per round on the data; 0: a whole epoch")
    parser.add_argument("--synthetic", type=int, default=0, metavar="N", help="N random images instead of the data set")
    parser.add_argument("--only", default="", choices=["", *NAMES], help=argparse.SUPPRESS)
    return parser


def read_config(words: list[str]) -> Config:
    """The config, at a learning rate that cannot diverge.

    Raises:
        ConfigError: faults of the config, or options that the other contenders do not have.
    """
    cfg = load_config(words)
    o, nproc = cfg.optimizer, cfg.dist_params.nproc
    if cfg.dist_params.distributed and nproc > 1 and not started_by_launcher():
        raise ConfigError(
            f"dist_params.nproc: {nproc} is not started from here: "
            f"torchrun --nproc_per_node={nproc} -m utils.benchmark ..."
        )
    unlike = [key for key in ("grad_clip", "no_decay_bn") if getattr(o, key)]
    if unlike:  # it would be compared with less work
        raise ConfigError(f"optimizer.{key}: {getattr(o, key)}: the other contenders have none" for key in unlike)
    for note in cfg.notes:
        print(f"benchmark: note: {note}", file=sys.stderr)
    return cfg.replace({"optimizer": {"lr": RATE, "lr_min": o.lr_min * RATE / o.lr}})


def main(argv: list[str] | None = None) -> int:
    """Prints the table; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    parser = make_parser()
    args, rest = parser.parse_known_args(argv)
    if args.rounds < 1:
        parser.error(f"--rounds: {args.rounds}: at least 1")
    try:
        cfg = read_config(rest)
        configure_kernels(cfg.experiment_params.deterministic)
        with distributed.join(cfg.dist_params.backend, cfg.dist_params.timeout_minutes, cfg.dist_params.threads) as ctx:
            if args.only:
                print(train_alone(cfg, ctx, args.only, args.synthetic))
                return 0
            for line in measure(cfg, ctx, args, argv):
                if ctx.is_main:
                    print(line, flush=True)
    except (ConfigError, DataError, RunError) as error:
        return report(error, "benchmark")
    return 0


if __name__ == "__main__":
    sys.exit(main())
