"""Speed on this machine of this harness, a plain PyTorch loop and the usual pruning harness: one table.

    python -m utils.benchmark [--config FILE] [--section.key=value ...] [--rounds 5] [--steps 20] [--epoch_steps 0]
                              [--synthetic N] [--skip usual,levels,memory]

utils/bench/contenders.py describes the contenders, three on a CPU and four on a GPU. They take turns within each round.
Figures are medians over the rounds, with the smallest and largest in brackets; ratios are medians of the ratios of each
round. A first round, with CUDA graphs the first four, warms up and is not counted. Under torchrun several processes are
measured (training alone). The step is set beside two limits of the machine, the rates at which it multiplies matrices
and copies memory: by the FLOPs of the dense network, and by the bytes that `utils.training.work.Work.moved` counts.
"""

import argparse
import os
import platform
import statistics
import sys
from collections.abc import Iterator, Sequence

import torch
import torchvision

from harness_params import Config, load_config
from utils import distributed
from utils.bench import level_change
from utils.bench.arithmetic import Copy, Matmul, step_bytes, step_flops
from utils.bench.contenders import (
    DENSITY,
    NAMES,
    OURS,
    PLAIN,
    USUAL,
    Figures,
    contenders,
    images_per_second,
    names_on,
    usual_settings,
)
from utils.bench.data import Arrays, load
from utils.bench.memory import peak_memory, train_alone
from utils.data.loaders import Data
from utils.distributed import Context
from utils.errors import ConfigError, report
from utils.output import best_effort_streams, note, say
from utils.processes.place import available_cores, started_by_launcher
from utils.runs.environment import processor
from utils.training.caller import left_as_found
from utils.training.hardware import autocast_dtype, configure_kernels

PROGRAM = "benchmark"
SKIPPED = {"usual": "the usual harness", "levels": "the time between two levels", "memory": "peak memory"}
RATE = 1e-3  # too small to diverge on images without meaning; the arithmetic is the same


def machine() -> str:
    """Hardware and versions, in two lines."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    hardware = f"{processor()}, {available_cores()} core(s); {', '.join(gpus) or 'no GPU'}"
    versions = f"torch {torch.__version__}, torchvision {torchvision.__version__}, Python {platform.python_version()}"
    return f"{hardware}; load average {os.getloadavg()[0]:.1f}\n{versions}; {platform.system()} {platform.release()}"


# --- the table -------------------------------------------------------------------------------------------------------


def row(
    what: str, found: Figures, unit: str, smaller: bool = False, names: Sequence[str] = (OURS, PLAIN, USUAL)
) -> str:
    """A line of the table: medians with their spread, and how many times better ours is than each of the others."""

    def cell(values: list[float] | None) -> str:
        if not values:
            return ""
        digits = 2 if statistics.median(values) < 100 else 0
        spread = f" ({min(values):,.{digits}f}-{max(values):,.{digits}f})" if len(values) > 1 else ""
        return f"{statistics.median(values):,.{digits}f}{spread}"

    def times(name: str) -> str:
        pairs = zip(found[OURS], found.get(name, []))
        ratios = [(b / a if smaller else a / b) for a, b in pairs if a > 0]
        return f"{statistics.median(ratios):.2f}x" if ratios else ""

    cells = [f"{what}, {unit}", *(cell(found.get(name)) for name in names), *(times(name) for name in names[1:])]
    return f"| {' | '.join(cells)} |"


def heading(cfg: Config, ctx: Context, data: Data, threads: dict[str, int], args: argparse.Namespace) -> Iterator[str]:
    """What was measured and on what, and the table's first lines; a column for each contender of `threads`."""
    each = ", ".join(f"{name} {number}" for name, number in threads.items())
    yield f"{machine()}; {ctx.world} process(es), threads of each: {each}"
    images = f"{args.synthetic} random images of its shape" if args.synthetic else f"{data.train.num_images} images"
    graphs = f", cuda_graphs {cfg.experiment_params.cuda_graphs}" if ctx.device.type == "cuda" else ""
    yield (
        f"{cfg.model_params.model_name} on {cfg.dataset.dataset_name} ({images}), batch {cfg.dataset.batch_size}, "
        f"{_precision(cfg, ctx)}, compile {cfg.experiment_params.compile}{graphs}, masks at density {DENSITY}, "
        f"n = {args.rounds} rounds\n"
    )
    short = {name: name.removeprefix("ours, ").removesuffix(" loop").removesuffix(" harness") for name in threads}
    columns = [*threads, *(f"ours / {short[name]}" for name in list(threads)[1:])]
    yield f"| | {' | '.join(columns)} |\n|{'---|' * (len(columns) + 1)}"


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
    all_threads, names = torch.get_num_threads(), names_on(cfg, ctx, [USUAL] if "usual" in args.skip else [])
    yield from training_rows(cfg, ctx, data, arrays, args, names)
    if ctx.world > 1:
        return
    torch.set_num_threads(all_threads)
    if "levels" not in args.skip:
        yield from level_rows(cfg, ctx, data, arrays, args.rounds, names)
    if "memory" not in args.skip:
        kind = "peak GPU memory" if ctx.device.type == "cuda" else "peak resident memory, without loader workers"
        yield row(kind, peak_memory(argv, names), "MB", smaller=True, names=names)


def training_rows(
    cfg: Config, ctx: Context, data: Data, arrays: Arrays, args: argparse.Namespace, names: Sequence[str]
) -> Iterator[str]:
    """The heading; training steps, their share of the machine's matmul and copy rates, and an epoch."""
    total, dtype = data.train.steps_per_epoch, autocast_dtype(cfg.experiment_params.precision, ctx.device)
    steps, epoch_steps = (min(asked or total, total) for asked in (args.steps, args.epoch_steps))
    made, threads = contenders(cfg, ctx, data, arrays, steps, epoch_steps, names)
    yield from heading(cfg, ctx, data, threads, args)
    limits = {"matmul": {"step": Matmul(ctx, dtype).multiply}, "copy": {"step": Copy(ctx).copy}}
    found = images_per_second(ctx, {**made, **limits}, "step", args.rounds)
    of = "one batch, " if ctx.device.type == "cpu" else "its batch's making included, "
    yield row(f"training step ({of}{steps} steps)", found, "images/s", names=names)
    for what, per_image, unit, detail in (
        ("matmul", step_flops(cfg, data), "FLOP", _precision(cfg, ctx)),
        ("copy", step_bytes(cfg, data, dtype), "B", "read and written"),
    ):
        rates = found[what]
        share = {name: [100 * per_image * a / b for a, b in zip(found[name], rates)] for name in names}
        rate = f"{statistics.median(rates) / 1e12:.3g} T{unit}/s, {detail}; {per_image / 1e6:.3g} M{unit} per image"
        yield row(f"step, share of {what} rate ({rate})", share, "%", names=names)
    part = "an epoch's training" if epoch_steps == total else f"the first {epoch_steps} of {total} steps of an epoch"
    yield row(part, images_per_second(ctx, made, "epoch", args.rounds), "images/s", names=names)


def level_rows(
    cfg: Config, ctx: Context, data: Data, arrays: Arrays, rounds: int, names: Sequence[str]
) -> Iterator[str]:
    """Time between two levels, as a whole and, of ours, in parts."""
    changes = level_change.ours(cfg, ctx, data, rounds)
    found = {OURS: [c["all"] for c in changes]}
    if USUAL in names:
        usual = level_change.usual(usual_settings(cfg, data), arrays, max(1, rounds // 2))
        found[USUAL] = [c["all"] for c in usual]
    yield row("between two levels", found, "s", smaller=True, names=names)
    for part in level_change.PARTS:
        yield row(f"- {part}", {OURS: [c[part] for c in changes]}, "s", names=names)


# --- the command -----------------------------------------------------------------------------------------------------


def make_parser() -> argparse.ArgumentParser:
    """Options of the benchmark; those of the config go on to `load_config`."""
    parser = argparse.ArgumentParser(prog="python -m utils.benchmark", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5, help="counted rounds, after those that warm up")
    parser.add_argument(
        "--steps", type=int, default=20, help="steps per round on one batch; 0: as many as an epoch has"
    )
    parser.add_argument("--epoch_steps", type=int, default=0, help="steps per round on the data; 0: a whole epoch")
    parser.add_argument("--synthetic", type=int, default=0, metavar="N", help="N random images instead of the data set")
    parser.add_argument("--skip", type=_parts, default=(), metavar="PART,...", help=_skip_help())
    parser.add_argument("--only", default="", choices=["", *NAMES], help=argparse.SUPPRESS)
    return parser


def _parts(text: str) -> tuple[str, ...]:
    names = tuple(filter(None, text.split(",")))
    if unknown := [name for name in names if name not in SKIPPED]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is not allowed: {', '.join(SKIPPED)}")
    return names


def _skip_help() -> str:
    return "parts to leave out: " + "; ".join(f"{name} = {what}" for name, what in SKIPPED.items())


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
    if o.optimizer_name != "sgd":
        raise ConfigError(f"optimizer.optimizer_name: {o.optimizer_name} is not allowed here: all contenders use sgd")
    unlike = [key for key in ("grad_clip", "no_decay_bn") if getattr(o, key)]
    if unlike:  # it would be compared with less work
        raise ConfigError(f"optimizer.{key}: {getattr(o, key)}: the other contenders have none" for key in unlike)
    note(*cfg.notes)
    return cfg.replace({"optimizer": {"lr": RATE, "lr_min": o.lr_min * RATE / o.lr}})


def main(argv: list[str] | None = None) -> int:
    """Prints the table; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    parser = make_parser()
    args, rest = parser.parse_known_args(argv)
    if args.rounds < 1:
        parser.error(f"--rounds: {args.rounds}: at least 1")
    try:
        with left_as_found(PROGRAM):
            cfg = read_config(rest)
            d = cfg.dist_params
            configure_kernels(cfg.experiment_params.deterministic)
            with distributed.join(d.backend, d.timeout_minutes, d.threads) as ctx:
                if args.only:
                    say(str(train_alone(cfg, ctx, args.only, args.synthetic)))
                    return 0
                for line in measure(cfg, ctx, args, argv):
                    if ctx.is_main:
                        say(line)
    except Exception as error:  # a fault of the user's, or a bug: one clear line comes last
        return report(error, PROGRAM)
    return 0


if __name__ == "__main__":
    best_effort_streams(PROGRAM)
    sys.exit(main())
