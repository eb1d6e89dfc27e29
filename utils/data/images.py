"""Pixels: normalisation, statistics, random crops and progressive resizing, shared by all loaders."""

import math
from collections.abc import Sequence
from random import Random

import numpy as np
import torch
from torch import Tensor

Arrays = tuple[np.ndarray, np.ndarray]  # images uint8 (N, H, W, C), labels int64 (N,)

# Evaluation at S pixels: the shorter side is resized to S * 256/224 and the middle is kept (Krizhevsky et al. 2012).
RESIZE_RATIO = 256 / 224
# Random crops cover 8% to 100% of the image, at 3:4 to 4:3 (Szegedy et al. 2015, section 6).
CROP_AREA, CROP_RATIO, CROP_TRIES = (0.08, 1.0), (3 / 4, 4 / 3), 10
# Progressive resizing uses multiples of this between first and last epoch: each new size costs the device a warm-up.
RESOLUTION_STEP = 32


class Normalizer:
    """Turn uint8 pixels into (x / full_scale - mean) / std.

    Args:
        mean, std: one number per channel, of pixels scaled to 0..1.
        image_shape: (C, H, W) of the images.
        full_scale: pixel value that means 1.
        channels_last: give images of several channels channels_last strides.
    """

    def __init__(
        self,
        mean: Sequence[float],
        std: Sequence[float],
        image_shape: tuple[int, int, int],
        device: torch.device,
        full_scale: float = 255,
        channels_last: bool = True,
    ):
        self.image_shape, self.channels_last = image_shape, channels_last
        _, height, width = image_shape
        mean64, std64 = np.asarray(mean, dtype=np.float64), np.asarray(std, dtype=np.float64)
        # One factor and one term per value of an image: a CPU vectorises rows this long, not three broadcast channels.
        # Multiply and add stay two roundings, never a fused operation on some elements only: an image gets the same
        # bits in a batch of any size.
        self.factor = torch.from_numpy(np.tile(1 / (full_scale * std64), height * width)).float().to(device)
        self.term = torch.from_numpy(np.tile(-mean64 / std64, height * width)).float().to(device)

    def __call__(self, pixels: Tensor) -> Tensor:
        """uint8 (N, H*W*C) -> float32 (N, C, H, W)."""
        channels, height, width = self.image_shape
        images = pixels.float().mul_(self.factor).add_(self.term)
        if channels == 1:
            return images.view(-1, 1, height, width)
        images = images.view(-1, height, width, channels).permute(0, 3, 1, 2)
        return images if self.channels_last else images.contiguous()


def pixel_statistics(images: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel of uint8 (N, H, W, C), scaled to 0..1, from exact integer sums."""
    means, stds = [], []
    values = np.arange(256)
    for channel in range(images.shape[3]):
        counts = np.zeros(256, dtype=np.int64)
        for part in np.array_split(images, max(1, len(images) // 4096)):
            counts += np.bincount(part[..., channel].reshape(-1), minlength=256)
        total, first, second = int(counts.sum()), int(counts @ values), int(counts @ values**2)
        # n * sum(x^2) - sum(x)^2 in Python's unbounded integers: exact, no cancellation.
        variance = (total * second - first * first) / (total * total)
        means.append(first / total / 255)
        # A constant channel becomes zero by a deviation of 1, not 0/0.
        stds.append(variance**0.5 / 255 or 1.0)
    return tuple(means), tuple(stds)


def random_crop_box(height: int, width: int, rng: Random) -> tuple[int, int, int, int]:
    """(top, left, height, width) of a crop of random area and ratio; the middle, at the nearest ratio, if none fits."""
    for _ in range(CROP_TRIES):
        area = height * width * rng.uniform(*CROP_AREA)
        ratio = math.exp(rng.uniform(math.log(CROP_RATIO[0]), math.log(CROP_RATIO[1])))
        crop_width, crop_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            return rng.randint(0, height - crop_height), rng.randint(0, width - crop_width), crop_height, crop_width
    ratio = min(max(width / height, CROP_RATIO[0]), CROP_RATIO[1])
    crop_width, crop_height = min(width, round(height * ratio)), min(height, round(width / ratio))
    return (height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width


def epoch_resolution(epoch: int, epochs: int, start: int, end: int) -> int:
    """Progressive resizing: from `start` in a level's first epoch to `end` in its last, linear, by multiples of 32."""
    if epoch >= epochs - 1:
        return end
    exact = start + (end - start) * epoch / (epochs - 1)
    stepped = RESOLUTION_STEP * round(exact / RESOLUTION_STEP)
    return min(max(stepped, start), end) if epoch else start
