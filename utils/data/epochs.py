"""Order of an epoch and the part of each rank: pure functions, shared by all loaders.

Everything random about an epoch is a function of (seed, level, epoch) and of an image's *place* in the epoch's order;
never of the number of processes, the number of workers, or earlier draws. So a global batch holds the same images,
augmented the same way, however it is split, and a run resumed within an epoch sees the batches that it would have seen.
"""

import torch
from torch import Tensor

from utils.errors import ConfigError
from utils.seeds import stable_seed


def epoch_generator(seed: int, level: int, epoch: int) -> torch.Generator:
    """Fresh CPU generator of one epoch of one level. `epoch_order` draws first, augmentation afterwards."""
    return torch.Generator().manual_seed(stable_seed(seed, level, epoch))


def epoch_order(num_images: int, seed: int, level: int, epoch: int, generator: torch.Generator | None = None) -> Tensor:
    """int64 (num_images,): index of the image at each place of the epoch.

    Args:
        generator: fresh `epoch_generator` of the same epoch, for callers that draw from it afterwards.
    """
    generator = epoch_generator(seed, level, epoch) if generator is None else generator
    return torch.randperm(num_images, generator=generator)


def share(num_items: int, rank: int, world: int) -> slice:
    """Contiguous part of `num_items` items for `rank`; the parts of all ranks make up the whole."""
    return slice(num_items * rank // world, num_items * (rank + 1) // world)


def steps_per_epoch(num_images: int, batch_size: int, drop_last: bool) -> int:
    """Global batches per epoch. A set smaller than one batch makes one batch of all its images."""
    if num_images < batch_size or not drop_last:
        return -(-num_images // batch_size)
    return num_images // batch_size


def global_batch(step: int, num_images: int, batch_size: int) -> int:
    """Images in the global batch of `step`: batch_size, or fewer in the last one of an epoch."""
    return min(batch_size, num_images - step * batch_size)


def rank_places(step: int, num_images: int, batch_size: int, rank: int = 0, world: int = 1) -> slice:
    """Places in the epoch's order that `rank` takes in `step`."""
    part = share(global_batch(step, num_images, batch_size), rank, world)
    return slice(step * batch_size + part.start, step * batch_size + part.stop)


def check_shares(num_images: int, batch_size: int, drop_last: bool, world: int, least: int = 1, why: str = "") -> None:
    """Check that every rank gets at least `least` images in every step.

    Args:
        why: of a larger `least`, for the fault.

    Raises:
        ConfigError: naming dataset.batch_size, with what would be allowed.
    """
    need = least * world
    of_ranks = f"{least} image{'s' * (least > 1)}" + (f" for each of {world} processes" if world > 1 else "") + why
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
    """Steps of the first `num_batches` full global batches (a set smaller than one batch has one: all its images).

    Raises:
        ConfigError: naming prune_params.score_batches; an epoch holds fewer.
    """
    full = max(1, num_images // batch_size)
    if not 1 <= num_batches <= full:
        raise ConfigError(
            f"prune_params.score_batches: {num_batches} is not allowed: 1 to {full}, the full batches of "
            f"{batch_size} in {num_images} training images"
        )
    return range(num_batches)


class EpochPlan:
    """Base of all training loaders: images and steps per epoch, and this rank's part of each step.

    Attributes:
        num_images: in the whole training set.
        batch_size: of the global batch, over all ranks; at most num_images.
        steps_per_epoch: optimizer steps.
        seed: of order and augmentation.
        score_seed: the same for the batches that pruning looks at; by default `seed`.

    Raises:
        ConfigError: see `check_shares`.
    """

    def __init__(
        self,
        num_images: int,
        batch_size: int,
        drop_last: bool,
        seed: int,
        rank: int,
        world: int,
        score_seed: int | None = None,
    ):
        check_shares(num_images, batch_size, drop_last, world)
        self.num_images, self.batch_size = num_images, min(batch_size, num_images)
        self.steps_per_epoch = steps_per_epoch(num_images, batch_size, drop_last)
        self.seed, self.rank, self.world = seed, rank, world
        self.score_seed = seed if score_seed is None else score_seed

    def global_batch(self, step: int) -> int:
        """Images in the global batch of `step`, over all ranks."""
        return global_batch(step, self.num_images, self.batch_size)

    def places(self, start_step: int = 0) -> list[slice]:
        """This rank's places in the epoch's order, one slice per step, from `start_step` on.

        Raises:
            ValueError: an epoch has no such step.
        """
        if not 0 <= start_step <= self.steps_per_epoch:
            raise ValueError(f"start_step {start_step} is not one of an epoch's steps, 0 to {self.steps_per_epoch}")
        return [
            rank_places(step, self.num_images, self.batch_size, self.rank, self.world)
            for step in range(start_step, self.steps_per_epoch)
        ]

    def draw_ahead(self, level: int, epoch: int) -> None:
        """Called while the device is at work, before the epoch is needed: time to draw it. It changes no draw.

        Loaders whose workers draw do nothing.
        """

    def score_places(self, num_batches: int) -> list[slice]:
        """Places of the first full global batches, whole: the same on every rank. Raises as `score_steps`."""
        steps = score_steps(num_batches, self.num_images, self.batch_size)
        return [rank_places(step, self.num_images, self.batch_size) for step in steps]
