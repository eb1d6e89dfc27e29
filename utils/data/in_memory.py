"""Data sets held in memory as uint8 on the training device: shuffled, cropped, flipped and normalised in whole batches.

No worker process and no PIL: a batch costs a few gathers and two passes of arithmetic. Pixels are stored (N, H, W, C),
so that batches (N, C, H, W) are channels_last without a copy.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from harness_params import Config
from utils.data.epochs import EpochPlan, epoch_generator, epoch_order, share
from utils.data.images import Arrays, Normalizer
from utils.data.loaders import Batch, Data, augment_recipe, epoch_plan, identity_of
from utils.data.mixing import Mixing, draw_rectangles, erase, mixing_of
from utils.data.specs import ArraySpec
from utils.distributed import Context
from utils.errors import ConfigError
from utils.seeds import stable_seed

# Zero pixels around an image before a random crop of its own size (He et al. 2016, section 4.2).
CROP_PADDING = 4
# Evaluation batches: at most so many images, and no more values than 1000 CIFAR images (12 MB in float32).
EVAL_IMAGES, EVAL_VALUES = 1000, 1000 * 3 * 32 * 32
# Takes the epoch's place in the seed of alternating flips; no epoch and not PRUNING_DRAWS of utils/runs/pruning.py.
FLIP_DRAWS = -2


def load_in_memory(
    cfg: Config, ctx: Context, spec: ArraySpec, train: Arrays, validation: Arrays | None, test: Arrays
) -> Data:
    """Loaders of arrays, which are moved to the device.

    Args:
        train: without the validation images.

    Raises:
        ConfigError: another resolution is asked for than the images have, or RandAugment, which has no version for
            whole batches.
    """
    if cfg.dataset.randaugment:
        raise ConfigError(
            f"dataset.randaugment: {cfg.dataset.randaugment} is not allowed: these images are held in memory; only the "
            "torchvision loader has it"
        )
    _, height, width = spec.image_shape
    for key in ("resolution", "eval_resolution"):
        value = getattr(cfg.dataset, key)
        if value != 0 and not value == height == width:
            raise ConfigError(
                f"dataset.{key}: {value} is not allowed: images held in memory keep their own {width}x{height} pixels "
                "(0 = the data set's own)"
            )
    channels_last = cfg.experiment_params.channels_last
    normalize = Normalizer(spec.mean, spec.std, spec.image_shape, ctx.device, spec.full_scale, channels_last)
    crop, flip = augment_recipe(cfg, spec)
    d, mixing = cfg.dataset, mixing_of(cfg, spec.num_classes)
    return Data(
        MemoryTrainLoader(
            *train, normalize, crop, flip, d.alternate_flip, d.random_erasing, mixing, **epoch_plan(cfg, ctx)
        ),
        MemoryTestLoader(*test, normalize, ctx.rank, ctx.world),
        spec.num_classes,
        spec.image_shape,
        identity=identity_of(*train, *test, *(validation or ())),
        validation=MemoryTestLoader(*validation, normalize, ctx.rank, ctx.world) if validation else None,
    )


class MemoryTrainLoader(EpochPlan):
    """Training batches from uint8 images (N, H, W, C), which are kept on the device, and int64 labels (N,).

    Args:
        crop: pad by `CROP_PADDING` zero pixels (black, before normalisation) and crop at a random offset.
        flip: mirror left to right with probability 1/2.
        alternate: draw flips once per level and image, and invert all of them in each epoch (Jordan 2024).
        erasing: probability that a rectangle of an image is erased.
        mixing: how the images of a batch are mixed; None = not.
        plan: keyword arguments of `EpochPlan` except num_images.
    """

    def __init__(
        self,
        images: np.ndarray,
        labels: np.ndarray,
        normalize: Normalizer,
        crop: bool,
        flip: bool,
        alternate: bool = False,
        erasing: float = 0.0,
        mixing: Mixing | None = None,
        **plan,
    ):
        super().__init__(num_images=len(images), **plan)
        self.normalize, self.crop, self.flip, self.alternate = normalize, crop, flip, alternate
        self.erasing, self.mixing = erasing, mixing or Mixing(0, 0, 0)
        self.device = normalize.factor.device
        values = 2 + flip + 4 * (erasing > 0) + 8 * bool(mixing)
        self.draws_shape = values, len(images)
        pad = CROP_PADDING if crop else 0
        self.shape = images.shape[1:]
        height, width, channels = self.shape
        self.pad_height, self.pad_width = height + 2 * pad, width + 2 * pad
        store = np.zeros((len(images), self.pad_height, self.pad_width, channels), dtype=np.uint8)
        store[:, pad : pad + height, pad : pad + width] = images
        self.store = torch.from_numpy(store).to(self.device).view(len(images), -1)
        self.labels = torch.from_numpy(labels)
        self._ahead: tuple[tuple[int, int], Tensor] | None = None  # ((level, epoch), its draws)
        # A row of a crop is `width` neighbouring pixels of the padded store. `rows` views the store as all such rows,
        # which overlap, so that one index_select gathers every row of a batch of crops.
        starts = len(images) * self.pad_height * self.pad_width - width + 1
        self.rows = self.store.view(-1).as_strided((starts, width * channels), (channels, 1))
        self.row_steps = torch.arange(height, device=self.device) * self.pad_width

    def draws(self, level: int, epoch: int) -> Tensor:
        """Draws of one epoch, by place in its order, on the device.

        Returns:
            int64, of `draws_shape`, (values per image, num_images): first pixel of the crop in the padded store, or
            without crops the index of the image; label; with flips, 1 if the image is mirrored; with erasing, the 4
            edges of the rectangle; with mixing, the 8 numbers of the image's step.
        """
        if self._ahead and self._ahead[0] == (level, epoch):
            return self._ahead[1]
        return self._draw(level, epoch, self.seed)

    def draw_ahead(self, level: int, epoch: int) -> None:
        """Draws an epoch before it is needed, while the device is at work: `draws` gives it without a wait."""
        self._ahead = (level, epoch), self._draw(level, epoch, self.seed)

    def _draw(self, level: int, epoch: int, seed: int) -> Tensor:
        generator = epoch_generator(seed, level, epoch)
        order = epoch_order(self.num_images, seed, level, epoch, generator)
        rows = [order, self.labels[order]]
        if self.crop:
            dy, dx = torch.randint(2 * CROP_PADDING + 1, (2, self.num_images), generator=generator)
            rows[0] = (order * self.pad_height + dy) * self.pad_width + dx
        if self.flip and self.alternate:
            rows.append(self._alternating(level, epoch, seed)[order])
        elif self.flip:
            rows.append(torch.randint(2, (self.num_images,), generator=generator))
        draws = torch.cat([torch.stack(rows), *self._further_draws(level, epoch, seed)])
        if self.device.type == "cuda":
            draws = draws.pin_memory()  # so that the copy waits for nothing
        return draws.to(self.device, non_blocking=True)

    def _further_draws(self, level: int, epoch: int, seed: int) -> Iterator[Tensor]:
        height, width, _ = self.shape
        if self.erasing:
            yield draw_rectangles(self.erasing, self.num_images, seed, level, epoch, height, width)
        if self.mixing:
            steps = range(-(-self.num_images // self.batch_size))
            drawn = [self.mixing.draw(seed, level, epoch, step, height, width) for step in steps]
            yield torch.stack(drawn, 1).repeat_interleave(self.batch_size, 1)[:, : self.num_images]

    def _alternating(self, level: int, epoch: int, seed: int) -> Tensor:
        """int64 (num_images,), 0 or 1 per image: two consecutive epochs show every image both ways; independent draws
        do so for half of them (Jordan 2024, "94% on CIFAR-10 in 3.29 seconds on a single GPU")."""
        generator = torch.Generator().manual_seed(stable_seed(seed, level, FLIP_DRAWS))
        return torch.randint(2, (self.num_images,), generator=generator) ^ (epoch & 1)

    def gather(self, columns: Tensor) -> Batch:
        """The batch of N columns of `draws`, those of a whole global batch: the partner of its first image is its last.

        float32 (N, C, H, W) and int64 (N,), or with mixing float32 (N, classes).
        """
        images, labels = self._unmixed(columns)
        if not self.mixing:
            return images, labels
        return self.mixing.mix(images, labels, images.roll(1, 0), labels.roll(1), columns[-8:, 0])

    def _gather_part(self, draws: Tensor, places: slice, step: int) -> Batch:
        """This rank's part of a mixed global batch: its first image's partner is another rank's, or its last image."""
        start = step * self.batch_size
        partner = places.start - 1 if places.start > start else start + self.global_batch(step) - 1
        columns = torch.cat([draws[:, partner : partner + 1], draws[:, places]], 1)
        images, labels = self._unmixed(columns)
        return self.mixing.mix(images[1:], labels[1:], images[:-1], labels[:-1], columns[-8:, -1])

    def _unmixed(self, columns: Tensor) -> Batch:
        """float32 (N, C, H, W) and int64 (N,) of N columns of `draws`."""
        first, labels, size = columns[0], columns[1], columns.shape[1]
        if self.crop:
            pixels = self.rows.index_select(0, (first.unsqueeze(1) + self.row_steps).view(-1)).view(size, -1)
        else:
            pixels = self.store.index_select(0, first)
        if self.flip:
            # Make both versions, then pick one row of each pair: cheaper than a bytewise `where`, and without the host
            # sync of `nonzero`.
            mirrored = pixels.view(size, *self.shape).flip(2).view(size, -1)
            pick = torch.arange(size, device=self.device).add_(columns[2], alpha=size)
            pixels = torch.cat([pixels, mirrored]).index_select(0, pick)
        images = self.normalize(pixels)
        if self.erasing:
            row = 3 if self.flip else 2
            images = erase(images, columns[row : row + 4])
        return images, labels

    def batches(self, level: int, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """This rank's share of each global batch from `start_step` on, as `gather`."""
        draws = self.draws(level, epoch)
        for step, places in enumerate(self.places(start_step), start_step):
            if self.mixing and self.world > 1:
                yield self._gather_part(draws, places, step)
            else:
                yield self.gather(draws[:, places])

    def score_batches(self, level: int, num_batches: int) -> list[Batch]:
        """The first full global batches of epoch 0 of the level, unmixed, the same on every rank."""
        shared = self.score_seed == self.seed
        draws = self.draws(level, 0) if shared else self._draw(level, 0, self.score_seed)
        return [self._unmixed(draws[:, places]) for places in self.score_places(num_batches)]


class MemoryTestLoader:
    """Test or validation batches: this rank's contiguous part of the set, in the set's order, every image once.

    Attributes:
        num_images: in the whole set.
    """

    def __init__(self, images: np.ndarray, labels: np.ndarray, normalize: Normalizer, rank: int = 0, world: int = 1):
        self.num_images, self.normalize = len(images), normalize
        part = share(len(images), rank, world)
        device = normalize.factor.device
        self.store = torch.from_numpy(images[part]).to(device).flatten(1)
        self.labels = torch.from_numpy(labels[part]).to(device)
        self.batch_size = max(1, min(EVAL_IMAGES, EVAL_VALUES // normalize.factor.numel()))

    def batches(self) -> Iterator[Batch]:
        """float32 (N, C, H, W) and int64 (N,); no batch on a rank without images."""
        for start in range(0, len(self.labels), self.batch_size):
            part = slice(start, start + self.batch_size)
            yield self.normalize(self.store[part]), self.labels[part]
