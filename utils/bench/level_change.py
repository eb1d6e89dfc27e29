"""Time between two levels: from the last step of one to the first step of the next.

Without the evaluation that ends a level. Ours has the one right after pruning in it (``pruned_test_acc``), which the
usual harness does not make.

Ours: a whole run of `Harness` in a temporary directory, with levels of a few steps, on random images. The usual
harness: a new process per level (usual_harness.py).
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from harness import Harness
from harness_params import Config
from harness_utils import open_run
from utils.bench.data import random_images
from utils.bench.programs import last_line, with_this_code
from utils.bench.usual_harness import Settings, lay_out
from utils.data.loaders import Data
from utils.distributed import Context
from utils.errors import RunError
from utils.runs.saving import SaveClock
from utils.training.setup import build_model
from utils.training.trainer import Trainer

PARTS = ("checkpoint handed over", "prune and evaluate", "rewind", "first batch")


class Clock:
    """A `Stop` that never stops, and notes when each step ends."""

    signum, save_due = 0, False

    def __init__(self, device: torch.device):
        self.device, self.clock = device, SaveClock()
        self.ends: list[float] = []

    def __call__(self, steps: int) -> bool:
        self.ends.append(self.now())
        return False

    def agreed(self) -> bool:
        return False

    def hold_signals(self) -> None:
        pass

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def ours(cfg: Config, ctx: Context, data: Data, changes: int, steps: int = 4) -> list[dict[str, float]]:
    """Seconds of each of `PARTS` and their sum ("all"), for each of so many level changes.

    "first batch" is the time of the level's first step less that of a later one. Meanwhile the last level's checkpoint
    may still be written in the background: what that costs is measured by tests/benchmarks/saving.py, not here.
    """
    e, rows = cfg.experiment_params, []
    # Images held in memory, as those of the run are: a loader of another kind would not be captured in a CUDA graph.
    few, _ = random_images(cfg, ctx, steps * data.train.batch_size, data.image_shape, data.num_classes)
    with tempfile.TemporaryDirectory() as folder:
        cfg = cfg.replace({
            "experiment_params": {"base_dir": folder, "epochs_per_level": 1 + (e.training_type == "wr")},
            "prune_params": {"num_levels": changes + 2, "rewind_epoch": 1},
            "optimizer": {"scheduler_type": "Constant", "milestones": [], "warmup_epochs": 0, "lr_min": 0},
        })  # fmt: skip
        with open_run(cfg) as run:
            clock = Clock(ctx.device)
            harness = Harness(cfg, ctx, Trainer(cfg, ctx, build_model(cfg, few, ctx), few), run, clock)
            marks: list[float] = []
            while harness.position.level < cfg.prune_params.num_levels:
                for step in (harness.prune, harness.rewind):
                    step()
                    marks.append(clock.now())
                clock.ends.clear()
                harness.train_level()
                if len(marks) == 4:
                    step_seconds = statistics.median(b - a for a, b in zip(clock.ends, clock.ends[1:]))
                    found = [b - a for a, b in zip(marks, [*marks[1:], clock.ends[0] - step_seconds])]
                    rows.append(dict(zip(PARTS, found)) | {"all": sum(found)})
                marks = [clock.now()]
                harness.finish_level()
                marks.append(clock.now())
    return rows[1:]  # the first change is a warm-up


def usual(settings: Settings, arrays: tuple[np.ndarray, np.ndarray], changes: int) -> list[dict[str, float]]:
    """Seconds from the start of a level's process to its first step ("all"), for each of so many level changes."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        lay_out(Path(folder), settings, *arrays)
        for _ in range(changes + 1):
            start = time.monotonic()
            command = [sys.executable, "-m", "utils.bench.usual_harness", folder]
            done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=with_this_code())
            if done.returncode:
                raise RunError(f"the usual harness failed: {last_line(done.stderr)}")
            times = json.loads(done.stdout)
            rows.append({"all": times["ended"] - times["step"] - start})
    return rows[1:]
