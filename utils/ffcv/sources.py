"""Images to write into a .beton file: from a tree of files, or from arrays."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from utils.data.image_tree import Split, image_size, open_image
from utils.errors import DataError


class ImageSource(Protocol):
    """Labelled images by number."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        """RGB image, uint8 (H, W, 3), and label.

        Raises:
            DataError: the image is broken; names its file.
        """

    def largest(self) -> int:
        """Pixels of the largest image."""


@dataclass(frozen=True)
class TreeSource:
    """Image files of one split."""

    split: Split

    def __len__(self) -> int:
        return len(self.split.files)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return np.asarray(open_image(self.split.path(index))), int(self.split.labels[index])

    def largest(self) -> int:
        """Pixels of the largest image, from the files' headers; broken files are left to `__getitem__`."""
        most = 0
        for index in range(len(self)):
            try:
                height, width = image_size(self.split.path(index))
            except DataError:
                continue
            most = max(most, height * width)
        return most


@dataclass(frozen=True)
class ArraySource:
    """Images (N, H, W, 1 or 3) and labels (N,) in memory; grey images become RGB."""

    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        image = self.images[index]
        return np.ascontiguousarray(np.broadcast_to(image, (*image.shape[:2], 3))), int(self.labels[index])

    def largest(self) -> int:
        return self.images.shape[1] * self.images.shape[2]
