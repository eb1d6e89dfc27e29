"""Cost of saving a state at the end of every epoch, as a share of the epoch.

    python -m tests.benchmarks.saving STEPS [--config FILE] [--section.key=value ...]

Times STEPS training steps (the epoch is extrapolated from their median), then ten saves of a CSV row and a resume
state, as at the end of an epoch. Only the snapshot and the hand-over hold training up; a background thread does the
rest. Its CPU time is printed, too: it is the cost of saving if no core is free for that thread.

2 shared cores of an AMD EPYC, busy with other work (load 8), torch 2.15, OMP_NUM_THREADS=1, medians of 10:
    200 --dataset.dataset_name=FashionMNIST                                        (LeNet-300-100, state 2.4 MB)
        epoch 3.42 s; held up 2.8 ms (worst 9.2), 0.08%; CPU 9 ms, 0.27%
    3 --dataset.dataset_name=ImageFolder --model_params.model_name=resnet18        (CIFAR-10 as a tree, state 100.7 MB)
        epoch 7390 s; held up 792 ms (worst 841), 0.01%; CPU 797 ms, 0.01%
"""

import itertools
import statistics
import sys
import time
from typing import Any

import torch

from harness import Harness
from harness_params import load_config
from harness_utils import open_run
from utils.dataset import load_data
from utils.distributed import join
from utils.runs.stopping import StopRequest
from utils.runs.tables import epoch_table
from utils.training.setup import build_model
from utils.training.trainer import Trainer

REPEATS = 10


def seconds_per_step(harness: Harness, steps: int) -> float:
    """Median of `steps` steps, after two that warm up."""
    moments: list[float] = []

    def stop(done: int) -> bool:
        if harness.ctx.device.type == "cuda":
            torch.cuda.synchronize()
        moments.append(time.perf_counter())
        return done >= steps + 2

    harness.trainer.train_epoch(0, 0, harness.trainer.new_tally(), stop)
    return statistics.median(b - a for a, b in itertools.pairwise(moments))


def save(harness: Harness, row: dict[str, Any]) -> tuple[float, float, float]:
    """(seconds that training is held up, seconds until all is on disk, CPU seconds of both) of one save."""
    begin, cpu = time.perf_counter(), time.process_time()
    harness.run.tables.add(epoch_table(0), [row])
    harness._save_state()
    held_up = time.perf_counter() - begin
    harness.run.writer.flush()
    return held_up, time.perf_counter() - begin, time.process_time() - cpu


def main() -> None:
    """Print the figures."""
    cfg, steps = load_config(sys.argv[2:]), int(sys.argv[1])
    with join(threads=cfg.dist_params.threads) as ctx, open_run(cfg) as run:
        data = load_data(cfg, ctx)
        harness = Harness(cfg, ctx, Trainer(cfg, ctx, build_model(cfg, data, ctx), data), run, StopRequest(ctx))
        harness.prune()
        harness.rewind()
        epoch = seconds_per_step(harness, steps) * data.train.steps_per_epoch
        row = dict.fromkeys(("train_loss", "test_loss", "train_acc", "test_acc", "lr", "seconds"), 1 / 3)
        times = [save(harness, {"epoch": i, **row, "images_per_second": 1e4 / 3}) for i in range(REPEATS)]
        size = (run.path / "artifacts" / "state_0.pt").stat().st_size / 1e6
        data.close()
    held_up, wall, cpu = (statistics.median(column) for column in zip(*times))
    worst = max(t[0] for t in times)
    m, d = cfg.model_params.model_name, cfg.dataset.dataset_name
    print(f"{m} on {d}, {ctx.device}, {torch.get_num_threads()} threads, state {size:.1f} MB: epoch {epoch:.2f} s")
    print(f"saving holds training up {1e3 * held_up:.1f} ms (worst {1e3 * worst:.1f}), {100 * held_up / epoch:.2f}%")
    print(f"on disk after {1e3 * wall:.0f} ms; CPU time {1e3 * cpu:.0f} ms, {100 * cpu / epoch:.2f}%")


if __name__ == "__main__":
    main()
