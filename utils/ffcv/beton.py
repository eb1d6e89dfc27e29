"""Reading a .beton file, FFCV's format, mapped into memory.

Import this module only if FFCV is asked for: it imports FFCV and Numba.
"""

import mmap
from concurrent.futures import Executor
from pathlib import Path

import numpy as np

from utils.errors import DataError
from utils.ffcv.library import JPEG_MODE, IntField, Reader, RGBImageField
from utils.ffcv.pixels import Geometry, decode_images

IMAGES_PER_TASK = 8  # images that a thread decodes before it takes the next task


class Beton:
    """A .beton file of (RGB image, integer label) pairs, mapped into memory.

    Args:
        cached: True if the file can stay in the system's page cache. Otherwise the system is asked not to read ahead,
            and `ask_for` makes it fetch a batch's images before their use.

    Attributes:
        num_images, labels: int64 (num_images,).
        heights, widths: int64 (num_images,), of the stored images.

    Raises:
        DataError: the file is missing, no .beton of images and labels, or not whole; names it.
    """

    def __init__(self, path: Path, cached: bool = True):
        self.path, self.cached = Path(path), cached
        try:
            reader = Reader(str(path))
            with open(path, "rb") as file:
                self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError, IndexError, AssertionError, UnicodeDecodeError, KeyError) as error:
            raise DataError(f"{path} is no readable .beton file: {str(error) or type(error).__name__}") from error
        kinds = [type(handler) for handler in reader.handlers.values()]
        if kinds != [RGBImageField, IntField]:
            found = ", ".join(f"{name}: {kind.__name__}" for name, kind in zip(reader.field_names, kinds))
            raise DataError(
                f"{path} does not hold an RGB image and an integer label per sample, but {found or 'nothing'}"
            )
        images, labels = (reader.metadata[name] for name in reader.metadata.dtype.names)
        self.num_images, self.labels = len(labels), labels.astype(np.int64)
        self.heights, self.widths = images["height"].astype(np.int64), images["width"].astype(np.int64)
        self.starts, self.is_jpeg = images["data_ptr"].astype(np.int64), images["mode"] == JPEG_MODE
        self.bytes = np.frombuffer(self.map, dtype=np.uint8)
        self.sizes = self._sizes(reader)
        if not cached:
            self.map.madvise(mmap.MADV_RANDOM)

    def _sizes(self, reader: Reader) -> np.ndarray:
        """Bytes of each stored image, from the table at the end of the file; a file that was cut off has no table."""
        table = reader.alloc_table[np.argsort(reader.alloc_table["ptr"])]
        places = np.searchsorted(table["ptr"], self.starts.astype(np.uint64))
        whole = self.num_images > 0 and len(reader.metadata) == reader.num_samples
        if not whole or len(table) < self.num_images or places.max(initial=0) >= len(table):
            raise DataError(f"{self.path} is not whole (cut off, or still being written): write it again")
        sizes = table["size"][places].astype(np.int64)
        wrong = table["ptr"][places] != self.starts.astype(np.uint64)
        if wrong.any() or (self.starts + sizes).max() > len(self.bytes) or self.labels.min() < 0:
            raise DataError(f"{self.path} is damaged: its table of images does not fit its content; write it again")
        return sizes

    def ask_for(self, ids: np.ndarray) -> None:
        """Make the system read the images `ids` in the background, unless the file is cached."""
        if self.cached:
            return
        for start, size in zip(self.starts[ids].tolist(), self.sizes[ids].tolist()):
            page = start - start % mmap.PAGESIZE
            self.map.madvise(mmap.MADV_WILLNEED, page, start + size - page)

    def decode(self, ids: np.ndarray, geometry: Geometry, out: np.ndarray, pool: Executor) -> None:
        """Fill `out`, uint8 (N, height, width, 3), with the images `ids` (N,), on the pool's threads.

        Raises:
            DataError: an image in the file is damaged.
        """
        damaged = np.zeros(len(ids), dtype=bool)
        shapes = np.stack([self.heights[ids], self.widths[ids]], axis=1)
        batch = self.starts[ids], self.sizes[ids], self.is_jpeg[ids], shapes, *geometry, out, damaged

        def decode_part(start: int) -> None:
            decode_images(self.bytes, *(array[start : start + IMAGES_PER_TASK] for array in batch))

        for _ in pool.map(decode_part, range(0, len(ids), IMAGES_PER_TASK)):
            pass
        if damaged.any():
            raise DataError(f"{self.path}: image {ids[damaged.argmax()]} in the file is damaged; write it again")
