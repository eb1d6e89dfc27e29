"""The data sets by name, and `load_data`, which turns a config into training and test batches.

A new data set is one line in `DATASETS`, with a reader as in utils/data_files.py.
"""

import difflib
import hashlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from utils import data_files
from utils.config import ConfigError
from utils.files import RunError
from utils.folder_loader import FolderTestLoader, FolderTrainLoader
from utils.image_tree import Split, UnequalSizes, decode_split, find_tree, image_size
from utils.memory_loader import MemoryTestLoader, MemoryTrainLoader, Normalizer, pixel_statistics

# ImageNet's statistics, as all of torchvision's models are trained with.
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

# dataset.augment -> (crop, flip)
AUGMENTS = {"none": (False, False), "flip": (False, True), "crop": (True, False), "crop_flip": (True, True)}

# loader: auto holds a tree of images in memory if they are at most so wide and high, and so many bytes when decoded.
SMALL_PIXELS, SMALL_BYTES = 64, 2 * 2**30
# The training resolution of larger images.
LARGE_RESOLUTION = 224
WHOLE_BYTES = 8 << 20  # what of an array makes its identity


class Files(Protocol):
    """A published data set on disk (utils/data_files.py)."""

    def fetch(self, root: Path, download: bool) -> None: ...
    def read(self, root: Path, train: bool) -> tuple[np.ndarray, np.ndarray]: ...


@dataclass(frozen=True)
class DataSpec:
    """What is known of a data set before its files are read.

    Attributes:
        num_classes: None if the tree of images decides.
        image_shape: (C, H, W); None if the tree of images decides.
        mean, std: of the training pixels scaled to 0..1, one number a channel.
        augment: the usual recipe, a key of `AUGMENTS`.
        files: None for a tree of images.
        full_scale: the pixel value that means 1.
    """

    name: str
    num_classes: int | None
    image_shape: tuple[int, int, int] | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augment: str
    files: Files | None
    full_scale: float = 255


# CIFAR is cropped and flipped as by He et al. 2016; SVHN is not augmented, as by Zagoruyko & Komodakis 2016. Turning
# digits and clothes around makes other digits and clothes.
_SPECS = [
    DataSpec("Digits", 10, (1, 8, 8), (0.3059,), (0.3766,), "none", data_files.DigitsFiles(), full_scale=16),
    DataSpec("MNIST", 10, (1, 28, 28), (0.1307,), (0.3081,), "none", data_files.MNIST_FILES),
    DataSpec("FashionMNIST", 10, (1, 28, 28), (0.2860,), (0.3530,), "none", data_files.FASHION_MNIST_FILES),
    DataSpec("CIFAR10", 10, (3, 32, 32), (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), "crop_flip",
             data_files.CIFAR10_FILES),
    DataSpec("CIFAR100", 100, (3, 32, 32), (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762), "crop_flip",
             data_files.CIFAR100_FILES),
    DataSpec("SVHN", 10, (3, 32, 32), (0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970), "none",
             data_files.SVHN_FILES),
    DataSpec("ImageNet", 1000, None, IMAGENET_MEAN, IMAGENET_STD, "crop_flip", None),
    DataSpec("ImageFolder", None, None, IMAGENET_MEAN, IMAGENET_STD, "crop_flip", None),
]  # fmt: skip
DATASETS: dict[str, DataSpec] = {spec.name: spec for spec in _SPECS}


class TrainLoader(Protocol):
    """Training batches; see `utils.order.EpochPlan` for the attributes."""

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


def load_data(cfg: Any, ctx: Any) -> Data:
    """The data set that the config names, ready on ``ctx.device``. Called by all ranks together.

    Raises:
        ConfigError: an option does not fit the data.
        ValueError, RuntimeError: files are missing or damaged; one line, on all ranks.
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
        raise ValueError(f"dataset.dataset_name: {name} is not allowed: one of {', '.join(near)}")
    spec = DATASETS[name]
    _check_classes(cfg, spec.num_classes, name)
    if cfg.dataset.loader == "ffcv":
        from utils.ffcv_loader import load_ffcv

        return load_ffcv(cfg, ctx, spec)
    if spec.files is None:
        return _load_tree(cfg, ctx, spec)
    _fetch(cfg, ctx, spec.files)
    root = data_root(cfg)
    return _in_memory(cfg, ctx, spec, spec.files.read(root, train=True), spec.files.read(root, train=False))


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
        raise ValueError(f"dataset.augment: {name} is not allowed: one of auto, {', '.join(AUGMENTS)}")
    crop, flip = AUGMENTS[name]
    if cfg.dataset.alternate_flip and not flip:
        raise ConfigError(
            f"dataset.alternate_flip: true is not allowed: dataset.augment {cfg.dataset.augment} flips no image of "
            f"{spec.name}; with augment flip or crop_flip"
        )
    return crop, flip


def _check_classes(cfg: Any, own: int | None, name: str) -> None:
    if own is not None and cfg.dataset.num_classes not in (0, own):
        raise ConfigError(
            f"dataset.num_classes: {cfg.dataset.num_classes} is not allowed: {name} has {own} classes "
            f"(0 or {own}; 0 = the data set's own)"
        )


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


def _plan(cfg: Any, ctx: Any) -> dict[str, Any]:
    """Keyword arguments of EpochPlan."""
    return {
        "batch_size": cfg.dataset.batch_size,
        "drop_last": cfg.dataset.drop_last,
        "seed": cfg.experiment_params.seed,
        "rank": ctx.rank,
        "world": ctx.world,
    }


def _in_memory(cfg: Any, ctx: Any, spec: DataSpec, train: data_files.Arrays, test: data_files.Arrays) -> Data:
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
        raise ValueError(
            f"dataset.data_root: {train.folder} has {len(train.classes)} classes, {spec.name} has {spec.num_classes}: "
            "set dataset.dataset_name: ImageFolder"
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
    full = DataSpec(spec.name, len(splits[0].classes), shape, mean, std, spec.augment, None)
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
