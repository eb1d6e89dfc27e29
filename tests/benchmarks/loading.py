"""Images per second of the loaders of large images alone, of the training step on resident data, and of both together.

    python tests/benchmarks/loading.py --source TREE [--images 2000] [--size 160] [--batch 256] [--workers N]
                                       [--loaders ffcv,torchvision] [--models resnet18,resnet50] [--rounds 3]

TREE has train/CLASS/* and val/CLASS/*. Its photographs are repeated until there are --images of them to train on, and
written to .beton files with the usual settings (500, 0.50, 90), in a temporary folder. Per loader and network: an epoch
of the loader alone, its batches on the device and normalised; as many steps of this harness, at density 0.2, on one
batch that is on the device already; and an epoch of steps on the loader's batches. Figures are medians over the rounds,
after one that warms up, with the smallest and largest in brackets. "of the slower" is the last figure over the smaller
of the other two: 1 if loading and computing overlap wholly.

Needs FFCV unless --loaders=torchvision. A GPU is used if there is one.
"""

import argparse
import dataclasses
import itertools
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

from harness_params import Config, make_config
from utils import distributed
from utils.bench.contenders import Ours
from utils.bench.data import OneBatch
from utils.benchmark import RATE, machine
from utils.data.loaders import Data
from utils.dataset import load_data
from utils.distributed import Context
from utils.processes.place import available_cores
from utils.training.hardware import configure_kernels

HEAD = "| loader | network | loader alone | step, resident data | both together | of the slower |"


def repeated(source: Path, folder: Path, images: int) -> Path:
    """A tree of links to the photographs of `source`, those of train/ repeated until there are `images` of them."""
    for split in ("train", "val"):
        photos = sorted(path for path in (source / split).glob("*/*") if path.is_file())
        if not photos:
            sys.exit(f"{source / split}: no CLASS/IMAGE in it")
        Random(0).shuffle(photos)  # of all classes, however few are asked for
        count = images if split == "train" else len(photos)
        for number, photo in enumerate(itertools.islice(itertools.cycle(photos), count)):
            link = folder / split / photo.parent.name / f"{number:07d}{photo.suffix}"
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(photo.resolve())
    return folder


def config(loader: str, model: str, root: Path, args: argparse.Namespace) -> Config:
    dataset = {"dataset_name": "ImageFolder", "loader": loader, "data_root": str(root), "resolution": args.size}
    return make_config({
        "dataset": {**dataset, "batch_size": args.batch, "num_workers": args.workers, "drop_last": True},
        "model_params": {"model_name": model}, "optimizer": {"lr": RATE, "warmup_epochs": 0},
        "dist_params": {"threads": args.threads},
    })  # fmt: skip


def loading_rate(ctx: Context, data: Data, epoch: int) -> float:
    """Images per second of an epoch of the loader alone, on the device."""
    wait = torch.cuda.synchronize if ctx.device.type == "cuda" else lambda: None
    wait()
    start, images = time.perf_counter(), 0
    for _, labels in data.train.batches(0, epoch):
        images += len(labels)
    wait()
    return images / (time.perf_counter() - start)


def measure(ctx: Context, loader: str, root: Path, args: argparse.Namespace) -> Iterator[str]:
    """Rows of the table, one per network."""
    data = load_data(config(loader, args.models[0], root, args), ctx)
    alone = [loading_rate(ctx, data, epoch) for epoch in range(args.rounds + 1)][1:]
    resident = OneBatch(data.train)
    for model in args.models:
        found = {"step": [], "both": []}
        ours = {
            name: Ours(config(loader, model, root, args), ctx, dataclasses.replace(data, train=train))
            for name, train in (("step", resident), ("both", data.train))
        }
        for number in range(args.rounds + 1):
            for name, one in ours.items():
                images, seconds = one.train(data.train.steps_per_epoch)
                found[name] += [images / seconds] if number else []
        slower = min(statistics.median(alone), statistics.median(found["step"]))
        share = statistics.median(found["both"]) / slower
        cells = [loader, model, *map(spread, (alone, found["step"], found["both"])), f"{share:.2f}"]
        yield f"| {' | '.join(cells)} |"
    data.close()


def spread(rates: list[float]) -> str:
    return f"{statistics.median(rates):,.1f} ({min(rates):,.1f}-{max(rates):,.1f})"


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--source", type=Path, required=True)
    for name, usual in (("images", 2000), ("size", 160), ("batch", 256), ("workers", available_cores()), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=usual)
    parser.add_argument("--threads", type=int, default=0, help="CPU threads of the steps; 0 = as many as torch has")
    for name, usual in (("loaders", "ffcv,torchvision"), ("models", "resnet18,resnet50")):
        parser.add_argument(f"--{name}", type=lambda text: text.split(","), default=usual)
    return parser


def main() -> None:
    args = make_parser().parse_args()
    if args.images < 2 * args.batch:
        sys.exit(f"--images {args.images}: at least two batches of {args.batch}")
    configure_kernels(deterministic=False)
    with tempfile.TemporaryDirectory() as folder, distributed.join(threads=args.threads) as ctx:
        roots = {"torchvision": repeated(args.source, Path(folder) / "tree", args.images)}
        if "ffcv" in args.loaders:
            from utils import write_beton

            roots["ffcv"] = Path(folder) / "beton"
            if write_beton.main(["--source", str(roots["torchvision"]), "--out", str(roots["ffcv"])]) != 0:
                sys.exit(1)
        print(f"{machine()}\n{args.images} photographs at {args.size} px, batch {args.batch}, {args.workers} workers, "
              f"n = {args.rounds} rounds; images/s\n\n{HEAD}\n|---|---|---|---|---|---|", flush=True)  # fmt: skip
        for loader in args.loaders:
            for line in measure(ctx, loader, roots[loader], args):
                print(line, flush=True)
        print(f"\nload {os.getloadavg()[0]:.1f} on {available_cores()} cores at the end")


if __name__ == "__main__":
    main()
