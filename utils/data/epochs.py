"""The order of an epoch and who takes which part of it: pure functions, shared by all loaders.

Everything random about an epoch is a function of (seed, level, epoch), and of an image's *place* in the epoch's order;
never of the number of processes, the number of workers, or what was drawn before. So one global batch is the same set
of images, augmented the same way, however it is split, and a run resumed in the middle of an epoch sees what it would
have seen.
"""

import torch
from torch import Tensor

from utils.errors import ConfigError
from utils.seeds import stable_seed


def epoch_generator(seed: int, level: int, epoch: int) -> torch.Generator:
    """A fresh CPU generator for one epoch of one level. `epoch_order` takes its first draw; augmentation goes on."""
    return torch.Generator().manual_seed(stable_seed(seed, level, epoch))


def epoch_order(num_images: int, seed: int, level: int, epoch: int, generator: torch.Generator | None = None) -> Tensor:
    """int64 (num_images,): the index of the image at each place of the epoch.

    Args:
        generator: a fresh `epoch_generator` of the same epoch, for callers that go on drawing from it.
    """
    generator = epoch_generator(seed, level, epoch) if generator is None else generator
    return torch.randperm(num_images, generator=generator)


def share(num_items: int, rank: int, world: int) -> slice:
    """The contiguous part of `num_items` items that falls to `rank`; the parts of all ranks make up the whole."""
    return slice(num_items * rank // world, num_items * (rank + 1) // world)


def steps_per_epoch(num_images: int, batch_size: int, drop_last: bool) -> int:
    """Global batches in an epoch. A set smaller than one batch makes one batch of all its images."""
    if num_images < batch_size or not drop_last:
        return -(-num_images // batch_size)
    return num_images // batch_size


def global_batch(step: int, num_images: int, batch_size: int) -> int:
    """Images in the global batch of `step`: batch_size, or less in the last one of an epoch."""
    return min(batch_size, num_images - step * batch_size)


def rank_places(step: int, num_images: int, batch_size: int, rank: int = 0, world: int = 1) -> slice:
    """The places in the epoch's order that `rank` takes in `step`."""
    part = share(global_batch(step, num_images, batch_size), rank, world)
    return slice(step * batch_size + part.start, step * batch_size + part.stop)


def check_shares(num_images: int, batch_size: int, drop_last: bool, world: int) -> None:
    """Checks that every rank gets at least 2 images in every step (batch norm cannot train on one).

    Raises:
        ConfigError: naming dataset.batch_size or dataset.drop_last, with values that would do.
    """
    need = 2 * world
    of_ranks = f"2 images for each of {world} processes" if world > 1 else "2 images"
    if batch_size < need:
        raise ConfigError(
            f"dataset.batch_size: {batch_size} is not allowed: the global batch needs at least {of_ranks}"
        )
    if num_images < need:
        raise ConfigError(
            f"dataset.batch_size: the training set's {num_images} images make less than one batch of {of_ranks}"
        )
    tail = num_images % batch_size
    if num_images > batch_size and 0 < tail < need and not drop_last:
        raise ConfigError(
            f"dataset.batch_size: {batch_size} leaves a last batch of {tail} of the {num_images} training images, "
            f"less than {of_ranks}: choose another, or set dataset.drop_last: true"
        )


def score_steps(num_batches: int, num_images: int, batch_size: int) -> range:
    """The steps of the first `num_batches` full global batches (a set smaller than one batch has one: all of it).

    Raises:
        ConfigError: naming prune_params.score_batches, if an epoch does not hold as many.
    """
    full = max(1, num_images // batch_size)
    if not 1 <= num_batches <= full:
        raise ConfigError(
            f"prune_params.score_batches: {num_batches} is not allowed: 1 to {full}, the full batches of "
            f"{batch_size} in {num_images} training images"
        )
    return range(num_batches)


class EpochPlan:
    """What every training loader says about its epochs: how many images and steps, and this rank's part of each step.

    Attributes:
        num_images: in the whole training set.
        batch_size: of the global batch, over all ranks; at most num_images.
        steps_per_epoch: optimizer steps.

    Raises:
        ConfigError: see `check_shares`.
    """

    def __init__(self, num_images: int, batch_size: int, drop_last: bool, seed: int, rank: int, world: int):
        check_shares(num_images, batch_size, drop_last, world)
        self.num_images, self.batch_size = num_images, min(batch_size, num_images)
        self.steps_per_epoch = steps_per_epoch(num_images, batch_size, drop_last)
        self.seed, self.rank, self.world = seed, rank, world

    def global_batch(self, step: int) -> int:
        """Images in the global batch of `step`, over all ranks."""
        return global_batch(step, self.num_images, self.batch_size)

    def places(self, start_step: int = 0) -> list[slice]:
        """This rank's places in the epoch's order, a slice a step, from `start_step` on."""
        if not 0 <= start_step <= self.steps_per_epoch:
            raise ValueError(f"start_step {start_step} is not one of an epoch's steps, 0 to {self.steps_per_epoch}")
        return [
            rank_places(step, self.num_images, self.batch_size, self.rank, self.world)
            for step in range(start_step, self.steps_per_epoch)
        ]

    def score_places(self, num_batches: int) -> list[slice]:
        """The places of the first full global batches, whole: the same on every rank. Raises as `score_steps`."""
        steps = score_steps(num_batches, self.num_images, self.batch_size)
        return [rank_places(step, self.num_images, self.batch_size) for step in steps]
