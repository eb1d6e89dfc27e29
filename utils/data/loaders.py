"""What every loader gives, and what the loaders have in common."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from utils.data.specs import AUGMENTS, DataSpec
from utils.errors import ConfigError, DataError

# loader: auto holds a tree of images in memory if they are at most so wide and high, and so many bytes when decoded.
SMALL_PIXELS, SMALL_BYTES = 64, 2 * 2**30


# The training resolution of larger images.
LARGE_RESOLUTION = 224


WHOLE_BYTES = 8 << 20  # what of an array makes its identity


class TrainLoader(Protocol):
    """Training batches; see `utils.data.epochs.EpochPlan` for the attributes."""

    num_images: int
    batch_size: int
    steps_per_epoch: int

    def global_batch(self, step: int) -> int: ...
    def batches(self, level: int, epoch: int, start_step: int = 0) -> Iterator[tuple[Tensor, Tensor]]: ...
    def score_batches(self, level: int, num_batches: int) -> list[tuple[Tensor, Tensor]]: ...


class TestLoader(Protocol):
    """Test batches of this rank; over all ranks every image once. num_images counts the whole test set."""

    num_images: int

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]: ...


@dataclass
class Data:
    """Both loaders of a data set.

    Attributes:
        image_shape: (C, H, W) of a training image.
        other_shapes: of test images and of progressive resizing, where they are others.
        identity: the same for the same data (`identity_of`), wherever it lies; by it a resume knows what it began with.
    """

    train: TrainLoader
    test: TestLoader
    num_classes: int
    image_shape: tuple[int, int, int]
    other_shapes: tuple[tuple[int, int, int], ...] = ()
    identity: str = ""

    def close(self) -> None:
        """Ends worker processes, where there are any."""
        for loader in (self.train, self.test):
            if hasattr(loader, "close"):
                loader.close()


def identity_of(*arrays: np.ndarray) -> str:
    """Digest of arrays (of labels, file names or images), of large ones by a sample of rows."""
    digest = hashlib.sha256()
    for array in arrays:
        rows = array if array.nbytes <= WHOLE_BYTES else array[:: -(-array.nbytes // WHOLE_BYTES)]
        digest.update(f"{array.shape} {array.dtype}".encode())
        digest.update(np.ascontiguousarray(rows).tobytes())
    return digest.hexdigest()


def data_root(cfg: Any) -> Path:
    return Path(cfg.dataset.data_root).expanduser()


def augment_recipe(cfg: Any, spec: DataSpec) -> tuple[bool, bool]:
    """(crop, flip) as the config says, or as is usual for the data set."""
    name = spec.augment if cfg.dataset.augment == "auto" else cfg.dataset.augment
    if name not in AUGMENTS:
        raise DataError(f"dataset.augment: {name} is not allowed: one of auto, {', '.join(AUGMENTS)}")
    crop, flip = AUGMENTS[name]
    if cfg.dataset.alternate_flip and not flip:
        raise ConfigError(
            f"dataset.alternate_flip: true is not allowed: dataset.augment {cfg.dataset.augment} flips no image of "
            f"{cfg.dataset.dataset_name}; with augment flip or crop_flip"
        )
    return crop, flip


def _check_classes(cfg: Any, own: int | None, name: str) -> None:
    if own is not None and cfg.dataset.num_classes not in (0, own):
        raise ConfigError(
            f"dataset.num_classes: {cfg.dataset.num_classes} is not allowed: {name} has {own} classes "
            f"(0 or {own}; 0 = the data set's own)"
        )


def _plan(cfg: Any, ctx: Any) -> dict[str, Any]:
    """Keyword arguments of EpochPlan."""
    return {
        "batch_size": cfg.dataset.batch_size,
        "drop_last": cfg.dataset.drop_last,
        "seed": cfg.experiment_params.seed,
        "rank": ctx.rank,
        "world": ctx.world,
    }
