"""The data sets by name, and `load_data`, which turns a config into training and test batches.

A new data set is one line in `DATASETS` (utils/data/specs.py).
"""

import difflib
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from utils.data import published
from utils.data.by_workers import FolderTestLoader, FolderTrainLoader
from utils.data.image_tree import Split, UnequalSizes, decode_split, find_tree, image_size
from utils.data.images import Normalizer, pixel_statistics
from utils.data.in_memory import MemoryTestLoader, MemoryTrainLoader
from utils.data.loaders import (
    LARGE_RESOLUTION,
    SMALL_BYTES,
    SMALL_PIXELS,
    Data,
    _check_classes,
    _plan,
    augment_recipe,
    data_root,
    identity_of,
)
from utils.data.published import READERS, Files
from utils.data.specs import DATASETS, DataSpec
from utils.errors import ConfigError, DataError, RunError


def load_data(cfg: Any, ctx: Any) -> Data:
    """The data set that the config names, ready on ``ctx.device``. Called by all ranks together.

    Raises:
        ConfigError: an option does not fit the data.
        DataError, RunError: files are missing or damaged; one line, on all ranks.
    """
    data = _loaded(cfg, ctx)
    asked, images = cfg.dataset.batch_size, data.train.num_images
    if ctx.rank == 0 and asked > images:
        told = f"{asked} is more than the {images} training images: all of them make one batch"
        print(f"harness: note: dataset.batch_size: {told}", file=sys.stderr)
    return data


def _loaded(cfg: Any, ctx: Any) -> Data:
    name = cfg.dataset.dataset_name
    if name not in DATASETS:
        near = difflib.get_close_matches(name, DATASETS, n=len(DATASETS), cutoff=0)
        raise DataError(f"dataset.dataset_name: {name} is not allowed: one of {', '.join(near)}")
    spec = DATASETS[name]
    _check_classes(cfg, spec.num_classes, name)
    if cfg.dataset.loader == "ffcv":
        from utils.ffcv.loader import load_ffcv

        return load_ffcv(cfg, ctx, spec)
    if spec.is_tree:
        return _load_tree(cfg, ctx, spec)
    files, root = READERS[spec.reader], data_root(cfg)
    _fetch(cfg, ctx, files)
    return _in_memory(cfg, ctx, spec, files.read(root, train=True), files.read(root, train=False))


def _fetch(cfg: Any, ctx: Any, files: Files) -> None:
    """Has rank 0 download what is missing while the others wait; if it fails, all ranks raise."""
    fault = None
    if ctx.rank == 0:
        try:
            files.fetch(data_root(cfg), cfg.dataset.download)
        except Exception as error:
            # Whatever it is, the others must hear of it before this rank leaves them waiting.
            fault = error
    told = ctx.broadcast_object(None if fault is None else f"{fault}")
    if fault is not None:
        raise fault
    if told is not None:
        raise RunError(told)


def _in_memory(cfg: Any, ctx: Any, spec: DataSpec, train: published.Arrays, test: published.Arrays) -> Data:
    """Arrays (images, labels) to loaders on the device. `spec` must be complete."""
    _, height, width = spec.image_shape
    for key in ("resolution", "eval_resolution"):
        value = getattr(cfg.dataset, key)
        if value != 0 and not value == height == width:
            raise ConfigError(
                f"dataset.{key}: {value} is not allowed: images held in memory keep their own {width}x{height} pixels "
                "(0 = the data set's own)"
            )
    channels_last = cfg.experiment_params.channels_last
    normalize = Normalizer(spec.mean, spec.std, spec.image_shape, ctx.device, spec.full_scale, channels_last)
    crop, flip = augment_recipe(cfg, spec)
    return Data(
        MemoryTrainLoader(*train, normalize, crop, flip, cfg.dataset.alternate_flip, **_plan(cfg, ctx)),
        MemoryTestLoader(*test, normalize, ctx.rank, ctx.world),
        spec.num_classes,
        spec.image_shape,
        identity=identity_of(*train, *test),
    )


def _load_tree(cfg: Any, ctx: Any, spec: DataSpec) -> Data:
    """A tree of images: small ones in memory, large ones through a DataLoader, unless dataset.loader says which."""
    train, test = find_tree(data_root(cfg))
    _check_classes(cfg, len(train.classes), str(data_root(cfg)))
    if spec.num_classes not in (None, len(train.classes)):
        raise DataError(
            f"dataset.data_root: {train.folder} has {len(train.classes)} classes, {cfg.dataset.dataset_name} has "
            f"{spec.num_classes}: set dataset.dataset_name: ImageFolder"
        )
    size, loader = image_size(train.path(0)), cfg.dataset.loader
    if loader == "memory" or (loader == "auto" and _is_small(cfg, size, len(train.files) + len(test.files))):
        threads = torch.get_num_threads()  # already shared out among this machine's processes
        try:
            images = decode_split(train, size, threads), decode_split(test, size, threads)
        except UnequalSizes:
            if loader == "memory":
                raise
        else:
            return _tree_in_memory(cfg, ctx, spec, images, (train, test))
    return _tree_by_workers(cfg, ctx, spec, train, test)


def _is_small(cfg: Any, size: tuple[int, int], num_images: int) -> bool:
    asked = {cfg.dataset.resolution, cfg.dataset.eval_resolution} - {0}
    return (
        max(size) <= SMALL_PIXELS
        and num_images * size[0] * size[1] * 3 <= SMALL_BYTES
        and all(pixels == size[0] == size[1] for pixels in asked)
    )


def _tree_in_memory(
    cfg: Any, ctx: Any, spec: DataSpec, images: tuple[np.ndarray, np.ndarray], splits: tuple[Split, Split]
) -> Data:
    mean, std = pixel_statistics(images[0])
    shape = (3, *images[0].shape[1:3])
    full = replace(spec, num_classes=len(splits[0].classes), image_shape=shape, mean=mean, std=std)
    return _in_memory(cfg, ctx, full, (images[0], splits[0].labels), (images[1], splits[1].labels))


def _tree_by_workers(cfg: Any, ctx: Any, spec: DataSpec, train: Split, test: Split) -> Data:
    if cfg.dataset.alternate_flip:
        raise ConfigError("dataset.alternate_flip: true is not allowed: only for images that are held in memory")
    shorter = min(image_size(train.path(0)))
    own = LARGE_RESOLUTION if shorter > SMALL_PIXELS else shorter
    size = cfg.dataset.resolution or own
    eval_size = cfg.dataset.eval_resolution or size
    crop, flip = augment_recipe(cfg, spec)

    def normalizer(pixels: int) -> Normalizer:
        shape = (3, pixels, pixels)
        return Normalizer(spec.mean, spec.std, shape, ctx.device, channels_last=cfg.experiment_params.channels_last)

    workers, batch = cfg.dataset.num_workers, max(1, cfg.dataset.batch_size // ctx.world)
    return Data(
        FolderTrainLoader(train, size, normalizer(size), crop, flip, workers, **_plan(cfg, ctx)),
        FolderTestLoader(test, eval_size, normalizer(eval_size), batch, workers, ctx.rank, ctx.world),
        len(train.classes),
        (3, size, size),
        ((3, eval_size, eval_size),) if eval_size != size else (),
        identity_of(train.files, train.labels, test.files, test.labels),
    )
