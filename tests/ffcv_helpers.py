"""A small tree of JPEGs of unlike sizes and formats, and what the FFCV tests ask of .beton files made from it."""

import contextlib
import importlib.util
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.data_helpers import load
from utils.data.loaders import Data

if importlib.util.find_spec("ffcv") is None:
    if os.environ.get("CI"):
        raise ImportError("FFCV is not installed: CI must not skip its tests")
    pytest.skip("FFCV is not installed (see README)", allow_module_level=True)

torch.set_num_threads(3)
from utils.ffcv.beton import Beton  # noqa: E402

THREADS_AFTER_IMPORT = torch.get_num_threads()  # importing FFCV itself makes it 1
torch.set_num_threads(1)

TRAIN, VAL = 30, 11
SETTINGS = "0_0.00_90"  # sizes kept, plain pixels: nothing is lost


def image(number: int) -> Image.Image:
    """A smooth gradient with some noise: tall, wide and square ones, of 40 to 120 pixels."""
    random = np.random.default_rng(number)
    height, width = random.integers(40, 121, 2)
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.sin(x / random.uniform(5, 20) + y / random.uniform(5, 20)) for _ in range(3)]
    pixels = 127 + 90 * np.stack(waves, axis=2) + random.normal(0, 8, (height, width, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def make_tree(folder: Path, train: int = TRAIN, val: int = VAL) -> Path:
    """train/ and test/ of three classes; among the JPEGs a grey one, a CMYK one and a PNG with a palette."""
    for number in range(train + val):
        split, label = ("train", number) if number < train else ("test", number - train)
        path = folder / split / f"class{label % 3}" / f"{number:03d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        mode = {1: "L", 2: "CMYK", 3: "P"}.get(number, "RGB")
        image(number).convert(mode).save(path.with_suffix(".png" if mode == "P" else ".jpg"), quality=95)
    return folder


def write(source: Path | str, out: Path, *words: str) -> int:
    from utils.write_beton import main

    return main(["--source", str(source), "--out", str(out), "--num_workers", "2", *words])


def write_raw(source: Path, out: Path) -> Path:
    assert write(source, out, "--max_resolution", "0", "--compress_probability", "0") == 0
    return out


def ffcv(root: Path, rank: int = 0, world: int = 1, seed: int = 0, **dataset) -> Data:
    options = {"dataset_name": "ImageFolder", "loader": "ffcv", "batch_size": 8, "resolution": 32, **dataset}
    return load(root, rank, world, seed, **options)


def images_of(batches) -> torch.Tensor:
    return torch.cat([images for images, _ in batches])


def labels_of(batches) -> torch.Tensor:
    return torch.cat([labels for _, labels in batches])


def assert_same(mine, theirs) -> None:
    """Equal batches, to the bit."""
    mine, theirs = list(mine), list(theirs)
    assert len(mine) == len(theirs)
    for (images, labels), (other, other_labels) in zip(mine, theirs):
        assert torch.equal(images, other) and torch.equal(labels, other_labels)


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("ffcv")]


def damage(path: Path, ids: np.ndarray) -> None:
    """Makes the images undecodable: JPEGs by their bytes, plain pixels by a size that does not fit them."""
    beton, content = Beton(path), path.read_bytes()
    with open(path, "r+b") as file:
        for index in ids:
            start, size = int(beton.starts[index]), int(beton.sizes[index])
            file.seek(start)
            file.write(bytes(size))
            if not beton.is_jpeg[index]:
                file.seek(content.rindex(np.array([index, start, size], dtype="<u8").tobytes()))
                file.write(np.array([index, start, size - 3], dtype="<u8").tobytes())


@contextlib.contextmanager
def deadline(seconds: int) -> Iterator[None]:
    """FFCV's own faults are hangs: here one fails the test."""

    def late(*_) -> None:
        raise TimeoutError(f"nothing happened in {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def nothing_left(folder: Path) -> bool:
    """No file, whole or not, and no process."""
    return not multiprocessing.active_children() and not (folder.exists() and list(folder.iterdir()))
