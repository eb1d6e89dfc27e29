"""``dataset.loader: ffcv``: training and test batches from .beton files, which ``python -m utils.write_beton`` makes.

Pixels are decoded, cropped and resized as uint8 by threads (utils/ffcv/beton.py), a few batches ahead
(utils/ffcv/prefetch.py), and normalised on the device. Order, crops and flips are functions of (seed, level, epoch,
place), as everywhere here: the same for any number of processes and of threads, and in a run resumed in mid-epoch.
"""

import functools
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from utils.data.images import Normalizer
from utils.data.loaders import LARGE_RESOLUTION, SMALL_PIXELS, Data, augment_recipe, data_root, identity_of
from utils.data.specs import DataSpec
from utils.errors import ConfigError, DataError
from utils.processes.place import available_cores

if TYPE_CHECKING:
    from utils.ffcv.beton import Beton

log = logging.getLogger(__name__)

# The share of the available memory that the files may take and still count as fitting: the rest is the run's own.
FITS = 0.8
SPLITS = {"train_beton": "train", "val_beton": "val"}


def load_ffcv(cfg: Any, ctx: Any, spec: DataSpec) -> Data:
    """Both loaders, from the .beton files that the config names or that lie under data_root.

    Raises:
        ConfigError: FFCV is not installed; an option does not fit.
        DataError: a file is missing or damaged.
    """
    _need_ffcv()
    from utils.data.images import epoch_resolution
    from utils.ffcv.batches import BetonReader, FFCVTestLoader, FFCVTrainLoader
    from utils.ffcv.beton import compile_decoder

    d, e = cfg.dataset, cfg.experiment_params
    train, test = open_betons(cfg, tell=ctx.rank == 0)
    num_classes = _num_classes(cfg, spec, train, test)
    size, eval_size = _resolutions(cfg, train)

    def sizes(epoch: int) -> int:
        if not d.end_resolution:
            return size
        return epoch_resolution(epoch, e.epochs_per_level, d.start_resolution, d.end_resolution)

    mean, std = (tuple(np.broadcast_to(values, 3)) for values in (spec.mean, spec.std))  # a .beton is RGB, always
    normalizer = functools.partial(
        Normalizer, mean, std, device=ctx.device, full_scale=spec.full_scale, channels_last=e.channels_last
    )
    threads, patience = _threads(d.num_workers, tell=ctx.rank == 0), 60 * cfg.dist_params.timeout_minutes
    readers = [BetonReader(beton, normalizer, ctx.device, threads, patience) for beton in (train, test)]
    compile_decoder()
    plan = {"batch_size": d.batch_size, "drop_last": d.drop_last, "seed": e.seed, "rank": ctx.rank, "world": ctx.world}
    return Data(
        FFCVTrainLoader(readers[0], sizes, *augment_recipe(cfg, spec), **plan),
        FFCVTestLoader(readers[1], eval_size, max(1, d.batch_size // ctx.world), ctx.rank, ctx.world),
        num_classes,
        (3, size, size),
        tuple((3, side, side) for side in sorted({eval_size, *map(sizes, range(e.epochs_per_level))} - {size})),
        identity_of(train.labels, test.labels),  # the files may have been written anew, with other settings
    )


def _need_ffcv() -> None:
    try:
        import utils.ffcv.beton  # noqa: F401
    except (ImportError, OSError) as error:  # OSError: a system library that FFCV was built against is gone
        raise ConfigError(
            f"dataset.loader: ffcv is not allowed here: FFCV cannot be imported ({error}); see the README, FFCV"
        ) from error


# -------------------------------------------------------------------------------------------------------------- files


def find_betons(cfg: Any) -> tuple[Path, Path]:
    """The training and the test file: those that the config names, else those found under data_root.

    Looked for in data_root and in the folders directly below it, as train_*.beton and val_*.beton. The test file that
    was written with the training file (same folder, same settings in its name) is preferred to others.

    Raises:
        DataError: naming dataset.train_beton or dataset.val_beton: none found.
        ConfigError: likewise: several, or the one named is no file.
    """
    train = _named(cfg, "train_beton") or _only(cfg, "train_beton")
    partner = train.with_name("val" + train.name.removeprefix("train"))
    test = _named(cfg, "val_beton") or (partner if partner.is_file() and partner != train else None)
    return train, test or _only(cfg, "val_beton")


def _named(cfg: Any, key: str) -> Path | None:
    value = getattr(cfg.dataset, key)
    if value and not Path(value).expanduser().is_file():
        raise ConfigError(f"dataset.{key}: {value} is not a file")
    return Path(value).expanduser() if value else None


def _only(cfg: Any, key: str) -> Path:
    root, pattern = data_root(cfg), f"{SPLITS[key]}_*.beton"
    found = sorted([*root.glob(pattern), *root.glob(f"*/{pattern}")])
    if not found:
        raise DataError(
            f"dataset.{key}: no {pattern} in {root.absolute()} or a folder in it (dataset.data_root); write it with "
            f"`python -m utils.write_beton --source TREE --out {root}`, or name the file here"
        )
    if len(found) > 1:
        raise ConfigError(f"dataset.{key}: name one of the {len(found)} files: {', '.join(map(str, found))}")
    return found[0]


def open_betons(cfg: Any, tell: bool) -> tuple["Beton", "Beton"]:
    """Both files, mapped into memory as dataset.os_cache says, or as the memory allows; `tell`: log the latter."""
    from utils.ffcv.beton import Beton

    paths = find_betons(cfg)
    needed, there = sum(path.stat().st_size for path in paths), available_memory()
    cached = needed <= FITS * there if cfg.dataset.os_cache == "auto" else cfg.dataset.os_cache == "on"
    if tell and not cached and cfg.dataset.os_cache == "auto":
        log.warning(
            "dataset.os_cache: auto = off: the .beton files have %.1f GB, the memory %.1f", needed / 1e9, there / 1e9
        )
    betons = []
    for key, path in zip(SPLITS, paths):
        try:
            betons.append(Beton(path, cached))
        except ValueError as error:
            raise DataError(f"dataset.{key}: {error}") from error
    return betons[0], betons[1]


def available_memory() -> int:
    """Bytes to be had without swapping, page cache included: of the machine, or of this container if it has less."""
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for path in ("/proc/meminfo", "/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        if os.path.exists(path):
            text = Path(path).read_text()
            if path == "/proc/meminfo":
                limits += [1024 * int(line.split()[1]) for line in text.splitlines() if line.startswith("MemAvailable")]
            elif text.strip().isdigit():  # "max": no limit
                limits.append(int(text))
    return min(limits)


# ------------------------------------------------------------------------------------------------------------ options


def _threads(num_workers: int, tell: bool) -> int:
    """Decoding threads: at least 1, at most one for each core; `tell`: log if that is fewer than asked for."""
    # More gain nothing, and Numba's own thread pool, which FFCV uses, refuses to run at all with more.
    most = available_cores()
    if num_workers > most and tell:
        log.warning("dataset.num_workers: %d asked for, %d used: one for each core there is", num_workers, most)
    return max(1, min(num_workers, most))


def _num_classes(cfg: Any, spec: DataSpec, train: "Beton", test: "Beton") -> int:
    """The number of labels in the training file; a test label beyond them, or another number given, is refused."""
    found = int(train.labels.max()) + 1
    if spec.num_classes not in (None, found):
        raise DataError(
            f"dataset.train_beton: {train.path} has {found} classes, {cfg.dataset.dataset_name} has "
            f"{spec.num_classes}: set dataset.dataset_name: ImageFolder"
        )
    if cfg.dataset.num_classes not in (0, found):
        raise ConfigError(
            f"dataset.num_classes: {cfg.dataset.num_classes} is not allowed: {train.path} has {found} classes "
            f"(0 or {found}; 0 = the data set's own)"
        )
    if test.labels.max() >= found:
        raise DataError(
            f"dataset.val_beton: {test.path} has label {test.labels.max()}, {train.path} only labels 0 to {found - 1}"
        )
    return found


def _resolutions(cfg: Any, train: "Beton") -> tuple[int, int]:
    """(training, evaluation) pixels; with progressive resizing, the training resolution is the last one."""
    d = cfg.dataset
    if d.end_resolution and d.resolution not in (0, d.end_resolution):
        raise ConfigError(
            f"dataset.resolution: {d.resolution} is not allowed: training goes from start_resolution "
            f"{d.start_resolution} to end_resolution {d.end_resolution} (0; for test images set eval_resolution)"
        )
    shorter = int(min(train.heights[0], train.widths[0]))
    size = d.end_resolution or d.resolution or (LARGE_RESOLUTION if shorter > SMALL_PIXELS else shorter)
    return size, d.eval_resolution or size
