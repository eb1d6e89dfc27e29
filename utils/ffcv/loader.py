"""``dataset.loader: ffcv``: training and test batches from .beton files, which ``python -m utils.write_beton`` writes.

Threads decode, crop and resize pixels as uint8 (utils/ffcv/pixels.py), and a few batches ahead send them to the GPU, if
there is one, on a stream of their own (utils/ffcv/prefetch.py); the device normalises. Order, crops and flips are
functions of (seed, level, epoch, place), as in all loaders: the same for any number of processes and threads, and in a
run resumed within an epoch.

Import this module only if FFCV is asked for: it imports FFCV and Numba.
"""

import functools
import os
from pathlib import Path

import numpy as np

from harness_params import Config
from utils.data.held_out import hold_out
from utils.data.images import Normalizer, epoch_resolution
from utils.data.loaders import (
    LARGE_RESOLUTION,
    Data,
    augment_recipe,
    check_class_count,
    data_root,
    epoch_plan,
    identity_of,
    naming,
)
from utils.data.specs import SMALL_PIXELS, DataSpec
from utils.distributed import Context
from utils.errors import ConfigError, DataError
from utils.ffcv.batches import BetonReader, FFCVTestLoader, FFCVTrainLoader
from utils.ffcv.beton import Beton
from utils.ffcv.pixels import compile_decoder
from utils.output import note
from utils.processes.place import available_cores

# Cache if the files need under 80% of free memory; the rest is the run's own memory.
CACHED_SHARE = 0.8
SPLITS = {"train_beton": "train", "val_beton": "val"}


def load_ffcv(cfg: Config, ctx: Context, spec: DataSpec) -> Data:
    """Both loaders, from the .beton files that the config names or that lie under data_root.

    Raises:
        ConfigError: an option does not fit; the classes cannot spare so many validation images.
        DataError: a file is missing or damaged.
    """
    d, e = cfg.dataset, cfg.experiment_params
    train, test = open_betons(cfg, log_notes=ctx.is_main)
    num_classes = _num_classes(cfg, spec, train, test)
    size, eval_size = _resolutions(cfg, train)

    def sizes(epoch: int) -> int:
        if not d.end_resolution:
            return size
        return epoch_resolution(epoch, e.epochs_per_level, d.start_resolution, d.end_resolution)

    mean, std = (tuple(np.broadcast_to(values, 3)) for values in (spec.mean, spec.std))  # a .beton is always RGB
    normalizer = functools.partial(
        Normalizer, mean, std, device=ctx.device, full_scale=spec.full_scale, channels_last=e.channels_last
    )
    threads, timeout = _threads(d.num_workers, log_notes=ctx.is_main), 60 * cfg.dist_params.timeout_minutes
    readers = [BetonReader(beton, normalizer, ctx.device, threads, timeout) for beton in (train, test)]
    compile_decoder()
    kept, held_out = hold_out(train.labels, d.validation_images)
    place = eval_size, max(1, d.batch_size // ctx.world), ctx.rank, ctx.world
    return Data(
        FFCVTrainLoader(readers[0], sizes, *augment_recipe(cfg, spec), kept, **epoch_plan(cfg, ctx)),
        FFCVTestLoader(readers[1], *place),
        num_classes,
        (3, size, size),
        tuple((3, side, side) for side in sorted({eval_size, *map(sizes, range(e.epochs_per_level))} - {size})),
        # The same after the files are written again with other settings.
        identity_of(train.labels, test.labels, *([held_out] if len(held_out) else [])),
        FFCVTestLoader(readers[0], *place, held_out) if len(held_out) else None,
        loader="ffcv",
    )


# -------------------------------------------------------------------------------------------------------------- files


def find_betons(cfg: Config) -> tuple[Path, Path]:
    """Training and test file: those that the config names, else those found under data_root.

    Files named train_*.beton and val_*.beton are looked for in data_root and the folders directly below it. The test
    file that was written with the training file (same folder, same settings in its name) comes before others.

    Raises:
        DataError: no file is found; names dataset.train_beton or dataset.val_beton.
        ConfigError: several are found, or the one named does not exist; names the same.
    """
    train = _named(cfg, "train_beton") or _only(cfg, "train_beton")
    partner = train.with_name("val" + train.name.removeprefix("train"))
    test = _named(cfg, "val_beton") or (partner if partner.is_file() and partner != train else None)
    return train, test or _only(cfg, "val_beton")


def _named(cfg: Config, key: str) -> Path | None:
    value = getattr(cfg.dataset, key)
    if value and not Path(value).expanduser().is_file():
        raise ConfigError(f"dataset.{key}: {value} is not a file")
    return Path(value).expanduser() if value else None


def _only(cfg: Config, key: str) -> Path:
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


def open_betons(cfg: Config, log_notes: bool) -> tuple[Beton, Beton]:
    """Training and test file, cached as dataset.os_cache says; with auto, as the free memory allows.

    Args:
        log_notes: log if auto turns the cache off.

    Raises:
        DataError: a file cannot be read; names the option.
    """
    paths = find_betons(cfg)
    needed, free = sum(path.stat().st_size for path in paths), available_memory()
    cached = needed <= CACHED_SHARE * free if cfg.dataset.os_cache == "auto" else cfg.dataset.os_cache == "on"
    if log_notes and not cached and cfg.dataset.os_cache == "auto":
        sizes = f"the .beton files have {needed / 1e9:.1f} GB, free memory {free / 1e9:.1f} GB"
        note(f"dataset.os_cache: auto = off: {sizes}")
    with naming("dataset.train_beton"):
        train = Beton(paths[0], cached)
    with naming("dataset.val_beton"):
        test = Beton(paths[1], cached)
    return train, test


def available_memory() -> int:
    """Bytes available without swapping, page cache included: of the machine, or of this container if it has fewer."""
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


def _threads(num_workers: int, log_notes: bool) -> int:
    """Decoding threads: at least 1, at most one per core.

    Args:
        log_notes: log if fewer are used than asked for.
    """
    # More threads than cores gain nothing, and Numba's pool refuses them.
    most = available_cores()
    if num_workers > most and log_notes:
        note(f"dataset.num_workers: {num_workers} asked for, {most} used: one per core")
    return max(1, min(num_workers, most))


def _num_classes(cfg: Config, spec: DataSpec, train: Beton, test: Beton) -> int:
    """Number of classes in the training file.

    Raises:
        ConfigError: the config says another number.
        DataError: the test file has further classes.
    """
    found = int(train.labels.max()) + 1
    check_class_count(cfg, spec, found, train.path)
    if test.labels.max() >= found:
        raise DataError(
            f"dataset.val_beton: {test.path} has label {test.labels.max()}, {train.path} only labels 0 to {found - 1}"
        )
    return found


def _resolutions(cfg: Config, train: Beton) -> tuple[int, int]:
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
