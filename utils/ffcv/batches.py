"""Training and test batches of .beton files, with the interface of all loaders (utils/data/loaders.py).

Import this module only if FFCV is asked for: it imports FFCV and Numba.
"""

import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from utils.data.epochs import EpochPlan, epoch_order, share
from utils.data.images import Normalizer
from utils.data.loaders import Batch
from utils.data.side_stream import ToDevice
from utils.ffcv.beton import Beton
from utils.ffcv.pixels import Geometry
from utils.ffcv.prefetch import BATCHES_AHEAD, Prefetcher
from utils.ffcv.views import centre_views, training_views
from utils.seeds import stable_seed


@dataclass
class BetonReader:
    """Batches of one .beton file, normalised on the device.

    Attributes:
        normalizer: returns the `Normalizer` of images of one shape.
        threads: decoding threads.
        timeout: seconds to wait for a batch.
    """

    beton: Beton
    normalizer: Callable[[tuple[int, int, int]], Normalizer]
    device: torch.device
    threads: int
    timeout: float
    _normalizers: dict[int, Normalizer] = field(default_factory=dict)
    _live: weakref.WeakSet = field(default_factory=weakref.WeakSet)

    def __post_init__(self) -> None:
        self.side = ToDevice(self.device) if self.device.type == "cuda" else None

    def read(self, batches: list[np.ndarray], size: int, views: Callable[[int], Geometry]) -> Iterator[Batch]:
        """Images, float32 (N, 3, size, size), and labels (N,) of each batch of image numbers.

        Args:
            views: ``views(k)`` returns the geometry of batch k; called in the prefetching thread.

        Raises:
            DataError: an image is damaged.
            RunError: the file cannot be read, or no batch comes in time.
        """
        if not batches:
            return
        if size not in self._normalizers:
            self._normalizers[size] = self.normalizer((3, size, size))
        normalize, all_labels = self._normalizers[size], torch.from_numpy(self.beton.labels)

        def fill(k: int, pixels: Tensor, labels: Tensor, pool: Executor) -> None:
            for soon in batches[k + BATCHES_AHEAD - 1 if k else 0 : k + BATCHES_AHEAD]:
                self.beton.ask_for(soon)
            self.beton.decode(batches[k], views(k), pixels.numpy(), pool)
            labels.copy_(all_labels[batches[k]])

        counts = [len(ids) for ids in batches]
        shape, name = (size, size, 3), str(self.beton.path)
        ahead = Prefetcher(fill, counts, shape, self.side, self.threads, self.timeout, name)
        self._live.add(ahead)
        try:
            for pixels, labels in ahead:
                yield normalize(pixels.flatten(1)), labels.clone()  # both new: the next batch overwrites the others
        finally:
            ahead.close()

    def close(self) -> None:
        """End the threads of iterators that were not used up."""
        for ahead in list(self._live):
            ahead.close()


class FFCVTrainLoader(EpochPlan):
    """Training batches of a .beton file.

    Args:
        sizes: ``sizes(epoch)`` returns the resolution of an epoch.
        crop: crop of random area and ratio; otherwise the centre view.
        flip: mirror left to right with probability 1/2.
        ids: int64 (N,), numbers of the images to train on; None = all of the file.
        plan: keyword arguments of `EpochPlan` except num_images.
    """

    def __init__(
        self,
        reader: BetonReader,
        sizes: Callable[[int], int],
        crop: bool,
        flip: bool,
        ids: np.ndarray | None = None,
        **plan,
    ):
        self.ids = np.arange(reader.beton.num_images) if ids is None else ids
        super().__init__(num_images=len(self.ids), **plan)
        self.reader, self.sizes, self.crop, self.flip = reader, sizes, crop, flip

    def _read(self, level: int, epoch: int, parts: list[slice], seed: int) -> Iterator[Batch]:
        order = self.ids[epoch_order(self.num_images, seed, level, epoch).numpy()]
        batches, size, beton = [order[part] for part in parts], self.sizes(epoch), self.reader.beton

        def views(k: int) -> Geometry:
            seeds = [stable_seed(seed, level, epoch, place) for place in range(parts[k].start, parts[k].stop)]
            heights, widths = beton.heights[batches[k]], beton.widths[batches[k]]
            return training_views(heights, widths, size, self.crop, self.flip, seeds)

        return self.reader.read(batches, size, views)

    def batches(self, level: int, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """This rank's share of each global batch from `start_step` on: float32 (N, 3, H, W) and int64 (N,)."""
        return self._read(level, epoch, self.places(start_step), self.seed)

    def score_batches(self, level: int, num_batches: int) -> list[Batch]:
        """The first full global batches of epoch 0 of the level, the same on every rank."""
        return list(self._read(level, 0, self.score_places(num_batches), self.score_seed))

    def close(self) -> None:
        self.reader.close()


class FFCVTestLoader:
    """Test or validation batches: this rank's contiguous part of the images, in the file's order, every image once.

    Args:
        ids: int64 (N,), numbers of the images; None = all of the file.
    """

    def __init__(
        self, reader: BetonReader, size: int, batch_size: int, rank: int, world: int, ids: np.ndarray | None = None
    ):
        self.reader, self.size, self.batch_size = reader, size, batch_size
        ids = np.arange(reader.beton.num_images) if ids is None else ids
        self.num_images = len(ids)
        self.ids = ids[share(self.num_images, rank, world)]

    def batches(self) -> Iterator[Batch]:
        """float32 (N, 3, H, W) and int64 (N,); no batch on a rank without images."""
        ids, beton = self.ids, self.reader.beton
        parts = [ids[start : start + self.batch_size] for start in range(0, len(ids), self.batch_size)]

        def views(k: int) -> Geometry:
            return centre_views(beton.heights[parts[k]], beton.widths[parts[k]], self.size)

        return self.reader.read(parts, self.size, views)

    def close(self) -> None:
        self.reader.close()
