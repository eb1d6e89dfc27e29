"""Exactness and speed of every pruning method.

    python tests/benchmarks/pruning_table.py counts [--rounds 10] [--models resnet18 vit_b_16] [--methods snip]
    python tests/benchmarks/pruning_table.py times [--repeats 3] [--methods mag synflow]

counts: number of weights kept minus number asked for, for each method x model x density, each on a fresh dense model.
The number that synflow keeps does not depend on its rounds, so fewer than the paper's 100 are enough.
times: seconds of one prune() of ResNet-18 (32x32, 10 classes) to 5%, with one batch of 128 where batches are needed and
100 rounds of synflow: median (smallest to largest) of the repeats.
"""

import argparse
import copy
import logging
import os
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from utils.conv_type import insert_masks, masked_params
from utils.models import create_model
from utils.pruning.allocation import keep_count
from utils.pruning_utils import CRITERIA, prune

DENSITIES = [0.8, 0.5, 0.2, 0.1, 0.02, 0.01]
SHAPES = {
    "lenet_300_100": (1, 28, 28),
    "resnet18": (3, 32, 32),
    "resnet50": (3, 32, 32),
    "mobilenet_v2": (3, 32, 32),
    "vit_b_16": (3, 32, 32),
}


def dense_model(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    return insert_masks(create_model(name, 10, SHAPES[name]))


def batches(shape: tuple[int, int, int], size: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    draws = torch.Generator().manual_seed(0)
    return [(torch.randn(size, *shape, generator=draws), torch.randint(10, (size,), generator=draws))]


def counts(models: list[str], methods: list[str], rounds: int) -> None:
    print(
        "| model (layers, weights) | method |" + "".join(f" {density:g} |" for density in DENSITIES) + " dead layers |"
    )
    print("|---|---|" + "---|" * (len(DENSITIES) + 1))
    for name in models:
        dense = dense_model(name)
        sizes = [mask.numel() for _, _, mask in masked_params(dense)]
        for method in methods:
            cells, dead = [], []
            for density in DENSITIES:
                model = copy.deepcopy(dense)
                prune(model, method, density, batches(SHAPES[name], 4), rounds=rounds)
                kept = [mask.sum().item() for _, _, mask in masked_params(model)]
                cells.append(f"{sum(kept) - keep_count(density, sum(sizes)):+d}")
                dead.append(str(kept.count(0)))
            row = f"| {name} ({len(sizes)}, {sum(sizes):,}) | {method} | {' | '.join(cells)} | {' '.join(dead)} |"
            print(row, flush=True)


def times(methods: list[str], repeats: int) -> None:
    dense = dense_model("resnet18").to(memory_format=torch.channels_last)
    batch = batches(SHAPES["resnet18"], 128)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}")
    for method in methods:
        seconds, cpu = [], []
        for _ in range(repeats):
            model = copy.deepcopy(dense)
            started, cpu_started = time.perf_counter(), time.process_time()
            prune(model, method, 0.05, batch)
            seconds.append(time.perf_counter() - started)
            cpu.append(time.process_time() - cpu_started)
        middle, low, high = statistics.median(seconds), min(seconds), max(seconds)
        print(f"{method:16} {middle:7.2f} s ({low:.2f} to {high:.2f}), CPU {statistics.median(cpu):7.2f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["counts", "times"])
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--methods", nargs="+", choices=CRITERIA, default=list(CRITERIA))
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    logging.getLogger("utils.pruning_utils").setLevel(logging.ERROR)  # dead layers have a column of their own
    if options.what == "counts":
        counts(options.models, options.methods, options.rounds)
    else:
        times(options.methods, options.repeats)


if __name__ == "__main__":
    main()
