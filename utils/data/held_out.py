"""Validation images: training images that are held out of training, the same ones in every run.

How many of each class is a pure function of the classes' sizes, which ones a function of the class and a constant: not
of the seed, so that runs with different seeds compare. More validation images of a class contain the fewer ones.
"""

from collections.abc import Sequence

import numpy as np

from utils.errors import ConfigError

# First part of the seed of each class's draw; the class's label is the second.
HELD_OUT_SEED = 20_190_506


def hold_out(labels: np.ndarray, images: int) -> tuple[np.ndarray, np.ndarray]:
    """Splits a training set: (indices of the images to train on, indices of the validation images), each ascending.

    Args:
        labels: int64 (N,), of the training set in its own order.
        images: how many to hold out; 0 = none.

    Raises:
        ConfigError: the classes cannot spare so many; names dataset.validation_images.
    """
    everything = np.arange(len(labels))
    if not images:
        return everything, everything[:0]
    classes, sizes = np.unique(labels, return_counts=True)
    _check(classes, sizes, images)
    is_held_out = np.zeros(len(labels), dtype=bool)
    for label, count in zip(classes.tolist(), held_out_counts(sizes.tolist(), images)):
        # numpy's compatibility policy freezes RandomState's stream: the images are the same everywhere.
        order = np.random.RandomState([HELD_OUT_SEED, label]).permutation(np.flatnonzero(labels == label))
        is_held_out[order[:count]] = True
    return everything[~is_held_out], everything[is_held_out]


def _check(classes: np.ndarray, sizes: np.ndarray, images: int) -> None:
    fault = f"dataset.validation_images: {images} is not allowed"
    least, most = len(sizes), int(sizes.sum()) - len(sizes)
    if sizes.min() < 2:
        raise ConfigError(f"{fault}: class {classes[sizes.argmin()]} (from 0) has a single training image (0 = none)")
    if not least <= images <= most:
        raise ConfigError(
            f"{fault}: 0, or {least} to {most}: at least one image of each of the {least} classes is held out, and at "
            f"least one of each stays among the {sizes.sum()} training images"
        )


def held_out_counts(sizes: Sequence[int], images: int) -> list[int]:
    """How many images of each class are held out: in proportion to its size, by largest remainders.

    A class of n images is due n * images / N. It gets the whole part, and the largest fractions get one image more each
    until all are given out; among equal fractions the lower class comes first (Hamilton's method). A class that would
    get none, or all of its images, is set to one, or to all but one, and the others are shared out again.

    Args:
        sizes: images per class, each at least 2.
        images: in all; at least one per class, and so many that each class can keep one.
    """
    bounded: dict[int, int] = {}
    while True:
        free = [label for label in range(len(sizes)) if label not in bounded]
        counts = dict(zip(free, _largest_remainders([sizes[c] for c in free], images - sum(bounded.values()))))
        outside = {c: min(max(n, 1), sizes[c] - 1) for c, n in counts.items() if not 1 <= n < sizes[c]}
        if not outside:
            counts |= bounded
            return [counts[label] for label in range(len(sizes))]
        bounded |= outside


def _largest_remainders(sizes: Sequence[int], images: int) -> list[int]:
    total = sum(sizes)
    counts = [size * images // total for size in sizes]
    by_fraction = sorted(range(len(sizes)), key=lambda label: -(sizes[label] * images % total))  # stable: ties by label
    for label in by_fraction[: images - sum(counts)]:
        counts[label] += 1
    return counts
