"""Images to write into a .beton: a tree of files, or arrays."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from utils.data.image_tree import Split, image_size, open_image
from utils.errors import DataError


class Source(Protocol):
    """Labelled images by number; `__getitem__` raises DataError, naming the file, where one is broken."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> tuple[np.ndarray, int]: ...
    def largest(self) -> int: ...


@dataclass(frozen=True)
class TreeSource:
    """The image files of one split."""

    split: Split

    def __len__(self) -> int:
        return len(self.split.files)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        try:
            image = open_image(self.split.path(index))
        except ValueError as error:
            raise DataError(str(error).removeprefix("dataset.data_root: ")) from error
        return np.asarray(image), int(self.split.labels[index])

    def largest(self) -> int:
        """Pixels of the largest image, by the files' headers."""
        most = 0
        for index in range(len(self)):
            try:
                height, width = image_size(self.split.path(index))
            except ValueError:  # it is broken, which reading it will tell
                continue
            most = max(most, height * width)
        return most


@dataclass(frozen=True)
class ArraySource:
    """Images (N, H, W, 1 or 3) and labels (N,) in memory; grey ones become RGB."""

    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        image = self.images[index]
        return np.ascontiguousarray(np.broadcast_to(image, (*image.shape[:2], 3))), int(self.labels[index])

    def largest(self) -> int:
        return self.images.shape[1] * self.images.shape[2]
