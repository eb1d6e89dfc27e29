"""What may move the kernels of a network's training step, each against the usual ones, in turns.

    python -m tests.benchmarks.kernels VARIANT [--config FILE] [--section.key=value ...]

VARIANT is "batch 1024", "contiguous" (NCHW instead of channels_last), or "max-autotune" (torch.compile tries out
kernels for convolutions and products). Both sides are the plain dense loop of utils/bench/contenders.py, compiled, on
random images. The last line is JSON: images/s of both, medians of 5 rounds, and the median ratio. It was not run on a
GPU yet.
"""

import json
import statistics
import sys
from collections.abc import Callable

import torch

from harness_params import Config, load_config
from utils import distributed
from utils.bench.contenders import PlainLoop, Timed, images_per_second
from utils.bench.data import load
from utils.distributed import Context
from utils.training.hardware import configure_kernels

VARIANTS: dict[str, dict] = {
    "batch 1024": {"dataset": {"batch_size": 1024}},
    "contiguous": {"experiment_params": {"channels_last": False}},
    "max-autotune": {"experiment_params": {"compile": "off"}},  # compiled here instead
}
WORDS = ["--config", "configs/cifar10_resnet18_fast.yaml", "--optimizer.lr=1e-3"]
IMAGES, ROUNDS = 20_480, 5


def timed_epoch(cfg: Config, ctx: Context, images: int, mode: str | None = None) -> Timed:
    """Trains an epoch of random images by the plain loop; `mode` is one of torch.compile's."""
    data, _ = load(cfg, ctx, images)
    loop = PlainLoop(cfg, ctx, data)
    if mode:
        loop.model.compile(dynamic=False, mode=mode)
    return lambda: loop.train(data.train.batches(0, 0), 0)


def compare(variant: str, cfg: Config, images: int = IMAGES, rounds: int = ROUNDS) -> dict[str, float]:
    """{"usual": images/s, "variant": images/s, "ratio"}."""
    made: dict[str, dict[str, Callable]] = {}
    with distributed.join() as ctx:
        made["usual"] = {"epoch": timed_epoch(cfg, ctx, images)}
        mode = "max-autotune-no-cudagraphs" if variant == "max-autotune" else None
        made["variant"] = {"epoch": timed_epoch(cfg.replace(VARIANTS[variant]), ctx, images, mode)}
        found = images_per_second(ctx, made, "epoch", rounds)
    ratio = statistics.median(b / a for a, b in zip(found["usual"], found["variant"]))
    return {**{name: statistics.median(rates) for name, rates in found.items()}, "ratio": ratio}


def main() -> None:
    variant, *words = sys.argv[1:]
    cfg = load_config([*WORDS, *words]).replace({"experiment_params": {"compile": "on"}})
    configure_kernels(cfg.experiment_params.deterministic)
    torch.manual_seed(0)
    print(json.dumps(compare(variant, cfg)))


if __name__ == "__main__":
    main()
