"""Trees of images too big for memory: decoded, cropped and resized by torchvision v2 in a DataLoader's workers.

Workers start once and live through all epochs and levels. They hand over uint8; normalisation is the device's work.
The key of an item says all it needs, its index and the seed of its own augmentation, so that nothing depends on which
worker takes it, nor on what that worker did before.
"""

import contextlib
from collections.abc import Iterable, Iterator
from random import Random

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import functional as F

from utils.data.epochs import EpochPlan, epoch_order, share
from utils.data.image_tree import Split, open_image
from utils.data.images import RESIZE_RATIO, Normalizer, random_crop_box
from utils.errors import DataError
from utils.processes.signals import held_back, ignore_stops
from utils.seeds import stable_seed

Key = tuple[int, int]  # index of the image, seed of its augmentation
Batch = tuple[Tensor, Tensor]


def evaluation_view(image: Image.Image, size: int) -> Image.Image:
    """The middle `size` x `size` pixels, after resizing the shorter side to size * 256/224."""
    return F.center_crop(F.resize(image, [round(size * RESIZE_RATIO)], antialias=True), [size, size])


class FolderImages(Dataset):
    """Decoded uint8 images (size, size, 3) with their labels; in place of an image that cannot be read, the fault.

    A fault is handed over as a str rather than raised: DataLoader would wrap it in the worker's traceback.
    """

    def __init__(self, split: Split, size: int, crop: bool, flip: bool):
        self.split, self.size, self.crop, self.flip = split, size, crop, flip

    def __getitem__(self, key: Key) -> tuple[np.ndarray, int] | str:
        index, seed = key
        try:
            image = open_image(self.split.path(index))
        except ValueError as error:
            return str(error)
        # One generator an image: Python's, whose stream is fixed by its documentation, not the worker's global one.
        rng = Random(seed)
        if self.crop:
            image = F.resized_crop(
                image, *random_crop_box(image.height, image.width, rng), [self.size, self.size], antialias=True
            )
        else:
            image = evaluation_view(image, self.size)
        if self.flip and rng.random() < 0.5:
            image = F.horizontal_flip(image)
        return np.asarray(image), int(self.split.labels[index])

    def __len__(self) -> int:
        return len(self.split.files)


def _collate(items: list[tuple[np.ndarray, int] | str]) -> Batch | str:
    faults = [item for item in items if isinstance(item, str)]
    if faults:
        return faults[0]
    pixels = torch.from_numpy(np.stack([image for image, _ in items]))
    return pixels.view(len(items), -1), torch.tensor([label for _, label in items])


def _leave_signals_to_parent(worker: int) -> None:
    """A stop sent to the whole process group (Ctrl-C, Slurm) is the run's to answer: it still needs its workers.

    They end when the loader is closed, and within seconds of their parent's death, which they watch for.
    """
    ignore_stops()


class _Pass:
    """The batch sampler: batches of keys of the pass that is about to begin."""

    def __init__(self):
        self.batches: Iterable[list[Key]] = ()

    def __iter__(self) -> Iterator[list[Key]]:
        return iter(self.batches)


class _Reader:
    """One DataLoader and its workers, which one pass after another goes through."""

    def __init__(self, images: FolderImages, normalize: Normalizer, num_workers: int):
        self.normalize, self.device = normalize, normalize.factor.device
        self.todo, self.passes = _Pass(), 0
        self.loader = DataLoader(
            images,
            batch_sampler=self.todo,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            collate_fn=_collate,
            worker_init_fn=_leave_signals_to_parent,
            pin_memory=self.device.type == "cuda",
            # DataLoader draws a seed for each pass; with a generator of its own the global one stays untouched.
            generator=torch.Generator(),
        )

    def read(self, batches: Iterable[list[Key]]) -> Iterator[Batch]:
        """Normalised images and labels of each batch of keys.

        Raises:
            DataError: an image cannot be read; names the file.
        """
        self.passes += 1
        this_pass, self.todo.batches = self.passes, batches
        # The first pass starts the workers. Later ones wait for what is left of the one before, and answer signals.
        with held_back() if self.loader._iterator is None else contextlib.nullcontext():
            loaded = iter(self.loader)
        for batch in loaded:
            if isinstance(batch, str):
                raise DataError(batch)
            pixels, labels = (tensor.to(self.device, non_blocking=True) for tensor in batch)
            yield self.normalize(pixels), labels
            # Persistent workers serve one pass: going on with an older one would take batches of the newer.
            if self.passes != this_pass:
                raise RuntimeError("these batches ended when other batches of the same loader were asked for")

    def close(self) -> None:
        """Ends the workers now rather than when the garbage collector comes by."""
        workers, self.loader._iterator = self.loader._iterator, None
        if workers is not None:
            workers._shutdown_workers()


class FolderTrainLoader(EpochPlan):
    """Training batches from a tree of images.

    Args:
        size: pixels, height and width.
        crop: random area and ratio (otherwise the evaluation view); flip: mirror left to right with probability 1/2.
        plan: keyword arguments of `EpochPlan` except num_images.
    """

    def __init__(
        self, split: Split, size: int, normalize: Normalizer, crop: bool, flip: bool, num_workers: int, **plan
    ):
        super().__init__(num_images=len(split.files), **plan)
        self.reader = _Reader(FolderImages(split, size, crop, flip), normalize, num_workers)

    def _keys(self, level: int, epoch: int, parts: list[slice]) -> Iterator[list[Key]]:
        order = epoch_order(self.num_images, self.seed, level, epoch).tolist()
        for part in parts:
            places = range(part.start, part.stop)
            yield [(order[place], stable_seed(self.seed, level, epoch, place)) for place in places]

    def batches(self, level: int, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """This rank's share of each global batch from `start_step` on: float32 (N, 3, H, W) and int64 (N,)."""
        return self.reader.read(self._keys(level, epoch, self.places(start_step)))

    def score_batches(self, level: int, num_batches: int) -> list[Batch]:
        """The first full global batches of epoch 0 of the level, the same on every rank."""
        return list(self.reader.read(self._keys(level, 0, self.score_places(num_batches))))

    def close(self) -> None:
        self.reader.close()


class FolderTestLoader:
    """Test batches: this rank's contiguous part of the test set, in the set's own order, every image once."""

    def __init__(
        self, split: Split, size: int, normalize: Normalizer, batch_size: int, num_workers: int, rank: int, world: int
    ):
        self.num_images, self.batch_size = len(split.files), batch_size
        self.part = share(self.num_images, rank, world)
        self.reader = _Reader(FolderImages(split, size, crop=False, flip=False), normalize, num_workers)

    def batches(self) -> Iterator[Batch]:
        """float32 (N, 3, H, W) and int64 (N,); no batch at all on a rank that has no image."""
        starts = range(self.part.start, self.part.stop, self.batch_size)
        keys = ([(i, 0) for i in range(a, min(a + self.batch_size, self.part.stop))] for a in starts)
        return self.reader.read(keys)

    def close(self) -> None:
        self.reader.close()
