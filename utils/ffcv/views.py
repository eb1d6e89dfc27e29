"""Crop and flip of each image, as in utils/data/by_workers.py: pure functions.

The draws are the same as there: the same YAML trains on the same crops with either loader.
"""

from collections.abc import Sequence
from random import Random

import numpy as np

from utils.data.images import RESIZE_RATIO, random_crop_box
from utils.ffcv.pixels import Geometry


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
    """A random resized crop, or the centre view, of each image, mirrored with probability 1/2.

    Args:
        seeds: one per image, of its crop and flip.
    """
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
