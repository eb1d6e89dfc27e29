"""Facts of each data set that are known before its files are read: one table, without torch or numpy.

A new data set is one line in `DATASETS`. If its files have a new format, it also needs a reader: a class in
utils/data/published.py and a line in its `READERS`. A plugin's line has a function that reads the images.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from utils.registry import Facts, Table

# ImageNet's statistics, with which all of torchvision's models are trained.
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

# Images with no side above this many pixels are small: networks take their CIFAR form, and with dataset.loader auto a
# tree is held in memory.
SMALL_PIXELS = 64

# dataset.augment -> (crop, flip)
AUGMENTS = {"none": (False, False), "flip": (False, True), "crop": (True, False), "crop_flip": (True, True)}


@dataclass(frozen=True)
class DataSpec:
    """Facts of a tree of image files, ``train/CLASS/*``; base of `ArraySpec`.

    Attributes:
        num_classes: None if the tree decides.
        image_shape: (C, H, W) in pixels; None if the tree decides.
        mean, std: of the training pixels scaled to 0..1, one number per channel.
        augment: usual augmentation, a key of `AUGMENTS`.
        reader: format of the files, a key of `READERS` in utils/data/published.py; or a function of (data root, whether
            the training set is asked for) that returns uint8 images (N, H, W, C) and whole labels (N,); "" for a tree.
        full_scale: pixel value that means 1.
        embedded: what holds the images, such as a Python package, so that no file is looked for; "" for files.
        large: a tree that never fits in memory.
        images: number of training and of test images of the published set; None if the files decide.
    """

    num_classes: int | None
    image_shape: tuple[int, int, int] | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augment: str
    reader: str | Callable[..., Any] = ""
    full_scale: float = 255
    embedded: str = ""
    large: bool = False
    images: tuple[int, int] | None = None

    @property
    def is_tree(self) -> bool:
        """True for image files in folders; other sets are held in memory."""
        return True

    @property
    def side(self) -> int | None:
        """Height and width in pixels of images held in memory; None for a tree."""
        return self.image_shape[1] if self.image_shape else None

    @property
    def flipped(self) -> bool:
        """True if the usual augmentation flips images."""
        return AUGMENTS[self.augment][1]


@dataclass(frozen=True)
class ArraySpec(DataSpec):
    """Facts of images that are held in memory as one array: classes and shape are known."""

    num_classes: int
    image_shape: tuple[int, int, int]

    @property
    def is_tree(self) -> bool:
        return False


def _stand_in(_: str, facts: Facts) -> DataSpec:
    """A data set of a saved run, as far as its facts are known; without any, a tree of images."""
    usual: Facts = {"num_classes": None, "image_shape": None, "mean": (), "std": (), "augment": "none"}
    return (ArraySpec if facts.get("image_shape") else DataSpec)(**usual | facts)


# CIFAR is cropped and flipped as by He et al. 2016; SVHN is not augmented, as by Zagoruyko & Komodakis 2016. Digits and
# clothes are not flipped: a mirrored one is another digit, or another piece of clothing.
_LINES: dict[str, DataSpec] = {
    "Digits": ArraySpec(
        10, (1, 8, 8), (0.3059,), (0.3766,), "none", "digits",
        full_scale=16, embedded="scikit-learn", images=(1437, 360),
    ),
    "MNIST": ArraySpec(10, (1, 28, 28), (0.1307,), (0.3081,), "none", "idx", images=(60_000, 10_000)),
    "FashionMNIST": ArraySpec(10, (1, 28, 28), (0.2860,), (0.3530,), "none", "idx", images=(60_000, 10_000)),
    "CIFAR10": ArraySpec(
        10, (3, 32, 32), (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), "crop_flip", "cifar",
        images=(50_000, 10_000),
    ),
    "CIFAR100": ArraySpec(
        100, (3, 32, 32), (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762), "crop_flip", "cifar",
        images=(50_000, 10_000),
    ),
    "SVHN": ArraySpec(
        10, (3, 32, 32), (0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970), "none", "svhn", images=(73_257, 26_032)
    ),
    "ImageNet": DataSpec(1000, None, IMAGENET_MEAN, IMAGENET_STD, "crop_flip", large=True, images=(1_281_167, 50_000)),
    "ImageFolder": DataSpec(None, None, IMAGENET_MEAN, IMAGENET_STD, "crop_flip"),
}  # fmt: skip
DATASETS: Table[DataSpec] = Table("data set", DataSpec, _LINES, _stand_in)
