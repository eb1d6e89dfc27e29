"""Peak memory of each contender, measured in a process of its own that trains a few steps."""

import contextlib
import gc
import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from harness_params import Config
from utils.bench import usual_harness
from utils.bench.contenders import NO_GRAPHS, OURS, USUAL, Figures, Ours, PlainLoop, usual_settings, without_graphs
from utils.bench.data import load
from utils.bench.programs import last_line, with_this_code
from utils.distributed import Context
from utils.errors import RunError

STEPS = 3


def peak_memory(argv: list[str], names: Sequence[str]) -> Figures:
    """Peak MB of each of the contenders `names`: GPU memory where there is a GPU, else resident memory.

    Args:
        argv: the arguments of `python -m utils.benchmark`.
    """
    found = {}
    for name in names:
        command = [sys.executable, "-m", "utils.benchmark", *argv, f"--only={name}"]
        done = subprocess.run(command, capture_output=True, text=True, env=with_this_code())
        if done.returncode:
            raise RunError(f"measuring the memory of {name} failed: {last_line(done.stderr)}")
        found[name] = [json.loads(done.stdout.splitlines()[-1])]
    return found


def train_alone(cfg: Config, ctx: Context, name: str, synthetic: int) -> float:
    """Trains a few steps of one contender; returns the peak memory of this process in MB."""
    if name == USUAL:
        _train_usual(cfg, ctx, synthetic)
    else:
        _train_on_loader(cfg, ctx, name, synthetic)
    if ctx.device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e6
    # Not getrusage's ru_maxrss, which a process has from its parent when that was larger.
    status = Path("/proc/self/status").read_text()
    peak = re.search(r"VmHWM:\s+(\d+) kB", status)
    assert peak, "the kernel gives no VmHWM"
    return int(peak[1]) / 1e3


def _train_usual(cfg: Config, ctx: Context, synthetic: int) -> None:
    data, arrays = load(cfg, ctx, synthetic)
    steps, settings = min(STEPS, data.train.steps_per_epoch), usual_settings(cfg, data)
    del data  # it trains on the arrays alone
    forget_peak(ctx)
    loader = usual_harness.make_loader(*arrays, settings)
    usual_harness.UsualHarness(settings, ctx.device).train(loader, steps)


def _train_on_loader(cfg: Config, ctx: Context, name: str, synthetic: int) -> None:
    data = load(cfg, ctx, synthetic)[0]  # without the arrays
    steps = min(STEPS, data.train.steps_per_epoch)
    forget_peak(ctx)
    if name in (OURS, NO_GRAPHS):
        Ours(without_graphs(cfg) if name == NO_GRAPHS else cfg, ctx, data).train(steps)
    else:
        PlainLoop(cfg, ctx, data).train(data.train.batches(0, 0), steps)


def forget_peak(ctx: Context) -> None:
    """Reset the peak: loading the data does not count."""
    gc.collect()
    if ctx.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
