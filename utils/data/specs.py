"""What is known of each data set before its files are read: one table."""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from utils.data import published

# ImageNet's statistics, as all of torchvision's models are trained with.
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


# dataset.augment -> (crop, flip)
AUGMENTS = {"none": (False, False), "flip": (False, True), "crop": (True, False), "crop_flip": (True, True)}


class Files(Protocol):
    """A published data set on disk (utils/data/published.py)."""

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
    DataSpec("Digits", 10, (1, 8, 8), (0.3059,), (0.3766,), "none", published.DigitsFiles(), full_scale=16),
    DataSpec("MNIST", 10, (1, 28, 28), (0.1307,), (0.3081,), "none", published.MNIST_FILES),
    DataSpec("FashionMNIST", 10, (1, 28, 28), (0.2860,), (0.3530,), "none", published.FASHION_MNIST_FILES),
    DataSpec("CIFAR10", 10, (3, 32, 32), (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), "crop_flip",
             published.CIFAR10_FILES),
    DataSpec("CIFAR100", 100, (3, 32, 32), (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762), "crop_flip",
             published.CIFAR100_FILES),
    DataSpec("SVHN", 10, (3, 32, 32), (0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970), "none",
             published.SVHN_FILES),
    DataSpec("ImageNet", 1000, None, IMAGENET_MEAN, IMAGENET_STD, "crop_flip", None),
    DataSpec("ImageFolder", None, None, IMAGENET_MEAN, IMAGENET_STD, "crop_flip", None),
]  # fmt: skip


DATASETS: dict[str, DataSpec] = {spec.name: spec for spec in _SPECS}
