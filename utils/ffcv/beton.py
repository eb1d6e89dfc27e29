"""Reading a .beton file: FFCV's format and JPEG decoder, and Pillow's own resizing, in one compiled step.

FFCV's Loader is not used. It draws its random crops inside compiled code, from a generator of each thread that nothing
seeds; it crops and resizes otherwise than torchvision (5 grey levels off, on average over centre crops of photographs);
its grouping of pipeline steps never ends when a compiled step follows an uncompiled one; it ignores a JPEG decoder that
fails; and it sets torch's own thread count. Here one compiled function does all that is done to pixels on the CPU, with
the crops and flips handed to it: it is a pure function of its arguments. Normalisation is left to the device.

Import this module only where FFCV is asked for: it imports FFCV, Numba and OpenCV.
"""

import math
import mmap
from concurrent.futures import Executor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numba import njit

from utils.errors import DataError
from utils.ffcv.library import _import_ffcv

Reader, IntField, RGBImageField, _imdecode = _import_ffcv()

JPEG_MODE = 0  # of a stored image; plain pixels are 1
IMAGES_A_TASK = 8  # decoded by a thread before it takes the next
# Pillow's fixed point for 8-bit images: weights of 22 fractional bits (its Resample.c).
_BITS = 22
_HALF = np.int32(1 << (_BITS - 1))

_imdecode = njit(nogil=True)(_imdecode)


class Geometry(NamedTuple):
    """Where each image of a batch is cut and how it is resized; int32 (N, 4), (N, 4) and bool (N,).

    The part `crop` = (top, left, height, width) of the stored image is resized to (full height, full width); of that
    the window that starts at (row, column) is kept: `resize` = (full height, full width, row, column). A random resized
    crop keeps all of it; resizing before a centre crop takes the whole image and keeps the middle.
    """

    crop: np.ndarray
    resize: np.ndarray
    flip: np.ndarray


class Beton:
    """A .beton file of (RGB image, integer label) pairs, mapped into memory.

    Args:
        cached: whether the file can stay in the system's page cache. If not, the system is told not to read around what
            is touched, and `ask_for` has it fetch a batch's images before their use.

    Attributes:
        num_images, labels: int64 (num_images,).
        heights, widths: int64 (num_images,), of the stored images.

    Raises:
        DataError: no such file, not a .beton of images and labels, or not whole. Names the file.
    """

    def __init__(self, path: Path, cached: bool = True):
        self.path, self.cached = Path(path), cached
        try:
            reader = Reader(str(path))
            with open(path, "rb") as file:
                self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError, IndexError, AssertionError, UnicodeDecodeError, KeyError) as error:
            raise DataError(f"{path} is no readable .beton file: {error or type(error).__name__}") from error
        kinds = [type(handler) for handler in reader.handlers.values()]
        if kinds != [RGBImageField, IntField]:
            found = ", ".join(f"{name}: {kind.__name__}" for name, kind in zip(reader.field_names, kinds))
            raise DataError(
                f"{path} does not hold an RGB image and an integer label a sample, but {found or 'nothing'}"
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
        """Bytes of each stored image, from the table at the end of the file, which a cut-off file lacks."""
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

    @property
    def num_bytes(self) -> int:
        return len(self.bytes)

    def ask_for(self, ids: np.ndarray) -> None:
        """Has the system read the images `ids` in the background, if they are not expected in memory."""
        if self.cached:
            return
        for start, size in zip(self.starts[ids].tolist(), self.sizes[ids].tolist()):
            page = start - start % mmap.PAGESIZE
            self.map.madvise(mmap.MADV_WILLNEED, page, start + size - page)

    def decode(self, ids: np.ndarray, geometry: Geometry, out: np.ndarray, pool: Executor) -> None:
        """Fills `out`, uint8 (N, height, width, 3), with the images `ids` (N,), on the pool's threads.

        Raises:
            DataError: an image in the file is damaged.
        """
        damaged = np.zeros(len(ids), dtype=bool)
        shapes = np.stack([self.heights[ids], self.widths[ids]], axis=1)
        batch = self.starts[ids], self.sizes[ids], self.is_jpeg[ids], shapes, *geometry, out, damaged

        def decode_part(start: int) -> None:
            decode_images(self.bytes, *(array[start : start + IMAGES_A_TASK] for array in batch))

        for _ in pool.map(decode_part, range(0, len(ids), IMAGES_A_TASK)):
            pass
        if damaged.any():
            raise DataError(f"image {ids[damaged.argmax()]} in the file is damaged; write it again")


@njit(nogil=True, error_model="numpy", cache=True)
def _weights(size, full, first, count):
    """Pillow's bilinear filter for resizing `size` pixels to `full`, for the outputs first..first+count-1.

    Returns, for each output, its first input pixel, how many it takes, and their int32 weights. When shrinking, the
    triangle is as wide as the scale, which is what torchvision calls antialias.
    """
    scale = size / full
    width = max(scale, 1.0)
    start, taken = np.empty(count, np.int32), np.empty(count, np.int32)
    fixed = np.zeros((count, math.ceil(width) * 2 + 1), np.int32)
    weights = np.empty(fixed.shape[1])
    for k in range(count):
        centre = (first + k + 0.5) * scale
        low = max(int(centre - width + 0.5), 0)
        high = min(int(centre + width + 0.5), size)
        total = 0.0
        for t in range(high - low):
            weights[t] = max(0.0, 1.0 - abs((low + t - centre + 0.5) / width))
            total += weights[t]
        for t in range(high - low):
            fixed[k, t] = np.int32(0.5 + weights[t] / total * (1 << _BITS))
        start[k], taken[k] = low, high - low
    return start, taken, fixed


@njit(nogil=True, error_model="numpy", cache=True)
def _resize_row(source, start, taken, weights, out):
    """One row of pixels, (width, 3), to uint8 (3 * outputs,)."""
    values = source.reshape(-1)
    # Unsigned places spare Numba the question whether one counts from the end: a quarter of the time.
    for x in range(np.uintp(len(start))):
        place = np.uintp(3) * np.uintp(start[x])
        red = green = blue = _HALF
        for t in range(np.uintp(taken[x])):
            weight = weights[x, t]
            red = np.int32(red + np.int32(weight * values[place]))
            green = np.int32(green + np.int32(weight * values[place + np.uintp(1)]))
            blue = np.int32(blue + np.int32(weight * values[place + np.uintp(2)]))
            place += np.uintp(3)
        first = np.uintp(3) * x
        out[first], out[first + np.uintp(1)], out[first + np.uintp(2)] = red >> _BITS, green >> _BITS, blue >> _BITS


@njit(nogil=True, error_model="numpy", cache=True)
def _resize(source, crop, resize, out):
    """Cuts `crop` from `source` (H, W, 3), resizes it and keeps a window: Pillow's pixels.

    To the bit when Pillow too does rows first; versions that do columns first where that is cheaper round otherwise, by
    at most 1. int32 sums cannot overflow: weights add up to 2**22.
    """
    height, width = out.shape[0], out.shape[1]
    y_start, y_taken, y_weight = _weights(crop[2], resize[0], resize[2], height)
    x_start, x_taken, x_weight = _weights(crop[3], resize[1], resize[3], width)
    top = y_start[0]
    rows = np.empty((y_start[height - 1] + y_taken[height - 1] - top, width * 3), np.uint8)
    for y in range(rows.shape[0]):
        _resize_row(source[crop[0] + top + y, crop[1] : crop[1] + crop[3]], x_start, x_taken, x_weight, rows[y])
    sums = np.empty(width * 3, np.int32)
    for y in range(height):
        sums[:] = _HALF
        for t in range(y_taken[y]):
            weight, line = y_weight[y, t], rows[y_start[y] + t - top]
            for x in range(width * 3):
                sums[x] = np.int32(sums[x] + np.int32(weight * line[x]))
        pixels = out[y].reshape(-1)
        for x in range(width * 3):
            pixels[x] = np.uint8(sums[x] >> _BITS)


@njit(nogil=True, error_model="numpy", cache=True)
def _mirror(image):
    """Left to right, in place."""
    height, width = image.shape[0], image.shape[1]
    for y in range(height):
        for x in range(width // 2):
            for c in range(3):
                kept = image[y, x, c]
                image[y, x, c] = image[y, width - 1 - x, c]
                image[y, width - 1 - x, c] = kept


# Not cached on disk, as the others are: it holds the address of FFCV's decoder in this process.
@njit(nogil=True, error_model="numpy")
def decode_images(stored, starts, sizes, is_jpeg, shapes, crops, resizes, flips, out, damaged):
    """Image b: sizes[b] bytes of `stored` from starts[b] -> cut, resized and mirrored as `Geometry` says -> out[b]."""
    for b in range(len(starts)):
        height, width = shapes[b, 0], shapes[b, 1]
        content = stored[starts[b] : starts[b] + sizes[b]]
        # Each thread's own, and no larger than the image: FFCV holds the largest image times the batch times five.
        image = np.empty((height, width, 3), np.uint8)
        if is_jpeg[b]:
            damaged[b] = _imdecode(content, image, height, width, height, width, 0, 0, 1, 1, False, False) != 0
        elif content.size == image.size:
            image.reshape(-1)[:] = content
        else:
            damaged[b] = True
        if not damaged[b]:
            _resize(image, crops[b], resizes[b], out[b])
            if flips[b]:
                _mirror(out[b])


def compile_decoder() -> None:
    """Compiles `decode_images`, which takes some seconds a process: before anyone waits for a batch by the clock."""
    many, four = np.zeros(0, np.int64), np.zeros((0, 4), np.int32)
    flags, shapes, out = np.zeros(0, bool), np.zeros((0, 2), np.int64), np.zeros((0, 1, 1, 3), np.uint8)
    decode_images(np.frombuffer(b"", np.uint8), many, many, flags, shapes, four, four, flags, out, flags)
