"""Pixels of a batch: decoded, cropped, resized as Pillow does, and mirrored, in one compiled step.

FFCV's Loader is not used. It draws random crops inside compiled code, from a generator per thread that nothing seeds;
its crops and resizes differ from torchvision's (by 5 grey levels on average over centre crops of photographs); its
grouping of pipeline steps never ends when a compiled step follows an uncompiled one; it ignores a JPEG decoder that
fails; and it sets torch's thread count. Here one compiled function does all of the CPU's work on pixels and receives
crops and flips as arguments: it is a pure function of them. The device normalises.

Import this module only if FFCV is asked for: it imports FFCV and Numba.
"""

import math
from typing import NamedTuple

import numpy as np
from numba import njit

from utils.ffcv.library import imdecode

# Pillow's fixed point for 8-bit images: weights of 22 fractional bits (its Resample.c).
_BITS = 22
_HALF = np.int32(1 << (_BITS - 1))


class Geometry(NamedTuple):
    """Crop, resize and flip of each image of a batch.

    The part `crop` of the stored image is resized to (full height, full width); the window that starts at (row, column)
    of the result is kept. A random resized crop keeps the whole result; a centre crop resizes the whole image and keeps
    the middle.
    """

    crop: np.ndarray  # int32 (N, 4): top, left, height, width
    resize: np.ndarray  # int32 (N, 4): full height, full width, row, column
    flip: np.ndarray  # bool (N,)


@njit(nogil=True, error_model="numpy", cache=True)
def _weights(size, full, first, count):
    """Pillow's bilinear filter from `size` pixels to `full`, for the outputs first..first+count-1.

    Returns, per output: its first input pixel, the number of inputs, and their int32 weights. When shrinking, the
    triangle is as wide as the scale: torchvision's antialias.
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
    # With unsigned indices Numba need not handle negative ones: a quarter less time.
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
    """Cut `crop` from `source` (H, W, 3), resize it and keep a window: Pillow's pixels.

    The same bits as Pillow when it resizes rows first. Versions that begin with columns where that is cheaper differ by
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
    """Mirror left to right, in place."""
    height, width = image.shape[0], image.shape[1]
    for y in range(height):
        for x in range(width // 2):
            for c in range(3):
                kept = image[y, x, c]
                image[y, x, c] = image[y, width - 1 - x, c]
                image[y, width - 1 - x, c] = kept


# Not cached on disk, unlike the others: it holds the address of FFCV's decoder in this process.
@njit(nogil=True, error_model="numpy")
def decode_images(stored, starts, sizes, is_jpeg, shapes, crops, resizes, flips, out, damaged):
    """Image b: sizes[b] bytes of `stored` from starts[b] -> cut, resized and mirrored as `Geometry` says -> out[b]."""
    for b in range(len(starts)):
        height, width = shapes[b, 0], shapes[b, 1]
        content = stored[starts[b] : starts[b] + sizes[b]]
        # One buffer per image in work; FFCV keeps batch size * 5 buffers of the largest image.
        image = np.empty((height, width, 3), np.uint8)
        if is_jpeg[b]:
            damaged[b] = imdecode(content, image, height, width, height, width, 0, 0, 1, 1, False, False) != 0
        elif content.size == image.size:
            image.reshape(-1)[:] = content
        else:
            damaged[b] = True
        if not damaged[b]:
            _resize(image, crops[b], resizes[b], out[b])
            if flips[b]:
                _mirror(out[b])


def compile_decoder() -> None:
    """Compile `decode_images`, seconds per process, before the time limit of the first batch begins."""
    many, four = np.zeros(0, np.int64), np.zeros((0, 4), np.int32)
    flags, shapes, out = np.zeros(0, bool), np.zeros((0, 2), np.int64), np.zeros((0, 1, 1, 3), np.uint8)
    decode_images(np.frombuffer(b"", np.uint8), many, many, flags, shapes, four, four, flags, out, flags)
