"""Write training and test images to .beton files, FFCV's format, from a tree of images or a data set by name.

    python -m utils.write_beton --source TREE_OR_DATASET --out DIR

TREE has train/CLASS/* and val/CLASS/* (or test/CLASS/*). Each image is read once, converted to RGB, shrunk if its
longer side exceeds --max_resolution, and stored as JPEG with --compress_probability, else as plain pixels: JPEG takes
less disk, pixels take less time to read. File names hold the settings: train_500_0.50_90.beton.

Exit codes: 0 done; 1 an image is broken, the disk is full, a download failed or FFCV is missing; 2 wrong usage; 130/143
stopped. Unfinished files are removed.
"""

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from utils.config.checkers import nearest
from utils.data.image_tree import find_tree
from utils.data.published import files_of
from utils.data.specs import DATASETS
from utils.errors import ConfigError, DataError, RunError, report
from utils.ffcv.sources import ArraySource, ImageSource, TreeSource
from utils.output import best_effort_streams, program, say
from utils.processes.place import available_cores
from utils.processes.signals import installed

PROGRAM = "write_beton"


def find_source(name: str, data_root: Path) -> dict[str, ImageSource]:
    """{"val": ..., "train": ...} of a tree of images, or of a data set by its name in any case.

    Raises:
        ConfigError: `name` is neither, or the tree or the files are missing, damaged or unfit. A DataError becomes a
            ConfigError, for the exit status: --source is at fault.
        RunError: a download failed.
    """
    try:
        return _find_source(name, data_root)
    except DataError as error:
        raise ConfigError(f"--source: {error}") from error


def _find_source(name: str, data_root: Path) -> dict[str, ImageSource]:
    names = {known.lower(): known for known in DATASETS}
    if Path(name).is_dir():
        root = Path(name)
    elif name.lower() in names:
        known, root = names[name.lower()], data_root
        if not DATASETS[known].is_tree:
            files = files_of(known)
            files.fetch(root, download=True)
            return {"val": ArraySource(*files.read(root, False)), "train": ArraySource(*files.read(root, True))}
    else:
        near = nearest(name, list(DATASETS))
        hint = f"; did you mean {near}?" if near else ""
        raise DataError(f"{name} is neither a folder nor a data set: one of {', '.join(DATASETS)}{hint}")
    train, test = find_tree(root)
    return {"val": TreeSource(test), "train": TreeSource(train)}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Checked command line; a fault goes to stderr with exit status 2."""

    def number(kind: type, low: float, high: float):
        def read(text: str) -> float:
            value = kind(text)
            if not low <= value <= high:
                raise argparse.ArgumentTypeError(f"{text} is not allowed: {low} to {high}")
            return value

        read.__name__ = "whole number" if kind is int else "number"
        return read

    parser = argparse.ArgumentParser(prog="python -m utils.write_beton", description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add(
        "--source",
        required=True,
        help="folder with train/CLASS/* and val/CLASS/* (or test/CLASS/*), or a data set's name",
    )
    add("--out", required=True, type=Path, help="folder of the two files; created if missing")
    add(
        "--max_resolution",
        type=number(int, 0, 65535),
        default=500,
        help="pixels of the longer side; 0 = keep the size (500)",
    )
    add(
        "--compress_probability",
        type=number(float, 0, 1),
        default=0.5,
        help="share of images stored as JPEG, not as pixels (0.5)",
    )
    add("--jpeg_quality", type=number(int, 1, 100), default=90, help="JPEG quality (90)")
    add("--num_workers", type=number(int, 0, 1024), default=0, help="processes; 0 = one per core (0)")
    add("--skip_broken", action="store_true", help="leave out broken images and list them, instead of stopping")
    add("--data_root", type=Path, default=Path("data"), help="folder of data sets that are given by name (./data)")
    args = parser.parse_args(argv)
    if args.out.exists() and not args.out.is_dir():
        parser.error(f"argument --out: {args.out} is not a folder")
    args.num_workers = args.num_workers or available_cores()
    return args


def _stop(signum: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + signum)


def main(argv: Sequence[str] | None = None) -> int:
    """Write both files; return the exit status."""
    args = parse(argv)
    try:
        with program(PROGRAM), installed(_stop, (signal.SIGINT, signal.SIGTERM)):
            # The small file first: faults of the settings show soon.
            for split, source in find_source(args.source, args.data_root.expanduser()).items():
                write_split(split, source, args)
    except (ConfigError, DataError, RunError) as error:
        return report(error, PROGRAM)
    return 0


def write_split(split: str, source: ImageSource, args: argparse.Namespace) -> None:
    """Write one file, and report on stdout what it holds.

    Raises:
        DataError: an image is broken.
        RunError: FFCV is missing, the disk is full, or a worker died.
    """
    try:
        from utils.ffcv.writer import Encoding, write_beton
    except (ImportError, OSError) as error:  # OSError: a system library that FFCV was built against is missing
        raise RunError(f"FFCV cannot be imported ({error}); see utils/ffcv/README.md") from error

    encoding = Encoding(args.max_resolution, args.compress_probability, args.jpeg_quality)
    path = args.out / f"{split}_{encoding}.beton"
    broken = write_beton(path, source, encoding, args.num_workers, args.skip_broken)
    if broken:
        say("\n  ".join([f"{split}: left out {len(broken)} broken images:", *map(str, broken)]))
    say(f"{split}: {len(source) - len(broken)} images in {path} ({path.stat().st_size / 1e6:.1f} MB)")


if __name__ == "__main__":
    best_effort_streams(PROGRAM)
    sys.exit(main())
