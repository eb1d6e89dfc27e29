"""Images per second of the loaders alone: FFCV's and torchvision's DataLoader, on the same images, in one run.

    python tests/benchmarks/ffcv_speed.py --source TREE [--size 224] [--workers 2] [--epochs 5] [--batch 64]

TREE has train/CLASS/* and val/CLASS/*. It is written to .beton files with the usual settings (500, 0.50, 90) in a
temporary folder. Then the loaders yield their training batches (random resized crop, flip, normalisation) in turn, one
epoch each; the first epoch is a warm-up. Both yield the same crops.

200 photographs of ImageNet's kind, 2 cores of an AMD EPYC shared with other jobs (load 3.3), n = 5 epochs each:
    ffcv           243.4 images/s, median of 5 (188.7 to 332.9)
    torchvision     99.7 images/s, median of 5 (90.3 to 133.8)
    ratio 2.44
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from harness_params import make_config
from utils import write_beton
from utils.data.loaders import Data
from utils.dataset import load_data
from utils.distributed import Context


def open_loader(loader: str, root: Path, args: argparse.Namespace) -> Data:
    dataset = {"dataset_name": "ImageFolder", "loader": loader, "data_root": str(root), "resolution": args.size}
    return load_data(
        make_config({"dataset": {**dataset, "batch_size": args.batch, "num_workers": args.workers}}), Context()
    )


def epoch_seconds(data: Data, epoch: int) -> float:
    start = time.perf_counter()
    images = sum(len(labels) for _, labels in data.train.batches(0, epoch))
    assert images == data.train.num_images
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--source", type=Path, required=True)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch", type=int, default=64)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if write_beton.main(["--source", str(args.source), "--out", folder]) != 0:
            sys.exit(1)
        loaders = {
            "ffcv": open_loader("ffcv", Path(folder), args),
            "torchvision": open_loader("torchvision", args.source, args),
        }
        seconds: dict[str, list[float]] = {name: [] for name in loaders}
        for epoch in range(args.epochs + 1):
            for name, data in loaders.items():
                seconds[name].append(epoch_seconds(data, epoch))
        for data in loaders.values():
            data.close()
    count = loaders["ffcv"].train.num_images
    rates = {name: sorted(count / s for s in times[1:]) for name, times in seconds.items()}
    for name, found in rates.items():
        low, middle, high = found[0], statistics.median(found), found[-1]
        print(f"{name:12} {middle:7.1f} images/s, median of {args.epochs} ({low:.1f} to {high:.1f})")
    medians = [statistics.median(found) for found in rates.values()]
    print(f"ratio {medians[0] / medians[1]:.2f}; load {os.getloadavg()[0]:.1f} on {len(os.sched_getaffinity(0))} cores")


if __name__ == "__main__":
    main()
