"""`load_data`: from a config to training and test batches. It chooses a loader of utils/data/ or utils/ffcv/.

The data sets are lines of `DATASETS` (utils/data/specs.py).
"""

import numpy as np
import torch

from harness_params import Config
from utils.data.by_workers import load_by_workers
from utils.data.held_out import hold_out
from utils.data.image_tree import Split, UnequalSizes, decode_split, find_tree, image_size
from utils.data.images import Arrays, pixel_statistics
from utils.data.in_memory import load_in_memory
from utils.data.loaders import SMALL_BYTES, Data, check_class_count, data_root, naming
from utils.data.published import Files, files_of
from utils.data.specs import DATASETS, SMALL_PIXELS, ArraySpec, DataSpec
from utils.distributed import Context
from utils.errors import ConfigError, DataError, RunError
from utils.output import note

__all__ = ["DATASETS", "Data", "load_data"]


def load_data(cfg: Config, ctx: Context) -> Data:
    """The config's data set, ready on ``ctx.device``, its validation images held out. All ranks call this together.

    Raises:
        ConfigError: an option does not fit the data.
        DataError: files are missing, damaged or unfit.
        RunError: a download failed. Every fault is one line and is raised on all ranks.
    """
    spec = DATASETS[cfg.dataset.dataset_name]
    if cfg.dataset.loader == "ffcv":
        data = _load_ffcv(cfg, ctx, spec)
    elif isinstance(spec, ArraySpec):
        data = _load_published(cfg, ctx, spec)
    else:
        data = _load_tree(cfg, ctx, spec)
    asked, images = cfg.dataset.batch_size, data.train.num_images
    if ctx.is_main and asked > images:
        note(f"dataset.batch_size: {asked} is more than the {images} training images: all of them make one batch")
    return data


def _load_ffcv(cfg: Config, ctx: Context, spec: DataSpec) -> Data:
    try:
        import utils.ffcv.library  # noqa: F401
    except (ImportError, OSError) as error:  # OSError: a system library that FFCV was built against is missing
        raise ConfigError(
            f"dataset.loader: ffcv is not allowed here: FFCV cannot be imported ({error}); see utils/ffcv/README.md"
        ) from error
    from utils.ffcv.loader import load_ffcv

    return load_ffcv(cfg, ctx, spec)


# ---------------------------------------------------------------------------------------------------------- published


def _load_published(cfg: Config, ctx: Context, spec: ArraySpec) -> Data:
    files, root = files_of(cfg.dataset.dataset_name), data_root(cfg)
    with naming("dataset.data_root"):
        _fetch(cfg, ctx, files)
        train, test = files.read(root, train=True), files.read(root, train=False)
    return load_in_memory(cfg, ctx, spec, *_split(cfg, train), test)


def _split(cfg: Config, train: Arrays) -> tuple[Arrays, Arrays | None]:
    """The images to train on, and the validation images, if any."""
    if not cfg.dataset.validation_images:  # nothing is copied
        return train, None
    kept, held_out = hold_out(train[1], cfg.dataset.validation_images)
    return (train[0][kept], train[1][kept]), (train[0][held_out], train[1][held_out])


def _fetch(cfg: Config, ctx: Context, files: Files) -> None:
    """Let rank 0 download missing files while the others wait; if it fails, all ranks raise."""
    fault = record = None
    if ctx.is_main:
        try:
            files.fetch(data_root(cfg), cfg.dataset.download)
        except Exception as error:
            # Any kind: the others must learn of it before this rank leaves them waiting.
            fault, record = error, (DataError if isinstance(error, DataError) else RunError, str(error))
    record = ctx.broadcast_object(record)
    if fault is not None:
        raise fault
    if record is not None:
        kind, message = record
        raise kind(message)


# --------------------------------------------------------------------------------------------------------------- trees


def _load_tree(cfg: Config, ctx: Context, spec: DataSpec) -> Data:
    """A tree of images: small ones in memory, large ones through a DataLoader, unless dataset.loader decides."""
    with naming("dataset.data_root"):
        train, test = find_tree(data_root(cfg))
        check_class_count(cfg, spec, len(train.classes), train.folder)
        size = image_size(train.path(0))
        images = _decode_small(cfg, train, test, size)
    if images is None:
        return load_by_workers(cfg, ctx, spec, train, test, min(size))
    kept, validation = _split(cfg, (images[0], train.labels))
    mean, std = pixel_statistics(kept[0])
    shape = (3, *images[0].shape[1:3])
    full = ArraySpec(len(train.classes), shape, mean, std, spec.augment)
    return load_in_memory(cfg, ctx, full, kept, validation, (images[1], test.labels))


def _decode_small(
    cfg: Config, train: Split, test: Split, size: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray] | None:
    """Decoded training and test images, uint8 (N, H, W, 3); None if workers are to read them.

    Args:
        size: (height, width) of the first image.
    """
    loader = cfg.dataset.loader
    if loader == "torchvision" or (loader == "auto" and not _is_small(cfg, size, len(train.files) + len(test.files))):
        return None
    threads = torch.get_num_threads()  # already this process's share of the machine's cores
    try:
        return decode_split(train, size, threads), decode_split(test, size, threads)
    except UnequalSizes:
        if loader == "memory":
            raise
        return None


def _is_small(cfg: Config, size: tuple[int, int], num_images: int) -> bool:
    """True if images of this size fit in memory and no other resolution is asked for."""
    asked = {cfg.dataset.resolution, cfg.dataset.eval_resolution} - {0}
    return (
        max(size) <= SMALL_PIXELS
        and num_images * size[0] * size[1] * 3 <= SMALL_BYTES
        and all(pixels == size[0] == size[1] for pixels in asked)
    )
