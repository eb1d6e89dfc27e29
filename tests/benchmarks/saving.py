"""Cost of saving a resume state: what training waits for it, and what it loses to the thread that writes.

    python -m tests.benchmarks.saving STEPS [--config FILE] [--section.key=value ...]

Times STEPS training steps (the epoch is extrapolated from their median), then ten saves of a CSV row and a resume
state. Only the snapshot and the hand-over hold training up; a background thread does the rest. Shares are given of an
epoch, with a save after each (``save_every_epochs: 1``), and of a minute, which is the default between two saves.
Then a Python-bound loop of tiny operations, as of a network whose GPU waits for launches, is run beside that thread:
"loses" is the time less the time that as many turns take alone (GIL, and the core if another one is not free).

2 shared cores of an AMD EPYC, busy with other work (load 8 to 14), torch 2.14, OMP_NUM_THREADS=1, medians of 10:
    200 --config configs/fashionmnist_lenet_fast.yaml                              (LeNet-300-100, state 2.4 MB)
        epoch 3.7 s; held up 0.9 ms (worst 8.5): 0.025% of the epoch, 0.002% of a minute; CPU 7 ms; launches lose 8 ms
    2 --dataset.dataset_name=ImageFolder --model_params.model_name=resnet18 --dataset.batch_size=64
                                                                                   (CIFAR-10 as a tree, state 100.7 MB)
        epoch 419 s; held up 48 ms (worst 76): 0.012% of the epoch, 0.081% of a minute; CPU 134 ms; launches lose 70 ms
A state of 136 MB, quiet machine: launches lost 111 ms when it was packed in memory, then hashed and written; 27 ms as
it is now, packed straight into the file and hashed on the way (worst gap 4.6 ms; hash and write alone lose 14 ms).
"""

import itertools
import statistics
import sys
import threading
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


def turns(seconds: float, end: threading.Event) -> int:
    """Turns of a loop of tiny operations in so many seconds, or until `end` is set."""
    begin, count, number = time.perf_counter(), 0, torch.zeros(8)
    while time.perf_counter() - begin < seconds and not end.is_set():
        number.add_(1)
        count += 1
    return count


def lost_to_writer(harness: Harness) -> float:
    """Seconds that such a loop loses while one state is packed, hashed and written."""
    per_second = turns(1.0, threading.Event())
    harness._save_state()
    written = harness.run.writer.submit(lambda: None, snapshot=False)
    begin = time.perf_counter()
    beside = turns(60.0, written)
    return time.perf_counter() - begin - beside / per_second


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
        lost = statistics.median(lost_to_writer(harness) for _ in range(5))
        size = (run.path / "artifacts" / "state_0.pt").stat().st_size / 1e6
        data.close()
    held_up, wall, cpu = (statistics.median(column) for column in zip(*times))
    worst = max(t[0] for t in times)
    m, d = cfg.model_params.model_name, cfg.dataset.dataset_name
    print(f"{m} on {d}, {ctx.device}, {torch.get_num_threads()} threads, state {size:.1f} MB: epoch {epoch:.2f} s")
    share = f"{100 * held_up / epoch:.3f}% of an epoch with a save after each, {100 * held_up / 60:.3f}% of a minute"
    print(f"saving holds training up {1e3 * held_up:.1f} ms (worst {1e3 * worst:.1f}): {share}")
    print(
        f"on disk after {1e3 * wall:.0f} ms, CPU time {1e3 * cpu:.0f} ms; a loop of launches loses {1e3 * lost:.0f} ms"
    )


if __name__ == "__main__":
    main()
