"""What the contenders of utils/benchmark.py train on: images in memory."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from torch import Tensor

from harness_params import Config, ConfigError
from utils.data.images import Normalizer
from utils.data.in_memory import MemoryTestLoader, MemoryTrainLoader
from utils.data.loaders import Data, augment_recipe
from utils.data.specs import DATASETS
from utils.dataset import load_data
from utils.distributed import Context

Arrays = tuple[np.ndarray, np.ndarray]


def load(cfg: Config, ctx: Context, synthetic: int) -> tuple[Data, Arrays]:
    """The data, and its training arrays for the usual harness; `synthetic`: as many random images in its stead."""
    spec = DATASETS[cfg.dataset.dataset_name]
    if not synthetic:
        if cfg.dataset.loader != "memory" and (spec.is_tree or cfg.dataset.loader != "auto"):
            raise ConfigError([
                f"dataset.dataset_name: {cfg.dataset.dataset_name} is a tree of files; give --synthetic N, or, as an "
                "ImageFolder of small images of one size, with --dataset.loader=memory"
            ])  # fmt: skip
        data = load_data(cfg, ctx)
        return data, arrays_of(data.train)
    pixels = cfg.dataset.end_resolution or cfg.dataset.resolution or 224
    shape, classes = spec.image_shape or (3, pixels, pixels), spec.num_classes or cfg.dataset.num_classes or 1000
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (synthetic, *shape[1:], shape[0]), dtype=np.uint8)
    arrays = images, rng.integers(0, classes, synthetic)
    normalize = Normalizer(spec.mean, spec.std, shape, ctx.device, channels_last=cfg.experiment_params.channels_last)
    crop, flip = augment_recipe(cfg, spec)
    train = MemoryTrainLoader(
        *arrays, normalize, crop, flip, cfg.dataset.alternate_flip, batch_size=cfg.dataset.batch_size,
        drop_last=cfg.dataset.drop_last, seed=0, rank=ctx.rank, world=ctx.world,
    )  # fmt: skip
    # A copy, for a part would keep the whole in memory.
    test = MemoryTestLoader(images[:1000].copy(), arrays[1][:1000], normalize, ctx.rank, ctx.world)
    return Data(train, test, classes, shape), arrays


def arrays_of(loader: MemoryTrainLoader) -> Arrays:
    """Its uint8 (N, H, W, C) and labels, without the padding for crops."""
    height, width, channels = loader.shape
    images = loader.store.view(-1, loader.pad_height, loader.pad_width, channels)
    top, left = (loader.pad_height - height) // 2, (loader.pad_width - width) // 2
    images = images[:, top : top + height, left : left + width].contiguous()
    return images.cpu().numpy(), loader.labels.cpu().numpy()


class OneBatch:
    """A training loader whose every batch is the same, and there already."""

    def __init__(self, loader: Any, channels_last: bool = True):
        images, labels = next(iter(loader.batches(0, 0)))
        self.batch = (images if channels_last else images.contiguous()), labels
        self.size, self.steps_per_epoch = loader.global_batch(0), loader.steps_per_epoch

    def global_batch(self, step: int) -> int:
        return self.size

    def batches(self, level: int = 0, epoch: int = 0, start_step: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(start_step, self.steps_per_epoch):
            yield self.batch
