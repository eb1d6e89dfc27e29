"""What is known of each data set before its files are read: one table, without torch or numpy.

A new data set is one line in `DATASETS`. If its files have a format of their own, it needs a reader, too: a class in
utils/data/published.py and a line in its `READERS`.
"""

from dataclasses import dataclass

# ImageNet's statistics, as all of torchvision's models are trained with.
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

# dataset.augment -> (crop, flip)
AUGMENTS = {"none": (False, False), "flip": (False, True), "crop": (True, False), "crop_flip": (True, True)}


@dataclass(frozen=True)
class DataSpec:
    """What is known of a data set before its files are read.

    Attributes:
        num_classes: None if the tree of images decides.
        image_shape: (C, H, W) in pixels; None if the tree of images decides.
        mean, std: of the training pixels scaled to 0..1, one number per channel.
        augment: the usual recipe, a key of `AUGMENTS`.
        reader: the format of its files, a key of `READERS` in utils/data/published.py; "" for a tree of images.
        full_scale: the pixel value that means 1.
        embedded: the Python package that the images come with, so that no file is looked for; "" for files.
    """

    num_classes: int | None
    image_shape: tuple[int, int, int] | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augment: str
    reader: str = ""
    full_scale: float = 255
    embedded: str = ""

    @property
    def is_tree(self) -> bool:
        """Whether it is image files in folders, ``train/CLASS/*``; the others are held in memory."""
        return not self.reader

    @property
    def side(self) -> int | None:
        """Height and width in pixels of images held in memory; None for a tree."""
        return self.image_shape[1] if self.image_shape else None

    @property
    def flipped(self) -> bool:
        """Whether its usual recipe flips images."""
        return AUGMENTS[self.augment][1]


# CIFAR is cropped and flipped as by He et al. 2016; SVHN is not augmented, as by Zagoruyko & Komodakis 2016. Digits and
# clothes that are turned around are other digits and clothes.
DATASETS: dict[str, DataSpec] = {
    "Digits": DataSpec(10, (1, 8, 8), (0.3059,), (0.3766,), "none", "digits", full_scale=16, embedded="scikit-learn"),
    "MNIST": DataSpec(10, (1, 28, 28), (0.1307,), (0.3081,), "none", "mnist"),
    "FashionMNIST": DataSpec(10, (1, 28, 28), (0.2860,), (0.3530,), "none", "fashion_mnist"),
    "CIFAR10": DataSpec(10, (3, 32, 32), (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), "crop_flip", "cifar10"),
    "CIFAR100": DataSpec(100, (3, 32, 32), (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762), "crop_flip", "cifar100"),
    "SVHN": DataSpec(10, (3, 32, 32), (0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970), "none", "svhn"),
    "ImageNet": DataSpec(1000, None, IMAGENET_MEAN, IMAGENET_STD, "crop_flip"),
    "ImageFolder": DataSpec(None, None, IMAGENET_MEAN, IMAGENET_STD, "crop_flip"),
}
