"""What is cut from each image, and the resolution of each epoch: pure functions, the same as in utils/folder_loader.py.

Crops and flips come from the same draws as there, so that the same YAML trains on the same crops through either loader.
"""

from collections.abc import Sequence
from random import Random

import numpy as np

from utils.ffcv_decode import Geometry
from utils.folder_loader import RESIZE_RATIO, random_crop_box

# Resolutions between the first and the last epoch's are multiples of this: each new one costs the device a start-up.
RESOLUTION_STEP = 32


def centre_views(heights: np.ndarray, widths: np.ndarray, size: int) -> Geometry:
    """`evaluation_view`: the middle size x size pixels, after resizing the shorter side to size * 256/224."""
    count, short, least = len(heights), round(size * RESIZE_RATIO), np.minimum(heights, widths)
    crop = np.stack([np.zeros(count), np.zeros(count), heights, widths], axis=1).astype(np.int32)
    full = np.stack([short * heights // least, short * widths // least], axis=1)
    window = np.rint((full - size) / 2)  # halves to even, like Python's round in torchvision's centre crop
    resize = np.concatenate([full, window], axis=1).astype(np.int32)
    return Geometry(crop, resize, np.zeros(count, dtype=bool))


def training_views(
    heights: np.ndarray, widths: np.ndarray, size: int, crop: bool, flip: bool, seeds: Sequence[int]
) -> Geometry:
    """A random resized crop (or the centre view) of each image, mirrored with probability 1/2; by its own seed."""
    views = centre_views(heights, widths, size)
    if crop:
        views.resize[:] = (size, size, 0, 0)
    for k, seed in enumerate(seeds):
        rng = Random(seed)
        if crop:
            views.crop[k] = random_crop_box(int(heights[k]), int(widths[k]), rng)
        if flip:
            views.flip[k] = rng.random() < 0.5
    return views


def epoch_resolution(epoch: int, epochs: int, start: int, end: int) -> int:
    """Progressive resizing: from `start` in a level's first epoch to `end` in its last, linear, by multiples of 32."""
    if epoch >= epochs - 1:
        return end
    exact = start + (end - start) * epoch / (epochs - 1)
    stepped = RESOLUTION_STEP * round(exact / RESOLUTION_STEP)
    return min(max(stepped, start), end) if epoch else start
