"""Images in memory that the contenders of the benchmark train on."""

from collections.abc import Iterator

import numpy as np
from torch import Tensor

from harness_params import Config
from utils.data.images import Arrays, Normalizer
from utils.data.in_memory import MemoryTestLoader, MemoryTrainLoader
from utils.data.loaders import Data, TrainLoader, augment_recipe
from utils.data.specs import DATASETS
from utils.dataset import load_data
from utils.distributed import Context
from utils.errors import ConfigError


def load(cfg: Config, ctx: Context, synthetic: int) -> tuple[Data, Arrays]:
    """The data set, and its training images as arrays for the usual harness.

    Args:
        synthetic: number of random images of the same shape to make instead; 0 loads the data set.

    Raises:
        ConfigError: the data set is not in memory.
    """
    spec = DATASETS[cfg.dataset.dataset_name]
    if not synthetic:
        if cfg.dataset.loader != "memory" and (spec.is_tree or cfg.dataset.loader != "auto"):
            raise ConfigError(
                f"dataset.dataset_name: {cfg.dataset.dataset_name} is a tree of files; give --synthetic N, or, as an "
                "ImageFolder of small images of one size, with --dataset.loader=memory"
            )
        data = load_data(cfg, ctx)
        assert isinstance(data.train, MemoryTrainLoader)
        return data, arrays_of(data.train)
    pixels = cfg.dataset.end_resolution or cfg.dataset.resolution or 224
    shape, classes = spec.image_shape or (3, pixels, pixels), spec.num_classes or cfg.dataset.num_classes or 1000
    return random_images(cfg, ctx, synthetic, shape, classes)


def random_images(
    cfg: Config, ctx: Context, count: int, shape: tuple[int, int, int], classes: int
) -> tuple[Data, Arrays]:
    """`count` random images of `shape` (C, H, W), augmented as the data set's, up to 1,000 of them as test images."""
    spec, rng = DATASETS[cfg.dataset.dataset_name], np.random.default_rng(0)
    images = rng.integers(0, 256, (count, *shape[1:], shape[0]), dtype=np.uint8)
    arrays = images, rng.integers(0, classes, count)
    normalize = Normalizer(spec.mean, spec.std, shape, ctx.device, channels_last=cfg.experiment_params.channels_last)
    crop, flip = augment_recipe(cfg, spec)
    train = MemoryTrainLoader(
        *arrays, normalize, crop, flip, cfg.dataset.alternate_flip, batch_size=cfg.dataset.batch_size,
        drop_last=cfg.dataset.drop_last, seed=0, rank=ctx.rank, world=ctx.world,
    )  # fmt: skip
    # A copy: a view would keep all images in memory.
    test = MemoryTestLoader(images[:1000].copy(), arrays[1][:1000], normalize, ctx.rank, ctx.world)
    return Data(train, test, classes, shape), arrays


def arrays_of(loader: MemoryTrainLoader) -> Arrays:
    """The loader's images, uint8 (N, H, W, C), without the padding for crops, and its labels (N,)."""
    height, width, channels = loader.shape
    images = loader.store.view(-1, loader.pad_height, loader.pad_width, channels)
    top, left = (loader.pad_height - height) // 2, (loader.pad_width - width) // 2
    images = images[:, top : top + height, left : left + width].contiguous()
    return images.cpu().numpy(), loader.labels.cpu().numpy()


class OneBatch:
    """A training loader that repeats one batch, already on the device."""

    def __init__(self, loader: TrainLoader, channels_last: bool = True):
        images, labels = next(iter(loader.batches(0, 0)))
        self.batch = (images if channels_last else images.contiguous()), labels
        self.size, self.steps_per_epoch = loader.global_batch(0), loader.steps_per_epoch
        self.batch_size, self.num_images = loader.batch_size, self.size * loader.steps_per_epoch
        self.draws_shape = (1, self.num_images)

    def draw_ahead(self, level: int, epoch: int) -> None:
        pass

    def draws(self, level: int, epoch: int) -> Tensor:
        return self.batch[1].new_zeros(self.draws_shape)

    def gather(self, columns: Tensor) -> tuple[Tensor, Tensor]:
        return self.batch

    def global_batch(self, step: int) -> int:
        return self.size

    def batches(self, level: int = 0, epoch: int = 0, start_step: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(start_step, self.steps_per_epoch):
            yield self.batch

    def score_batches(self, level: int, num_batches: int) -> list[tuple[Tensor, Tensor]]:
        return [self.batch] * num_batches
