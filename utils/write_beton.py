"""Writes train and val .beton files, FFCV's format, from a tree of images or a data set by name.

    python -m utils.write_beton --source TREE_OR_DATASET --out DIR

TREE has train/CLASS/* and val/CLASS/* (or test/CLASS/*). Each image is read once, made RGB, shrunk if its longer side
passes --max_resolution, and stored as JPEG with --compress_probability, as plain pixels otherwise: JPEG takes less
disk, pixels take less time to read. The names carry the settings: train_500_0.50_90.beton.

Exit codes: 0 done; 1 an image is broken, or the disk is full; 2 wrong usage; 130/143 stopped. What is not written whole
is removed.
"""

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from utils.config.checkers import nearest
from utils.data.image_tree import find_tree
from utils.data.published import READERS
from utils.data.specs import DATASETS
from utils.errors import DataError, RunError
from utils.ffcv.sources import ArraySource, Source, TreeSource
from utils.processes.place import available_cores


def find_source(name: str, data_root: Path) -> dict[str, Source]:
    """{"val": ..., "train": ...} of a tree of images, or of a data set of utils/dataset.py by its name.

    Raises:
        DataError: neither; or the tree, or the data set's files, are not as they should be.
    """
    names = {known.lower(): known for known in DATASETS}
    if Path(name).is_dir():
        root = Path(name)
    elif name.lower() in names:
        spec, root = DATASETS[names[name.lower()]], data_root
        if not spec.is_tree:
            files = READERS[spec.reader]
            files.fetch(root, download=True)
            return {
                "val": ArraySource(*files.read(root, False)),
                "train": ArraySource(*files.read(root, True)),
            }
    else:
        near = nearest(name, list(DATASETS))
        hint = f"; did you mean {near}?" if near else ""
        raise DataError(f"{name} is neither a folder nor a data set: one of {', '.join(DATASETS)}{hint}")
    train, test = find_tree(root)
    return {"val": TreeSource(test), "train": TreeSource(train)}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The checked command line; exits 2 with the fault on stderr."""

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
    add("--out", required=True, type=Path, help="folder for the two files; made if missing")
    add(
        "--max_resolution",
        type=number(int, 0, 65535),
        default=500,
        help="pixels of the longer side; 0 = as it is (500)",
    )
    add(
        "--compress_probability",
        type=number(float, 0, 1),
        default=0.5,
        help="share stored as JPEG, not as pixels (0.5)",
    )
    add("--jpeg_quality", type=number(int, 1, 100), default=90, help="quality of those JPEGs (90)")
    add("--num_workers", type=number(int, 0, 1024), default=0, help="processes; 0 = one for each core (0)")
    add("--skip_broken", action="store_true", help="leave broken images out and list them, instead of stopping")
    add("--data_root", type=Path, default=Path("data"), help="where a data set asked for by name lies (./data)")
    args = parser.parse_args(argv)
    if args.out.exists() and not args.out.is_dir():
        parser.error(f"argument --out: {args.out} is not a folder")
    args.num_workers = args.num_workers or available_cores()
    return args


def _stop(signum: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + signum)


def main(argv: Sequence[str] | None = None) -> int:
    """Writes both files; returns the exit code."""
    args = parse(argv)
    before = {signum: signal.signal(signum, _stop) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        return _run(args)
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _run(args: argparse.Namespace) -> int:
    try:
        sources = find_source(args.source, args.data_root.expanduser())
    except (ValueError, RuntimeError) as error:
        print(f"write_beton: --source: {str(error).removeprefix('dataset.data_root: ')}", file=sys.stderr)
        return 2
    try:
        # The small one first: it is soon known to work.
        for split, source in sources.items():
            write_split(split, source, args)
    except (RunError, OSError, ImportError) as error:
        print(f"write_beton: {error}", file=sys.stderr)
        return 1
    return 0


def write_split(split: str, source: Source, args: argparse.Namespace) -> None:
    """One file, and a line on stdout that says what is in it."""
    from utils.ffcv.writer import Encoding, write_beton

    encoding = Encoding(args.max_resolution, args.compress_probability, args.jpeg_quality)
    path = args.out / f"{split}_{encoding}.beton"
    broken = write_beton(path, source, encoding, args.num_workers, args.skip_broken)
    if broken:
        print(f"{split}: left out {len(broken)} broken images:", *broken, sep="\n  ")
    print(f"{split}: {len(source) - len(broken)} images in {path} ({path.stat().st_size / 1e6:.1f} MB)", flush=True)


if __name__ == "__main__":
    sys.exit(main())
