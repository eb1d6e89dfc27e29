"""Trees of image files, ``train/CLASS/*`` with ``val/CLASS/*`` or ``test/CLASS/*``: finding and decoding them.

Every DataError names the file or folder; the caller adds the option that chose it.
"""

import contextlib
import os
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS

from utils.errors import DataError

try:
    from torchvision.io import ImageReadMode, decode_jpeg
except ImportError:  # torchvision is to lose it; then PIL decodes JPEGs, too, to the same pixels
    decode_jpeg = None
# It says so at every call, which is of no use to users.
warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"torchvision\.io")

# Pixel formats of at most 8 bits per channel: others (16 bits, floats) would be clipped by the conversion to RGB.
EIGHT_BIT_MODES = {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "LAB", "La", "RGBa"}
SPLITS = {True: ("train",), False: ("val", "test")}


class UnequalSizes(DataError):
    """Images of several sizes, which do not fit into one array."""


@dataclass(frozen=True)
class Split:
    """Image files of one split, class by class, sorted within each; labels count through the sorted class names."""

    folder: Path
    classes: tuple[str, ...]
    # bytes (N,): forked workers share an array; they would copy a list of str, by its reference counts
    files: np.ndarray
    labels: np.ndarray  # int64 (N,)

    def path(self, index: int) -> str:
        return os.path.join(self.folder, os.fsdecode(self.files[index]))

    def part(self, indices: np.ndarray) -> "Split":
        """Some of the images, int64 (n,) by their numbers."""
        return replace(self, files=self.files[indices], labels=self.labels[indices])


def _entries(folder: str | Path) -> list[os.DirEntry]:
    """Entries of a folder, sorted by name, without hidden ones (.DS_Store and the like)."""
    try:
        with os.scandir(folder) as entries:
            return sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)
    except OSError as error:
        raise DataError(f"cannot read {folder}: {error.strerror}") from error


def _is_class(entry: os.DirEntry) -> bool:
    """True unless it is a plain file. A broken link counts as a class, which then cannot be read."""
    try:
        return not entry.is_file()
    except OSError as error:  # a link to itself
        raise DataError(f"cannot read {entry.path}: {error.strerror}") from error


def _files_below(entry: os.DirEntry, prefix: str) -> list[str]:
    """``prefix`` + relative path of each file in a folder and below. All must have an image's suffix."""
    found = []
    for below in _entries(entry.path):
        # A directory entry knows its type: only links cost a look at the file. Trees can have millions of files.
        if below.is_symlink() and not os.path.exists(below.path):
            raise DataError(f"{below.path} is a broken link")
        if below.is_dir():
            found += _files_below(below, f"{prefix}{below.name}/")
        elif os.path.splitext(below.name)[1].lower() not in IMG_EXTENSIONS:
            raise DataError(f"{below.path} is not an image file by its name: one of {', '.join(IMG_EXTENSIONS)}")
        else:
            found.append(prefix + below.name)
    return found


def find_split(root: Path, train: bool) -> Split:
    """Files of the training or the test split.

    Raises:
        DataError: naming the folder or file at fault.
    """
    folders = [root / name for name in SPLITS[train]]
    folder = next((path for path in folders if path.is_dir()), None)
    if folder is None:
        raise DataError(
            f"no folder {' or '.join(str(path.absolute()) for path in folders)}; "
            "images are expected in train/CLASS/ and val/CLASS/ (or test/CLASS/)"
        )
    folder = folder.absolute()
    # Plain files beside the class folders (an archive, a list of names) belong to no class.
    classes = [entry for entry in _entries(folder) if _is_class(entry)]
    if not classes:
        raise DataError(f"no class folder in {folder}; images are expected in {folder}/CLASS/")
    files, labels = [], []
    for label, entry in enumerate(classes):
        found = _files_below(entry, f"{entry.name}/")
        if not found:
            raise DataError(f"class folder {entry.path} holds no image")
        files += found
        labels += [label] * len(found)
    names = tuple(entry.name for entry in classes)
    return Split(folder, names, np.array([os.fsencode(f) for f in files]), np.array(labels, dtype=np.int64))


def find_tree(root: Path) -> tuple[Split, Split]:
    """Training and test split, which must have the same classes.

    Raises:
        DataError: naming the folder or file at fault.
    """
    train, test = find_split(root, True), find_split(root, False)
    for split in (train, test):
        if len(split.classes) == 1 and (train.classes == test.classes or _folders_in_only_class(split)):
            raise DataError(_one_class(split))
    if train.classes != test.classes:
        missing = sorted(set(train.classes) - set(test.classes))
        extra = sorted(set(test.classes) - set(train.classes))
        faults = [f"no class {', '.join(missing)}"] * bool(missing)
        faults += [f"class {', '.join(extra)}, which training does not know"] * bool(extra)
        raise DataError(f"{test.folder} has {' and has '.join(faults)}")
    return train, test


def _folders_in_only_class(split: Split) -> list[str]:
    """Names of the folders in the only class folder, if it holds nothing else: it may be around the classes."""
    below = _entries(split.folder / split.classes[0])
    return [entry.name for entry in below] if all(entry.is_dir() for entry in below) else []


def _one_class(split: Split) -> str:
    """Why a split with a single class is refused: every network gets it right, untrained."""
    folder, only = split.folder, split.classes[0]
    line = f"{folder} holds one class folder, {only}; two classes or more are expected in {folder}/CLASS/"
    if names := _folders_in_only_class(split):
        listed = ", ".join(names[:3]) + ", ..." * (len(names) > 3)
        line += f"; {folder / only} holds only folders ({listed}): if these are the classes, move them up into {folder}"
    return line


def open_image(path: str) -> Image.Image:
    """Decoded image, RGB of 8 bits.

    Raises:
        DataError: the file cannot be read or is no such image; names it.
    """
    try:
        with open(path, "rb") as file:
            image = Image.open(file)
            if image.mode not in EIGHT_BIT_MODES:
                raise ValueError(f"its pixel format {image.mode} does not fit into 8 bits per channel")
            return image.convert("RGB")
    except Exception as error:
        # Decoders raise many kinds on damaged bytes (OSError, SyntaxError, struct.error, ...).
        raise _unreadable(path, error) from error


def _unreadable(path: str, error: Exception) -> DataError:
    why = " ".join(str(error).split()) or type(error).__name__
    return DataError(f"{path} is not a readable image: {why}")


def image_pixels(path: str) -> np.ndarray:
    """uint8 (H, W, 3): the pixels of `open_image`, small JPEGs three times as fast. Raises as `open_image`."""
    try:
        with open(path, "rb", buffering=0) as file:
            content = bytearray(file.read())
    except OSError as error:
        raise _unreadable(path, error) from error
    if decode_jpeg is not None and content.startswith(b"\xff\xd8\xff"):
        with contextlib.suppress(RuntimeError):  # PIL says in a user's words why, or reads what it alone can
            encoded = torch.frombuffer(content, dtype=torch.uint8)
            return decode_jpeg(encoded, ImageReadMode.RGB, apply_exif_orientation=False).permute(1, 2, 0).numpy()
    return np.asarray(open_image(path))


def image_size(path: str) -> tuple[int, int]:
    """(height, width), from the file's header alone. Raises as `open_image`."""
    try:
        with Image.open(path) as image:
            return image.height, image.width
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise _unreadable(path, error) from error


def decode_split(split: Split, size: tuple[int, int], threads: int) -> np.ndarray:
    """All images as one uint8 array (N, H, W, 3).

    Raises:
        UnequalSizes: an image is not (height, width) = `size`.
        DataError: an image cannot be read.
    """
    out = np.empty((len(split.files), *size, 3), dtype=np.uint8)

    def decode(part: Sequence[int]) -> None:
        for index in part:
            image = image_pixels(split.path(index))
            height, width = image.shape[:2]
            if (height, width) != size:
                raise UnequalSizes(
                    f"{split.path(index)} is {width}x{height} pixels, others are "
                    f"{size[1]}x{size[0]}: images held in memory need one size; set dataset.loader: torchvision"
                )
            out[index] = image

    chunks = [range(start, min(start + 256, len(out))) for start in range(0, len(out), 256)]
    pool = ThreadPoolExecutor(threads)
    try:
        for _ in pool.map(decode, chunks):
            pass
    finally:
        # After a fault, the chunks that still wait need no decoding.
        pool.shutdown(cancel_futures=True)
    return out
