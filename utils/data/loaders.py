"""Interface of all loaders, and what they share: augmentation, epoch plan, identity of the data, naming of options."""

import contextlib
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from torch import Tensor

from harness_params import Config
from utils.data.specs import AUGMENTS, DataSpec
from utils.distributed import Context
from utils.errors import ConfigError, DataError

# With dataset.loader auto, a tree of small images (`SMALL_PIXELS`) is held in memory if it has at most this many bytes.
SMALL_BYTES = 2 * 2**30
# Training resolution of images with larger sides.
LARGE_RESOLUTION = 224
# Arrays of up to this many bytes enter the data's identity whole, larger ones by a sample of rows.
WHOLE_BYTES = 8 << 20

# Images float32 (N, C, H, W); labels int64 (N,), or of mixed images float32 (N, classes).
Batch = tuple[Tensor, Tensor]


class TrainLoader(Protocol):
    """Training batches; see `utils.data.epochs.EpochPlan` for the attributes."""

    num_images: int
    batch_size: int
    steps_per_epoch: int

    def global_batch(self, step: int) -> int: ...
    def draw_ahead(self, level: int, epoch: int) -> None: ...
    def batches(self, level: int, epoch: int, start_step: int = 0) -> Iterator[Batch]: ...
    def score_batches(self, level: int, num_batches: int) -> list[Batch]: ...


@runtime_checkable
class ResidentLoader(TrainLoader, Protocol):
    """A training loader whose batches are computed on the device, from images that stay there and an epoch's draws.

    A step that begins with `gather` can be captured as a CUDA graph: it needs nothing from the host.

    Attributes:
        draws_shape: of `draws`.
    """

    draws_shape: tuple[int, int]

    def draws(self, level: int, epoch: int) -> Tensor:
        """int64 (values per image, num_images), on the device: column i holds what is drawn for the i-th place."""

    def gather(self, columns: Tensor) -> Batch:
        """The batch of some columns of `draws`."""


class TestLoader(Protocol):
    """Test or validation batches of this rank; all ranks together yield every image once. num_images counts all."""

    num_images: int

    def batches(self) -> Iterator[Batch]: ...


@dataclass
class Data:
    """The loaders of a data set.

    Attributes:
        validation: training images that are held out; None without ``dataset.validation_images``.
        image_shape: (C, H, W) of a training image.
        other_shapes: further shapes, of test images and of progressive resizing.
        identity: digest of the data (`identity_of`), independent of the path; compared on resume.
        loader: value of ``dataset.loader`` that auto has come to.
    """

    train: TrainLoader
    test: TestLoader
    num_classes: int
    image_shape: tuple[int, int, int]
    other_shapes: tuple[tuple[int, int, int], ...] = ()
    identity: str = ""
    validation: TestLoader | None = None
    loader: str = "memory"

    @property
    def evaluated(self) -> list[TestLoader]:
        """What an evaluation covers: the test set, and the validation images where there are any."""
        return [self.test, *([self.validation] if self.validation else [])]

    @property
    def images(self) -> dict[str, int]:
        """Number of images that are trained on, held out for validation, and tested on."""
        held_out = self.validation.num_images if self.validation else 0
        return {"training": self.train.num_images, "validation": held_out, "test": self.test.num_images}

    def close(self) -> None:
        """End the loaders' worker processes and threads, if they have any."""
        for loader in (self.train, *self.evaluated):
            if hasattr(loader, "close"):
                loader.close()


def identity_of(*arrays: np.ndarray) -> str:
    """SHA-256 of arrays (labels, file names or images); of large ones, a sample of rows is hashed."""
    digest = hashlib.sha256()
    for array in arrays:
        rows = array if array.nbytes <= WHOLE_BYTES else array[:: -(-array.nbytes // WHOLE_BYTES)]
        digest.update(f"{array.shape} {array.dtype}".encode())
        digest.update(np.ascontiguousarray(rows).tobytes())
    return digest.hexdigest()


@contextlib.contextmanager
def naming(option: str) -> Iterator[None]:
    """Put `option` before the message of a DataError: readers name the file, their caller knows which option chose it.

    Raises:
        DataError: "option: message", instead of the reader's.
    """
    try:
        yield
    except DataError as error:
        raise DataError(f"{option}: {error}") from error


def data_root(cfg: Config) -> Path:
    return Path(cfg.dataset.data_root).expanduser()


def augment_recipe(cfg: Config, spec: DataSpec) -> tuple[bool, bool]:
    """(crop, flip) of the config; with augment auto, those of the data set."""
    return AUGMENTS[spec.augment if cfg.dataset.augment == "auto" else cfg.dataset.augment]


def check_class_count(cfg: Config, spec: DataSpec, found: int, source: Path) -> None:
    """Compare the config with the number of classes `found` in `source`, a tree or a .beton file.

    Raises:
        ConfigError: naming dataset.dataset_name or dataset.num_classes.
    """
    name, given = cfg.dataset.dataset_name, cfg.dataset.num_classes
    if spec.num_classes not in (None, found):
        raise ConfigError(
            f"dataset.dataset_name: {source} has {found} classes, {name} has {spec.num_classes}: "
            "set dataset.dataset_name: ImageFolder"
        )
    if given not in (0, found):
        raise ConfigError(
            f"dataset.num_classes: {given} is not allowed: {source} has {found} classes "
            f"(0 or {found}; 0 = the data set's own)"
        )


def epoch_plan(cfg: Config, ctx: Context) -> dict[str, Any]:
    """Keyword arguments of `utils.data.epochs.EpochPlan`, except num_images."""
    e = cfg.experiment_params
    return {
        "batch_size": cfg.dataset.batch_size,
        "drop_last": cfg.dataset.drop_last,
        "seed": e.seed if e.data_seed == -1 else e.data_seed,
        "score_seed": e.seed,  # masks do not depend on data_seed
        "rank": ctx.rank,
        "world": ctx.world,
    }
