"""Published data sets as files on disk: where they lie, how they are downloaded, how they are read into arrays.

Every DataError names the file that is missing or damaged; the caller adds the option that chose it.
"""

import gzip
import hashlib
import importlib.util
import pickle
import socket
import tempfile
import zlib
from collections.abc import Callable
from http.client import HTTPException
from pathlib import Path
from typing import Protocol

import numpy as np
from torchvision import datasets

from utils.data.images import Arrays
from utils.data.specs import DATASETS, ArraySpec
from utils.errors import DataError, RunError

DIGITS_TEST_PER_CLASS = 36
DOWNLOAD_TIMEOUT_SECONDS = 30


class Files(Protocol):
    """Reader of one published data set."""

    def fetch(self, root: Path, download: bool) -> None:
        """Ensure that the files are below `root`; download missing ones if that is allowed."""

    def read(self, root: Path, train: bool) -> Arrays:
        """uint8 images (N, H, W, C) and int64 labels (N,) of the training or the test set."""


def _damaged(path: Path, why: str) -> DataError:
    return DataError(f"{path} is truncated or corrupt ({why}); replace or delete it")


def _check(path: Path, images: np.ndarray, labels: np.ndarray, spec: ArraySpec) -> Arrays:
    """The arrays, contiguous and in their final types.

    Raises:
        DataError: shapes or labels are not those of `spec`.
    """
    channels, height, width = spec.image_shape
    shape, num_classes = (height, width, channels), spec.num_classes
    if images.dtype != np.uint8 or images.shape[1:] != shape or not len(images):
        raise _damaged(path, f"images are {images.dtype} {images.shape}, not uint8 (N, {', '.join(map(str, shape))})")
    if labels.shape != (len(images),):
        raise _damaged(path, f"{labels.shape} labels for {len(images)} images")
    if labels.min() < 0 or labels.max() >= num_classes:
        raise _damaged(path, f"labels {labels.min()} to {labels.max()}, not 0 to {num_classes - 1}")
    return np.require(images, requirements=["C", "W"]), labels.astype(np.int64)


class DigitsFiles:
    """scikit-learn's 8x8 digits (values 0..16), part of the package."""

    def __init__(self, name: str, spec: ArraySpec):
        self.spec = spec

    def fetch(self, root: Path, download: bool) -> None:
        """Do nothing: no file is needed."""

    def read(self, root: Path, train: bool) -> Arrays:
        """1437 training or 360 test images. The test set is 36 images per class, drawn once and for all."""
        # The file that its load_digits reads. Importing the library takes a second, a third of a run's start.
        library = importlib.util.find_spec("sklearn")
        assert library and library.submodule_search_locations, "requirements.txt names scikit-learn"
        file = Path(library.submodule_search_locations[0]) / "datasets" / "data" / "digits.csv.gz"
        table = np.loadtxt(file, delimiter=",", dtype=np.int64)
        pixels, labels = table[:, :-1].reshape(-1, 8, 8, 1), table[:, -1]
        # RandomState's stream is frozen by numpy's compatibility policy, so the split is the same everywhere.
        random = np.random.RandomState(0)
        is_test = np.zeros(len(labels), dtype=bool)
        for label in range(10):
            is_test[random.permutation(np.flatnonzero(labels == label))[:DIGITS_TEST_PER_CLASS]] = True
        take = ~is_test if train else is_test
        return _check(file, pixels[take].astype(np.uint8), labels[take], self.spec)


class TorchvisionFiles:
    """Base of readers of files in the layout of a torchvision data set class, which also downloads them.

    The class is the one of the data set's name. Its file names, checksums and download are used; its reading is not,
    because it does not say which file is bad.
    """

    source: type[datasets.VisionDataset]

    def __init__(self, name: str, spec: ArraySpec):
        self.source = getattr(datasets, name)
        self.spec = spec

    @property
    def folder(self) -> str:
        """Folder of the files, below the data root."""
        raise NotImplementedError

    def names(self) -> dict[str, str | None]:
        """File name -> MD5; None if no MD5 is published."""
        raise NotImplementedError

    def missing(self, root: Path) -> list[Path]:
        paths = [root / self.folder / name for name in self.names()]
        return [path for path in paths if not path.is_file()]

    def fetch(self, root: Path, download: bool) -> None:
        """Ensure that all files are there. A failed download leaves nothing behind.

        Raises:
            DataError: a file is missing and download is off; says which files to put where.
            RunError: the download failed; says the same.
        """
        missing = self.missing(root)
        if not missing:
            return
        name, folder = self.source.__name__, (root / self.folder).absolute()
        advice = f"put {', '.join(self.names())} into {folder}"
        if not download:
            raise DataError(f"{name} has no {missing[0].name} in {folder}; {advice}, or set dataset.download: true")
        made = not root.exists()
        usual_timeout = socket.getdefaulttimeout()
        socket.setdefaulttimeout(DOWNLOAD_TIMEOUT_SECONDS)
        try:
            root.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".download-", dir=root) as part:
                self.download(Path(part))
                (root / self.folder).mkdir(parents=True, exist_ok=True)
                for path in missing:
                    (Path(part) / self.folder / path.name).replace(path)
        except (OSError, RuntimeError, EOFError, HTTPException) as error:
            if made and root.exists() and not any(root.iterdir()):
                root.rmdir()
            why = " ".join(str(error).split()) or type(error).__name__
            raise RunError(f"the download of {name} failed ({why}); {advice} (dataset.data_root)") from error
        finally:
            socket.setdefaulttimeout(usual_timeout)

    def download(self, root: Path) -> None:
        make: Callable[..., object] = self.source
        for train in (True, False):
            make(str(root), train=train, download=True)

    def checked(self, root: Path, name: str) -> Path:
        """Path of a file, after comparing its MD5.

        Raises:
            DataError: it cannot be read, or its MD5 is another.
        """
        path, expected = root / self.folder / name, self.names()[name]
        try:
            found = hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror}") from error
        if found != expected:
            raise _damaged(path, f"its MD5 is {found}, not {expected}")
        return path


class IdxFiles(TorchvisionFiles):
    """MNIST's format (LeCun's idx), unpacked or in .gz."""

    source: type[datasets.MNIST]

    @property
    def folder(self) -> str:
        return f"{self.source.__name__}/raw"

    def names(self) -> dict[str, str | None]:
        # MD5s are published for the .gz only, which is not kept; headers and sizes are checked instead.
        return {name.removesuffix(".gz"): None for name, _ in self.source.resources}

    def missing(self, root: Path) -> list[Path]:
        return [path for path in super().missing(root) if not path.with_name(path.name + ".gz").is_file()]

    def read(self, root: Path, train: bool) -> Arrays:
        prefix = "train" if train else "t10k"
        path = root / self.folder / f"{prefix}-images-idx3-ubyte"
        labels = read_idx(root / self.folder / f"{prefix}-labels-idx1-ubyte")
        return _check(path, read_idx(path)[..., None], labels, self.spec)


def read_idx(path: Path) -> np.ndarray:
    """uint8 array of an idx file, or of the same name with .gz: 2 zero bytes, type, rank, sizes, values.

    Raises:
        DataError: the file is damaged.
    """
    try:
        if path.is_file():
            raw = path.read_bytes()
        else:
            path = path.with_name(path.name + ".gz")
            with gzip.open(path) as file:
                raw = file.read()
    except (OSError, EOFError, zlib.error) as error:
        raise _damaged(path, str(error)) from error
    if len(raw) < 4 or raw[:3] != b"\0\0\x08" or len(raw) < 4 + 4 * raw[3]:
        raise _damaged(path, "not an idx file of bytes")
    start = 4 + 4 * raw[3]
    shape = tuple(int(size) for size in np.frombuffer(raw[4:start], dtype=">u4"))
    values = np.frombuffer(raw, dtype=np.uint8, offset=start)
    if len(values) != np.prod(shape, dtype=np.int64):
        raise _damaged(path, f"{len(values)} values where the header says {shape}")
    return values.reshape(shape)


class CifarFiles(TorchvisionFiles):
    """The "python version" of CIFAR: pickles of (N, 3072) arrays."""

    source: type[datasets.CIFAR10]

    @property
    def folder(self) -> str:
        return self.source.base_folder

    def names(self) -> dict[str, str | None]:
        return dict(map(tuple, self.source.train_list + self.source.test_list)) | {
            self.source.meta["filename"]: self.source.meta["md5"]
        }

    def read(self, root: Path, train: bool) -> Arrays:
        images, labels = [], []
        for name, _ in self.source.train_list if train else self.source.test_list:
            # Unpickled only after its MD5 was compared: a pickle can run any code.
            path = self.checked(root, name)
            entry = pickle.loads(path.read_bytes(), encoding="latin1")
            images.append(entry["data"])
            labels += entry["labels"] if "labels" in entry else entry["fine_labels"]
        pixels = np.concatenate(images).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        return _check(path, pixels, np.array(labels), self.spec)


class SvhnFiles(TorchvisionFiles):
    """SVHN's cropped digits: MATLAB files of (32, 32, 3, N) arrays; label 10 is the digit 0."""

    source: type[datasets.SVHN]
    folder = "."

    def names(self) -> dict[str, str | None]:
        return {self.source.split_list[split][1]: self.source.split_list[split][2] for split in ("train", "test")}

    def download(self, root: Path) -> None:
        for split in ("train", "test"):
            self.source(str(root), split=split, download=True)

    def read(self, root: Path, train: bool) -> Arrays:
        from scipy.io import loadmat

        path = self.checked(root, self.source.split_list["train" if train else "test"][1])
        content = loadmat(path)
        images, labels = content["X"].transpose(3, 0, 1, 2), content["y"].reshape(-1).astype(np.int64)
        return _check(path, images, labels % 10, self.spec)


class OwnFiles:
    """Images that a plugin's function reads: `DataSpec.reader`."""

    def __init__(self, name: str, spec: ArraySpec):
        self.name, self.spec = name, spec

    def fetch(self, root: Path, download: bool) -> None:
        """Do nothing: the function itself looks for its files."""

    def read(self, root: Path, train: bool) -> Arrays:
        """What the function gives, checked."""
        assert callable(self.spec.reader)
        images, labels = map(np.asarray, self.spec.reader(root, train))
        return _check(root / f"{self.name} ({'training' if train else 'test'} images)", images, labels, self.spec)


# DataSpec.reader -> reader, made from a data set's name and spec
READERS: dict[str, Callable[[str, ArraySpec], Files]] = {
    "digits": DigitsFiles,
    "idx": IdxFiles,
    "cifar": CifarFiles,
    "svhn": SvhnFiles,
}


def files_of(name: str) -> Files:
    """Reader of a data set held in memory.

    Raises:
        ValueError: it is a tree of images, which utils/data/image_tree.py reads.
    """
    spec = DATASETS[name]
    if not isinstance(spec, ArraySpec):
        raise ValueError(f"{name} is a tree of images")
    return OwnFiles(name, spec) if callable(spec.reader) else READERS[spec.reader](name, spec)
