"""Is harness.py as accurate as an independent plain PyTorch recipe (plain_recipe.py)?

    python tests/benchmarks/accuracy.py --tree DIR --fashion_mnist DIR --out CSV [--networks resnet20 conv4] [--seeds 5]
    python tests/benchmarks/accuracy.py --report CSV

Both contenders train each network dense, prune 80% of the convolution and linear weights at once by global magnitude,
and train again from the weights that are left (lrr), with the same images and hyper-parameters; each run is a process
of its own, seed by seed, the plain recipe first. Their draws differ (initial weights, order, crops), so that it is the
means over seeds that are compared: mean +- standard deviation (n - 1) of the last test accuracy, the difference of the
means, its standard error sqrt(s1^2 / n1 + s2^2 / n2), and their ratio. Equal contenders pass 2 either way in about one
row of twenty with many seeds, more often with few.

--tree DIR has train/CLASS/* and test/CLASS/*, small images of one size; of each class in both, the first so many by
name are used. --fashion_mnist DIR has torchvision's FashionMNIST/raw, unpacked. Results go to --out one by one: the
same command goes on where an interrupted one stood.
"""

import argparse
import csv
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[2]
PLAIN, HARNESS = "plain", "harness"
PRUNE_RATE = 0.8
LEVELS = {"dense": 1.0, "pruned": 1 - PRUNE_RATE}  # column -> density


@dataclass(frozen=True)
class Setting:
    """Settings of both contenders for a network. images: training images per class, 0 = all."""

    network: str
    data: str
    epochs: int
    batch_size: int
    lr: float
    weight_decay: float
    images: int
    test_images: int = 200
    precision: str = "bf16"


SETTINGS = {
    setting.network: setting
    for setting in (
        #       network          data           epochs batch lr    decay images
        Setting("lenet_300_100", "FashionMNIST", 3, 128, 0.05, 1e-4, 0, 0),  # rates of configs/fashionmnist_lenet.yaml
        Setting("conv4", "ImageFolder", 4, 64, 0.05, 5e-4, 1000),
        Setting("resnet20", "ImageFolder", 15, 128, 0.1, 5e-4, 1000),
        Setting("resnet18", "ImageFolder", 2, 32, 0.02, 5e-4, 500),
        Setting("preresnet", "ImageFolder", 2, 32, 0.02, 5e-4, 500),
        Setting("vgg16_bn", "ImageFolder", 2, 32, 0.02, 5e-4, 500),
    )
}
MEASURED = ["contender", "seed", "dense", "pruned", "seconds", "commit"]
COLUMNS = [*(option.name for option in fields(Setting)), *MEASURED]

# --- images -----------------------------------------------------------------------------------------------------------


def link_tree(tree: Path, out: Path, images: int, test_images: int) -> None:
    """Links to the first images of each class that is both in train/ and in test/; 0 = all.

    Raises:
        SystemExit: there is no such class, or one has fewer images.
    """
    splits = {"train": images, "test": test_images}
    classes = [{path.name for path in (tree / split).iterdir() if path.is_dir()} for split in splits]
    names = sorted(set.intersection(*classes))
    if not names:
        sys.exit(f"accuracy: {tree} has no class in both train/ and test/")
    for split, number in splits.items():
        for name in names:
            files = sorted(path for path in (tree / split / name).iterdir() if not path.name.startswith("."))
            if len(files) < number:
                sys.exit(f"accuracy: {tree / split / name} has {len(files)} images; {number} are asked for")
            (out / split / name).mkdir(parents=True)
            for path in files[: number or None]:
                (out / split / name / path.name).symlink_to(path.resolve())


def cut_fashion_mnist(root: Path, out: Path, images: int, test_images: int) -> None:
    """The first images of each class, in the same four files (idx: big-endian sizes from byte 4 on); 0 = all."""
    (out / "FashionMNIST" / "raw").mkdir(parents=True)
    for prefix, number in (("train", images), ("t10k", test_images)):
        names = [f"FashionMNIST/raw/{prefix}-{part}" for part in ("images-idx3-ubyte", "labels-idx1-ubyte")]
        pixels, labels = (np.fromfile(root / name, dtype=np.uint8) for name in names)
        labels, count = labels[8:], number or len(labels)
        chosen = np.sort(np.concatenate([np.flatnonzero(labels == label)[:count] for label in range(10)]))
        size = np.array([len(chosen)], dtype=">u4").tobytes()
        rows = pixels[16:].reshape(len(labels), -1)[chosen]
        (out / names[0]).write_bytes(pixels[:4].tobytes() + size + pixels[8:16].tobytes() + rows.tobytes())
        (out / names[1]).write_bytes(bytes([0, 0, 8, 1]) + size + labels[chosen].tobytes())


def lay_out_images(setting: Setting, args: argparse.Namespace, out: Path) -> None:
    """The images of a setting below `out`, for both contenders."""
    option, cut = ("tree", link_tree) if setting.data == "ImageFolder" else ("fashion_mnist", cut_fashion_mnist)
    source = getattr(args, option)
    if source is None:
        sys.exit(f"accuracy: {setting.network} needs --{option}")
    if not out.exists():
        cut(source, out, setting.images, setting.test_images)


# --- runs -------------------------------------------------------------------------------------------------------------


def plain_command(setting: Setting, seed: int, root: Path, threads: int) -> list[str]:
    """plain_recipe.py's words."""
    words = {key: getattr(setting, key) for key in ("network", "data", "epochs", "batch_size", "lr", "weight_decay")}
    words |= {"precision": setting.precision, "prune_rate": PRUNE_RATE, "seed": seed, "root": root, "threads": threads}
    recipe = Path(__file__).with_name("plain_recipe.py")
    return [sys.executable, str(recipe), *(f"--{key}={value}" for key, value in words.items())]


def harness_command(setting: Setting, seed: int, root: Path, threads: int, folder: Path) -> list[str]:
    """harness.py's words; the run is kept in ``folder/run``. What is not named is the harness's default."""
    words = {
        "model_params.model_name": setting.network,
        "dataset.dataset_name": setting.data,
        "dataset.data_root": root,
        "dataset.download": "false",
        "dataset.batch_size": setting.batch_size,
        "dataset.augment": "none" if setting.data == "FashionMNIST" else "crop_flip",
        "prune_params.prune_rate": PRUNE_RATE,
        "prune_params.num_levels": 2,
        "experiment_params.training_type": "lrr",
        "experiment_params.epochs_per_level": setting.epochs,
        "experiment_params.precision": setting.precision,
        "experiment_params.seed": seed,
        "experiment_params.base_dir": folder,
        "experiment_params.expt_name": "run",
        "optimizer.lr": setting.lr,
        "optimizer.momentum": 0.9,
        "optimizer.weight_decay": setting.weight_decay,
        "optimizer.scheduler_type": "MultiStepLRWarmup",  # x 0.1 at 1/2 and 3/4 of the steps; no warm-up
        "dist_params.nproc": 1,
        "dist_params.threads": threads,
    }
    return [sys.executable, str(ROOT / "harness.py"), *(f"--{key}={value}" for key, value in words.items())]


def run_process(command: Sequence[str], threads: int) -> str:
    """Standard output. Raises RuntimeError, with the end of standard error, where the process fails."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        tail = "\n".join(done.stderr.splitlines()[-10:])
        raise RuntimeError(f"{' '.join(command)}\nended with status {done.returncode}:\n{tail}")
    return done.stdout


def contend(contender: str, setting: Setting, seed: int, root: Path, threads: int) -> dict[str, float]:
    """One run: last test accuracies in percent, dense and pruned, and the seconds it took."""
    start = time.perf_counter()
    if contender == PLAIN:
        result = json.loads(run_process(plain_command(setting, seed, root, threads), threads).splitlines()[-1])
    else:
        with tempfile.TemporaryDirectory() as folder:
            run_process(harness_command(setting, seed, root, threads, Path(folder)), threads)
            with open(Path(folder) / "run" / "metrics" / "summary.csv", newline="") as file:
                dense, pruned = csv.DictReader(file)
        figures = (dense["final_test_acc"], pruned["final_test_acc"], pruned["density"])
        result = dict(zip(("dense", "pruned", "density"), map(float, figures)))
    density = result.pop("density")
    if not math.isclose(density, LEVELS["pruned"], abs_tol=1e-3):
        raise RuntimeError(f"{contender}, {setting.network}: density {density} after pruning")
    return result | {"seconds": round(time.perf_counter() - start, 1)}


def run_all(settings: Sequence[Setting], args: argparse.Namespace) -> None:
    """All runs that --out does not have yet, --jobs at a time. After a failure no further one is started."""
    done = {(row["contender"], setting, row["seed"]) for setting, row in read(args.out)}
    commit, lock = commit_of_harness(), threading.Lock()
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(args.jobs) as pool:

        def job(contender: str, setting: Setting, seed: int, root: Path) -> None:
            result = contend(contender, setting, seed, root, args.threads)
            row = asdict(setting) | {"contender": contender, "seed": seed, "commit": commit} | result
            with lock:
                append(args.out, row)
                print(", ".join(f"{key} {row[key]}" for key in ("network", *MEASURED)), flush=True)

        waiting = [(c, setting, seed) for setting in settings for seed in range(args.seeds) for c in (PLAIN, HARNESS)]
        waiting = [words for words in waiting if words not in done]
        roots = {s: Path(folder) / f"{s.data}-{s.images}-{s.test_images}" for _, s, _ in waiting}
        for setting, root in roots.items():
            lay_out_images(setting, args, root)
        jobs = [pool.submit(job, *words, roots[words[1]]) for words in waiting]
        try:
            for future in as_completed(jobs):
                future.result()
        except RuntimeError as error:
            sys.exit(f"accuracy: {error}")
        finally:
            pool.shutdown(cancel_futures=True)


def commit_of_harness() -> str:
    """Short commit of the code that runs, with + where files were changed since; "" outside a repository."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--abbrev=8", "--dirty=+", "--exclude=*"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


# --- results ----------------------------------------------------------------------------------------------------------


def append(path: Path, row: dict) -> None:
    """One row more in a CSV, which gets its header line first."""
    new = not path.exists() or path.stat().st_size == 0
    with open(path, "a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if new:
            writer.writeheader()
        writer.writerow(row)


def read(path: Path) -> list[tuple[Setting, dict]]:
    """Each row as its setting and its other columns, with numbers for text; none before there is a file."""
    if not path.exists():
        return []
    options = {option.name: option.type for option in fields(Setting)}
    kinds = options | {"seed": int, "dense": float, "pruned": float}
    with open(path, newline="") as file:
        rows = [{key: kinds.get(key, str)(text) for key, text in row.items()} for row in csv.DictReader(file)]
    return [(Setting(**{key: row.pop(key) for key in options}), row) for row in rows]


def compare(plain: Sequence[float], harness: Sequence[float]) -> list[str]:
    """Cells: n, both means +- standard deviations, difference, its standard error, difference in standard errors."""
    pair = (plain, harness)
    means = [statistics.fmean(values) for values in pair]
    spreads = [statistics.stdev(values) if len(values) > 1 else math.nan for values in pair]
    difference = means[1] - means[0]
    error = math.sqrt(sum(spread**2 / len(values) for spread, values in zip(spreads, pair)))
    cells = [f"{mean:.2f} ± {spread:.2f}" for mean, spread in zip(means, spreads)]
    ratio = f"{difference / error:+.1f}" if error > 0 else "-"
    n = " and ".join(str(n) for n in dict.fromkeys(map(len, pair)))
    return [n, *cells, f"{difference:+.2f}", f"{error:.2f}", ratio]


def table(path: Path) -> Iterator[str]:
    """Markdown lines: a row for each setting and density that both contenders have results of."""
    yield "| network | training | density | n | plain recipe, % | harness.py, % | difference | standard error | ratio |"
    yield "|---|---|---:|---:|---:|---:|---:|---:|---:|"
    rows = read(path)
    for s in dict.fromkeys(setting for setting, _ in rows):
        training = f"{s.data}, {s.images or 'all'} a class, {s.epochs} epochs of {s.batch_size}, lr {s.lr:g}, "
        training += f"decay {s.weight_decay:g}, {s.precision}"
        for column, density in LEVELS.items():
            of = {
                c: [r[column] for setting, r in rows if setting == s and r["contender"] == c] for c in (PLAIN, HARNESS)
            }
            if all(of.values()):
                yield "| " + " | ".join([s.network, training, f"{density:.0%}", *compare(*of.values())]) + " |"
    yield "\nharness.py at " + ", ".join(sorted({row["commit"] for _, row in rows if row["contender"] == HARNESS}))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--tree", type=Path, help="directory of train/CLASS/* and test/CLASS/*")
    parser.add_argument("--fashion_mnist", type=Path, help="directory that holds FashionMNIST/raw/")
    parser.add_argument("--out", type=Path, help="CSV that results are appended to")
    parser.add_argument("--report", type=Path, metavar="CSV", help="print the table of these results; run nothing")
    parser.add_argument("--epochs", type=int, help="of each level, instead of the network's own")
    parser.add_argument("--images", type=int, help="training images a class, instead of the network's own; 0 = all")
    parser.add_argument("--test_images", type=int, help="test images a class, likewise")
    parser.add_argument("--precision", choices=["bf16", "fp32"], default="bf16", help="autocast type of both")
    parser.add_argument("--seeds", type=int, default=5, help="runs of each contender, with seeds from 0 on")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of a run")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    args = parser.parse_args(argv)
    if args.report is None and args.out is None:
        parser.error("one of --out and --report is needed")
    if args.report is None:
        given = {key: getattr(args, key) for key in ("epochs", "images", "test_images", "precision")}
        given = {key: value for key, value in given.items() if value is not None}
        run_all([replace(SETTINGS[name], **given) for name in args.networks], args)
    print(*table(args.report or args.out), sep="\n")


if __name__ == "__main__":
    main()
