"""Trees of images too big for memory: decoded, cropped and resized by torchvision v2 in a DataLoader's workers.

Workers start once and stay for all epochs and levels. They return uint8; the device normalises. An item's key holds the
image's index and the seed of its augmentation, so an image does not depend on which worker decodes it, nor on what that
worker did before.
"""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from random import Random

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2 import RandAugment
from torchvision.transforms.v2 import functional as F

from harness_params import Config
from utils.data.epochs import EpochPlan, epoch_order, share
from utils.data.held_out import hold_out
from utils.data.image_tree import Split, open_image
from utils.data.images import RESIZE_RATIO, Normalizer, random_crop_box
from utils.data.loaders import (
    LARGE_RESOLUTION,
    Batch,
    Data,
    augment_recipe,
    epoch_plan,
    identity_of,
    naming,
)
from utils.data.mixing import Mixing, draw_rectangle, erase, mixing_of
from utils.data.side_stream import ToDevice
from utils.data.specs import SMALL_PIXELS, DataSpec
from utils.data.worker_batches import BATCHES_AHEAD, PatientLoader, check_room, in_shared_memory
from utils.distributed import Context
from utils.errors import ConfigError, DataError
from utils.processes.signals import held_back, ignore_stops
from utils.seeds import stable_seed

Edges = tuple[int, int, int, int]  # top, bottom, left and right of what is erased
Key = tuple[int, int]  # index of the image, seed of its augmentation
Item = tuple[np.ndarray, int, Edges] | DataError  # decoded image, label, erased part; or why it cannot be read


def load_by_workers(cfg: Config, ctx: Context, spec: DataSpec, train: Split, test: Split, side: int) -> Data:
    """Loaders of a tree of images of any size.

    Args:
        side: shorter side of the first training image, in pixels.

    Raises:
        ConfigError: alternate_flip is set, which needs images held in memory; the classes cannot spare so many
            validation images; or the workers' batches do not fit in /dev/shm.
    """
    if cfg.dataset.alternate_flip:
        raise ConfigError("dataset.alternate_flip: true is not allowed: only for images that are held in memory")
    size = cfg.dataset.resolution or (LARGE_RESOLUTION if side > SMALL_PIXELS else side)
    eval_size = cfg.dataset.eval_resolution or size
    crop, flip = augment_recipe(cfg, spec)

    def normalizer(pixels: int) -> Normalizer:
        shape = (3, pixels, pixels)
        return Normalizer(spec.mean, spec.std, shape, ctx.device, channels_last=cfg.experiment_params.channels_last)

    workers, batch = cfg.dataset.num_workers, max(1, cfg.dataset.batch_size // ctx.world)
    check_room(workers, (3 * max(size, eval_size) ** 2 + 8) * -(-cfg.dataset.batch_size // ctx.world), ctx.local_world)
    kept, held_out = map(train.part, hold_out(train.labels, cfg.dataset.validation_images))
    images = FolderImages(kept, size, crop, flip, cfg.dataset.randaugment, cfg.dataset.random_erasing)
    mixing = mixing_of(cfg, len(train.classes))

    def evaluation(split: Split) -> FolderTestLoader:
        return FolderTestLoader(split, eval_size, normalizer(eval_size), batch, workers, ctx.rank, ctx.world)

    validation = (held_out.files, held_out.labels) if len(held_out.files) else ()
    return Data(
        FolderTrainLoader(images, normalizer(size), workers, mixing, **epoch_plan(cfg, ctx)),
        evaluation(test),
        len(train.classes),
        (3, size, size),
        ((3, eval_size, eval_size),) if eval_size != size else (),
        identity_of(kept.files, kept.labels, test.files, test.labels, *validation),
        evaluation(held_out) if validation else None,
        loader="torchvision",
    )


def evaluation_view(image: Image.Image, size: int) -> Image.Image:
    """The middle `size` x `size` pixels, after resizing the shorter side to size * 256/224."""
    return F.center_crop(F.resize(image, [round(size * RESIZE_RATIO)], antialias=True), [size, size])


class FolderImages(Dataset):
    """Decoded uint8 images (size, size, 3) with their labels; for an image that cannot be read, the DataError.

    Args:
        size: pixels, height and width.
        crop: crop of random area and ratio; otherwise the evaluation view.
        flip: mirror left to right with probability 1/2.
        randaugment: magnitude of torchvision's RandAugment; 0 = none.
        erasing: probability that a rectangle is erased, which is done after normalisation.

    The error is returned and not raised: DataLoader would wrap it in the worker's traceback.
    """

    def __init__(self, split: Split, size: int, crop: bool, flip: bool, randaugment: int = 0, erasing: float = 0.0):
        self.split, self.size, self.crop, self.flip, self.erasing = split, size, crop, flip, erasing
        self.randaugment = RandAugment(num_ops=2, magnitude=randaugment) if randaugment else None

    def __getitem__(self, key: Key) -> Item:
        index, seed = key
        try:
            image = open_image(self.split.path(index))
        except DataError as error:
            return error
        # One generator per image, not the worker's global one; Python's, whose stream its documentation fixes.
        rng = Random(seed)
        if self.crop:
            image = F.resized_crop(
                image, *random_crop_box(image.height, image.width, rng), [self.size, self.size], antialias=True
            )
        else:
            image = evaluation_view(image, self.size)
        if self.flip and rng.random() < 0.5:
            image = F.horizontal_flip(image)
        if self.randaugment:
            with torch.random.fork_rng([]):  # it draws from the global generator
                torch.manual_seed(rng.getrandbits(63))
                image = self.randaugment(image)
        edges = draw_rectangle(self.erasing, self.size, self.size, rng) if self.erasing else (0, 0, 0, 0)
        return np.asarray(image), int(self.split.labels[index]), edges

    def __len__(self) -> int:
        return len(self.split.files)


def _collate(items: list[Item]) -> tuple[Tensor, ...] | DataError:
    """uint8 (N, H*W*C), labels (N,) and edges (4, N), or the first fault."""
    images, labels, edges = [], [], []
    for item in items:
        if isinstance(item, DataError):
            return item
        images.append(item[0])
        labels.append(item[1])
        edges.append(item[2])
    pixels = torch.from_numpy(np.stack(images)).view(len(items), -1)
    return in_shared_memory((pixels, torch.tensor(labels), torch.tensor(edges).t()))


def _leave_signals_to_parent(worker: int) -> None:
    """Ignore stops sent to the whole process group (Ctrl-C, Slurm): the run answers them and still needs its workers.

    Workers end when the loader is closed, and within seconds of their parent's death, which they watch for.
    """
    ignore_stops()


class _Pass:
    """Batch sampler: the batches of keys of the next pass."""

    def __init__(self):
        self.batches: Iterable[list[Key]] = ()

    def __iter__(self) -> Iterator[list[Key]]:
        return iter(self.batches)


class _Reader:
    """One DataLoader and its workers, shared by all passes, one after the other."""

    def __init__(self, images: FolderImages, normalize: Normalizer, num_workers: int):
        self.normalize, device = normalize, normalize.factor.device
        self.erasing = images.erasing > 0
        self.side = ToDevice(device) if device.type == "cuda" else None
        self.next_pass, self.passes = _Pass(), 0
        self.loader = PatientLoader(
            images,
            batch_sampler=self.next_pass,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            prefetch_factor=BATCHES_AHEAD if num_workers else None,
            collate_fn=_collate,
            worker_init_fn=_leave_signals_to_parent,
            pin_memory=self.side is not None,
            # DataLoader draws a seed per pass; its own generator leaves the global one untouched.
            generator=torch.Generator(),
        )

    def read(self, batches: Iterable[list[Key]]) -> Iterator[Batch]:
        """Normalised images and labels of each batch of keys.

        Raises:
            DataError: an image cannot be read; names the file. Or no batch comes: see `PatientLoader`.
            Stopped: a stop was asked for, and no batch comes.
            RuntimeError: a later pass of this reader has begun.
        """
        self.passes += 1
        this_pass, self.next_pass.batches = self.passes, batches
        # The first pass starts the workers: signals wait until the workers ignore them. A later pass waits for the rest
        # of the one before, and signals may interrupt that.
        with held_back() if self.loader._iterator is None else contextlib.nullcontext():
            loaded = iter(self.loader)
        for batch in loaded:
            if isinstance(batch, DataError):
                with naming("dataset.data_root"):
                    raise batch
            # A step is launched long before the GPU gets to it: the batch after it is copied meanwhile.
            pixels, labels, edges = self.side.send(batch) if self.side else batch
            images = self.normalize(pixels)
            yield erase(images, edges) if self.erasing else images, labels
            # Persistent workers serve one pass at a time: an older pass would now get batches of the newer one.
            if self.passes != this_pass:
                raise RuntimeError("these batches ended when other batches of the same loader were asked for")

    def close(self) -> None:
        """End the workers now, not when the garbage collector runs."""
        self.loader.close()


class FolderTrainLoader(EpochPlan):
    """Training batches from a tree of images.

    Args:
        mixing: how the images of a batch are mixed; None = not.
        plan: keyword arguments of `EpochPlan` except num_images.
    """

    def __init__(
        self, images: FolderImages, normalize: Normalizer, num_workers: int, mixing: Mixing | None = None, **plan
    ):
        super().__init__(num_images=len(images), **plan)
        self.mixing = mixing or Mixing(0, 0, 0)
        self.reader = _Reader(images, normalize, num_workers)

    def _keys(self, level: int, epoch: int, parts: Iterable[Sequence[int]], seed: int) -> Iterator[list[Key]]:
        order = epoch_order(self.num_images, seed, level, epoch).tolist()
        for places in parts:
            yield [(order[place], stable_seed(seed, level, epoch, place)) for place in places]

    def batches(self, level: int, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """This rank's share of each global batch from `start_step` on: float32 (N, 3, H, W) and int64 (N,).

        With mixing, labels are float32 (N, classes).
        """
        parts: list[Sequence[int]] = [range(part.start, part.stop) for part in self.places(start_step)]
        if not self.mixing:
            return self.reader.read(self._keys(level, epoch, parts, self.seed))
        # Before its own images a rank reads the partner of the first one, which may be another rank's.
        parts = [(self._partner(step, part), *part) for step, part in enumerate(parts, start_step)]
        return self._mixed(self.reader.read(self._keys(level, epoch, parts, self.seed)), level, epoch, start_step)

    def _partner(self, step: int, part: Sequence[int]) -> int:
        start = step * self.batch_size
        return part[0] - 1 if part[0] > start else start + self.global_batch(step) - 1

    def _mixed(self, batches: Iterator[Batch], level: int, epoch: int, start_step: int) -> Iterator[Batch]:
        for step, (images, labels) in enumerate(batches, start_step):
            drawn = self.mixing.draw(self.seed, level, epoch, step, *images.shape[2:])
            if images.is_cuda:
                drawn = drawn.pin_memory()  # so that the copy waits for nothing
            drawn = drawn.to(images.device, non_blocking=True)
            yield self.mixing.mix(images[1:], labels[1:], images[:-1], labels[:-1], drawn)

    def score_batches(self, level: int, num_batches: int) -> list[Batch]:
        """The first full global batches of epoch 0 of the level, unmixed, the same on every rank."""
        parts = [range(part.start, part.stop) for part in self.score_places(num_batches)]
        return list(self.reader.read(self._keys(level, 0, parts, self.score_seed)))

    def close(self) -> None:
        self.reader.close()


class FolderTestLoader:
    """Test or validation batches: this rank's contiguous part of the set, in the set's order, every image once."""

    def __init__(
        self, split: Split, size: int, normalize: Normalizer, batch_size: int, num_workers: int, rank: int, world: int
    ):
        self.num_images, self.batch_size = len(split.files), batch_size
        self.part = share(self.num_images, rank, world)
        self.reader = _Reader(FolderImages(split, size, crop=False, flip=False), normalize, num_workers)

    def batches(self) -> Iterator[Batch]:
        """float32 (N, 3, H, W) and int64 (N,); no batch on a rank without images."""
        starts = range(self.part.start, self.part.stop, self.batch_size)
        keys = ([(i, 0) for i in range(a, min(a + self.batch_size, self.part.stop))] for a in starts)
        return self.reader.read(keys)

    def close(self) -> None:
        self.reader.close()
