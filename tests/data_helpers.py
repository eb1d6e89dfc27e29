"""Small data sets on disk for the tests, in the published formats, with contents that a test can work out by hand."""

import gzip
import hashlib
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from harness_params import make_config
from utils.data.loaders import Data
from utils.dataset import load_data
from utils.distributed import Context

SHARED_DATA = Path(__file__).parent.parent.parent / "shared" / "data"
DEBIAN_FASHION = Path("/usr/share/datasets/fashion-mnist")


def load(root: Path | None = None, rank: int = 0, world: int = 1, seed: int = 0, **dataset) -> Data:
    """`load_data` in one of `world` processes. Trees of images need no message between them."""
    if root is not None:
        dataset["data_root"] = str(root)
    dataset = {"download": False, **dataset}
    cfg = make_config({"dataset": dataset, "experiment_params": {"seed": seed}})
    return load_data(cfg, Context(rank=rank, world=world))


def fashion_root(folder: Path) -> Path:
    """The real FashionMNIST, where Debian's package has it, in torchvision's layout."""
    if not DEBIAN_FASHION.is_dir():
        pytest.skip("real FashionMNIST not found: install Debian's package dataset-fashion-mnist")
    raw = folder / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for path in DEBIAN_FASHION.glob("*.gz"):
        (raw / path.name).symlink_to(path)
    return folder


def photo_tree(folder: Path, per_class: int = 6) -> Path:
    """Real photographs at full size: the first of each class of the sample, in train/ and val/."""
    archive = SHARED_DATA / "imagenet-sample.tar"
    if not archive.is_file():
        pytest.skip(f"real photographs not found: {archive}")
    counts: dict[str, int] = {}
    with tarfile.open(archive) as tar:
        for member in tar:
            parent = str(Path(member.name).parent)
            if member.isfile() and counts.setdefault(parent, 0) < per_class:
                counts[parent] += 1
                tar.extract(member, folder, filter="data")
    return folder


def digit_images() -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's digits as they are: (1797, 8, 8) of 0..16, and their labels."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    return digits.images.astype(np.uint8), digits.target


def digit_tree(folder: Path, train: int = 40, test: int = 10, size: int = 16, suffix: str = ".png") -> Path:
    """Real digits of three classes as image files: train/CLASS/ and val/CLASS/, `train` and `test` images in all."""
    images, labels = digit_images()
    wanted = [index for index in range(len(labels)) if labels[index] < 3][: train + test]
    for number, index in enumerate(wanted):
        split = "train" if number < train else "val"
        path = folder / split / f"digit{labels[index]}" / f"{number:04d}{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(images[index] * 15).resize((size, size), Image.Resampling.BILINEAR).save(path)
    return folder


def write_idx(path: Path, values: np.ndarray) -> None:
    header = bytes([0, 0, 8, values.ndim]) + np.array(values.shape, dtype=">u4").tobytes()
    content = header + values.astype(np.uint8).tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    # No time stamp, so that the same values make the same file.
    path.write_bytes(gzip.compress(content, mtime=0) if path.suffix == ".gz" else content)


def idx_files(folder: Path, train: int = 40, test: int = 12, suffix: str = "") -> Path:
    """Real digits padded to 28x28, in the four files of MNIST. Returns `folder`."""
    images, labels = digit_images()
    big = np.pad(images * 15, ((0, 0), (10, 10), (10, 10)))
    for prefix, part in (("train", slice(0, train)), ("t10k", slice(train, train + test))):
        write_idx(folder / f"{prefix}-images-idx3-ubyte{suffix}", big[part])
        write_idx(folder / f"{prefix}-labels-idx1-ubyte{suffix}", labels[part])
    return folder


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()


def cifar_files(folder: Path, source: type, monkeypatch: pytest.MonkeyPatch, per_file: int = 7) -> np.ndarray:
    """CIFAR's pickles of random pixels, with `source`'s checksums set to theirs. Returns all images, (N, 32, 32, 3)."""
    random, images = np.random.default_rng(0), []
    key = "labels" if source.base_folder == "cifar-10-batches-py" else "fine_labels"
    names = {"train_list": [], "test_list": []}
    (folder / source.base_folder).mkdir(parents=True)
    for kind, listed in names.items():
        for name, _ in getattr(source, kind):
            pixels = random.integers(0, 256, (per_file, 3, 32, 32), dtype=np.uint8)
            path = folder / source.base_folder / name
            path.write_bytes(pickle.dumps({"data": pixels.reshape(per_file, -1), key: list(range(per_file))}))
            listed.append([name, md5(path)])
            images.append(pixels.transpose(0, 2, 3, 1))
        monkeypatch.setattr(source, kind, listed)
    meta = folder / source.base_folder / source.meta["filename"]
    meta.write_bytes(pickle.dumps({source.meta["key"]: ["a", "b"]}))
    monkeypatch.setattr(source, "meta", {**source.meta, "md5": md5(meta)})
    return np.concatenate(images)


def pixels_of(images: torch.Tensor, data: Data) -> np.ndarray:
    """Undo the normalisation: uint8 (N, H, W, C)."""
    normalize, shape = data.test.normalize, (1, *data.image_shape[1:], data.image_shape[0])
    factor, term = normalize.factor.view(shape), normalize.term.view(shape)
    return ((images.permute(0, 2, 3, 1) - term) / factor).round().to(torch.uint8).numpy()


def epoch(data: Data, level: int = 0, number: int = 0, start_step: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """All of this rank's images and labels of an epoch, concatenated."""
    batches = list(data.train.batches(level, number, start_step))
    return torch.cat([images for images, _ in batches]), torch.cat([labels for _, labels in batches])
