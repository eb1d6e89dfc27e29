"""Data that is missing, damaged or does not fit: each ends in one line that names the file or the option."""

import functools
import gzip
import http.server
import threading
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing
from PIL import Image
from torchvision import datasets

from tests import data_helpers as help_
from utils.data.published import files_of
from utils.dataset import load_data
from utils.distributed import Context
from utils.errors import ConfigError, DataError, RunError

NOWHERE = ["http://127.0.0.1:9/"]  # the discard port, on which no program listens


def _use(**load) -> None:
    data = help_.load(**load)
    try:
        help_.epoch(data)
        list(data.test.batches())
    finally:
        data.close()


def fails(kind: type[Exception], *words: str, **load) -> str:
    """Load and read everything once: must fail with one line that holds all the words; return it."""
    with pytest.raises(kind) as caught:
        _use(**load)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message
    return message


# ----------------------------------------------------------------------------------------------------- image trees


def _empty_folder(root: Path) -> None:
    for path in sorted(root.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()


def _no_classes(root: Path) -> None:
    for path in sorted((root / "train").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    Image.new("RGB", (16, 16)).save(root / "train" / "flat.png")


def _empty_class(root: Path) -> None:
    (root / "train" / "digit9").mkdir()


def _class_only_in_training(root: Path) -> None:
    (root / "train" / "apple").mkdir()
    Image.new("RGB", (16, 16)).save(root / "train" / "apple" / "a.png")


def _class_only_in_test(root: Path) -> None:
    (root / "val" / "apple").mkdir()
    Image.new("RGB", (16, 16)).save(root / "val" / "apple" / "a.png")


def _no_test_split(root: Path) -> None:
    (root / "val").rename(root / "validation")


def _text_by_name(root: Path) -> None:
    (root / "train" / "digit0" / "notes.txt").write_text("not an image")


def _text_named_png(root: Path) -> None:
    (root / "train" / "digit0" / "zzz.png").write_text("not an image")


def _text_first(root: Path) -> None:
    (root / "train" / "digit0" / "0.jpg").write_text("not an image")


def _empty_file(root: Path) -> None:
    (root / "val" / "digit0" / "zzz.png").write_bytes(b"")


def _truncated_png(root: Path) -> None:
    path = sorted((root / "train" / "digit1").iterdir())[3]
    path.write_bytes(path.read_bytes()[:-40])


def _truncated_jpeg(root: Path) -> None:
    path = root / "train" / "digit1" / "zzz.jpg"
    Image.open(sorted((root / "train" / "digit1").iterdir())[0]).convert("RGB").save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _sixteen_bits(root: Path) -> None:
    Image.fromarray(np.full((16, 16), 40000, dtype=np.uint16)).save(root / "train" / "digit0" / "deep.png")


def _broken_link(root: Path) -> None:
    (root / "train" / "digit0" / "zzz.png").symlink_to(root / "gone.png")


def _folder_that_cannot_be_read(root: Path) -> None:
    (root / "train" / "loop").symlink_to(root / "train" / "loop")


TREES = [
    (_empty_folder, ["no folder", "/train", "train/CLASS/"]),
    (_no_classes, ["no class folder in", "/train/CLASS/"]),
    (_empty_class, ["/train/digit9", "holds no image"]),
    (_class_only_in_training, ["/val has no class apple"]),
    (_class_only_in_test, ["/val has class apple", "training does not know"]),
    (_no_test_split, ["no folder", "/val or ", "/test"]),
    (_text_by_name, ["/train/digit0/notes.txt is not an image file"]),
    (_text_named_png, ["/train/digit0/zzz.png is not a readable image"]),
    (_text_first, ["/train/digit0/0.jpg is not a readable image"]),
    (_empty_file, ["/val/digit0/zzz.png is not a readable image"]),
    (_truncated_png, ["/train/digit1/", "is not a readable image"]),
    (_truncated_jpeg, ["/train/digit1/zzz.jpg is not a readable image"]),
    (_sixteen_bits, ["/train/digit0/deep.png", "I;16"]),
    (_broken_link, ["/train/digit0/zzz.png is a broken link"]),
    (_folder_that_cannot_be_read, ["cannot read", "/train/loop"]),
]


@pytest.mark.parametrize("loader", ["memory", "torchvision"])
@pytest.mark.parametrize(("spoil", "words"), TREES, ids=[spoil.__name__.strip("_") for spoil, _ in TREES])
def test_bad_tree(tmp_path, loader, spoil, words):
    spoil(help_.digit_tree(tmp_path))
    options = {"dataset_name": "ImageFolder", "loader": loader, "num_workers": 0, "batch_size": 6}
    fails(DataError, "dataset.data_root: ", *words, root=tmp_path, **options)


def test_a_fault_found_by_a_worker_is_one_line_too(tmp_path):
    _truncated_jpeg(help_.digit_tree(tmp_path))
    options = {"dataset_name": "ImageFolder", "loader": "torchvision", "num_workers": 2, "batch_size": 6}
    fails(DataError, "zzz.jpg is not a readable image", root=tmp_path, **options)


def test_no_data_root_at_all(tmp_path):
    fails(DataError, "dataset.data_root: no folder", root=tmp_path / "typo", dataset_name="ImageFolder")


def test_unequal_sizes_do_not_fit_memory(tmp_path):
    Image.new("RGB", (20, 16)).save(help_.digit_tree(tmp_path) / "train" / "digit0" / "wide.png")
    words = ["dataset.data_root", "wide.png is 20x16 pixels, others are 16x16", "dataset.loader: torchvision"]
    fails(DataError, *words, root=tmp_path, dataset_name="ImageFolder", loader="memory")


# ------------------------------------------------------------------------------------- options that do not fit the data


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_classes": 4}, ["dataset.num_classes: 4", "3 classes"]),
        ({"dataset_name": "ImageNet"}, ["has 3 classes, ImageNet has 1000", "ImageFolder"]),
        ({"loader": "memory", "resolution": 32}, ["dataset.resolution: 32", "16x16"]),
        ({"loader": "memory", "eval_resolution": 8}, ["dataset.eval_resolution: 8", "16x16"]),
    ],
)
def test_options_against_a_tree(tmp_path, options, words):
    options = {"dataset_name": "ImageFolder", **options}
    fails(ConfigError, *words, root=help_.digit_tree(tmp_path), **options)


def test_options_against_a_set_held_in_memory():
    fails(ConfigError, "dataset.loader: torchvision", "Digits", dataset_name="Digits", loader="torchvision")
    fails(ConfigError, "dataset.resolution: 16", "8x8", dataset_name="Digits", resolution=16)


# ----------------------------------------------------------------------------------------------- published data sets

IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"


def _cut(path: Path, missing: int) -> None:
    path.write_bytes(path.read_bytes()[:-missing])


IDX = {
    "no image file": (lambda raw: (raw / IMAGES).unlink(), [f"has no {IMAGES} in ", "put ", "dataset.download: true"]),
    "truncated images": (lambda raw: _cut(raw / IMAGES, 100), [IMAGES, "truncated", "31260 values", "(40, 28, 28)"]),
    "truncated labels": (lambda raw: _cut(raw / LABELS, 1), [LABELS, "39 values where the header says (40,)"]),
    "empty file": (lambda raw: (raw / IMAGES).write_bytes(b""), [IMAGES, "not an idx file"]),
    "text": (lambda raw: (raw / IMAGES).write_text("<html>404</html>"), [IMAGES, "not an idx file"]),
    "wrong size": (lambda raw: help_.write_idx(raw / IMAGES, np.zeros((40, 32, 32))), [IMAGES, "(40, 32, 32, 1)"]),
    "other count": (lambda raw: help_.write_idx(raw / LABELS, np.zeros(41)), ["(41,) labels for 40 images"]),
    "wrong labels": (lambda raw: help_.write_idx(raw / LABELS, np.full(40, 10)), ["labels 10 to 10, not 0 to 9"]),
    "no images": (lambda raw: help_.write_idx(raw / IMAGES, np.zeros((0, 28, 28))), [IMAGES, "(0, 28, 28, 1)"]),
    "truncated gz": (
        lambda raw: (raw / IMAGES).rename(raw / "x")
        and (raw / f"{IMAGES}.gz").write_bytes(gzip.compress((raw / "x").read_bytes())[:-50]),
        [f"{IMAGES}.gz", "truncated"],
    ),
    "not gz": (
        lambda raw: (raw / IMAGES).rename(raw / f"{IMAGES}.gz"),
        [f"{IMAGES}.gz", "truncated or corrupt"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", IDX)
def test_bad_mnist(tmp_path, case):
    spoil, words = IDX[case]
    spoil(help_.idx_files(tmp_path / "MNIST" / "raw"))
    words = ["dataset.data_root: ", str(tmp_path / "MNIST" / "raw"), *words]
    fails(DataError, *words, root=tmp_path, dataset_name="MNIST")


def test_bad_cifar(tmp_path, monkeypatch):
    help_.cifar_files(tmp_path, datasets.CIFAR10, monkeypatch)
    path = tmp_path / files_of("CIFAR10").folder / "data_batch_3"
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    words = ["dataset.data_root: ", f"{path} is truncated or corrupt (its MD5"]
    fails(DataError, *words, root=tmp_path, dataset_name="CIFAR10")
    path.unlink()
    fails(DataError, "CIFAR10 has no data_batch_3 in", str(path.parent), root=tmp_path, dataset_name="CIFAR10")
    path.mkdir()
    path.rmdir()
    path.write_bytes(content)
    help_.load(tmp_path, dataset_name="CIFAR10", batch_size=8, drop_last=True)


def test_bad_svhn(tmp_path):
    fails(DataError, "SVHN has no train_32x32.mat in", str(tmp_path), root=tmp_path, dataset_name="SVHN")
    for name in ("train_32x32.mat", "test_32x32.mat"):
        (tmp_path / name).write_bytes(b"MATLAB 5.0 MAT-file")
    fails(DataError, "train_32x32.mat is truncated or corrupt", root=tmp_path, dataset_name="SVHN")


# ---------------------------------------------------------------------------------------------------------- downloads


def test_a_failed_download_says_what_to_put_where(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.FashionMNIST, "mirrors", NOWHERE)
    root = tmp_path / "new"
    advice = f"put {IMAGES}", f"into {root}/FashionMNIST/raw", "dataset.data_root"
    words = ["the download of FashionMNIST failed", *advice]
    fails(RunError, *words, root=root, dataset_name="FashionMNIST", download=True)
    assert not root.exists()


@pytest.mark.parametrize("name", ["CIFAR10", "CIFAR100", "SVHN"])
def test_a_failed_download_leaves_what_was_there(tmp_path, monkeypatch, name):
    source = getattr(datasets, name)
    if name == "SVHN":
        listed = {split: [NOWHERE[0] + name, name, code] for split, (_, name, code) in source.split_list.items()}
        monkeypatch.setattr(source, "split_list", listed)
    else:
        monkeypatch.setattr(source, "url", NOWHERE[0] + source.filename)
    (tmp_path / "mine.txt").write_text("kept")
    fails(RunError, f"the download of {name} failed", "put ", root=tmp_path, dataset_name=name, download=True)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_data_root_that_cannot_be_made(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.MNIST, "mirrors", NOWHERE)
    (tmp_path / "file").write_text("in the way")
    root = tmp_path / "file" / "data"
    fails(RunError, "the download of MNIST failed", root=root, dataset_name="MNIST", download=True)


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args) -> None:
        pass


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    """A web server with small files in MNIST's format, made FashionMNIST's only mirror. Gives its folder."""
    folder = help_.idx_files(tmp_path / "mirror", suffix=".gz")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Quiet, directory=folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    point_to(monkeypatch, server.server_port, folder)
    yield server.server_port, folder
    server.shutdown()
    server.server_close()


def point_to(monkeypatch, port: int, folder: Path) -> None:
    monkeypatch.setattr(datasets.FashionMNIST, "mirrors", [f"http://127.0.0.1:{port}/"])
    files = [(path.name, help_.md5(path)) for path in sorted(folder.iterdir())]
    monkeypatch.setattr(datasets.FashionMNIST, "resources", files)


def test_missing_files_are_downloaded_and_those_there_are_kept(tmp_path, mirror):
    raw = tmp_path / "data" / "FashionMNIST" / "raw"
    help_.write_idx(raw / LABELS, np.full(40, 7))
    data = help_.load(tmp_path / "data", dataset_name="FashionMNIST", download=True, batch_size=8)
    assert (data.train.num_images, data.test.num_images) == (40, 12)
    assert help_.epoch(data)[1].tolist() == [7] * 40
    assert sorted(path.name for path in raw.iterdir()) == [
        "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte", IMAGES, LABELS,
    ]  # fmt: skip
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["FashionMNIST"]


def test_a_download_cut_short_is_refused_and_removed(tmp_path, mirror):
    _, folder = mirror
    _cut(folder / f"{IMAGES}.gz", 30)
    root = tmp_path / "data"
    words = ["the download of FashionMNIST failed", f"{IMAGES}.gz", f"into {root}"]
    fails(RunError, *words, root=root, dataset_name="FashionMNIST", download=True)
    assert not root.exists()


def _one_of_two(rank: int, folder: str, port: int) -> list[int | str]:
    """One process of two: loads FashionMNIST from nowhere, then from the mirror, and says what came of it."""
    timeout = timedelta(seconds=120)
    torch.distributed.init_process_group("gloo", f"file://{folder}/meet", timeout, world_size=2, rank=rank)
    options = {"dataset_name": "FashionMNIST", "data_root": f"{folder}/data", "batch_size": 8}
    cfg, ctx, outcomes = help_.make_config({"dataset": options}), Context(rank=rank, world=2), []
    for try_port in (9, port):
        with pytest.MonkeyPatch.context() as patch:
            point_to(patch, try_port, Path(folder) / "mirror")
            try:
                outcomes.append(sum(len(labels) for _, labels in load_data(cfg, ctx).test.batches()))
            except RunError as error:
                outcomes.append(str(error))
    torch.distributed.destroy_process_group()
    return outcomes


def _put_outcomes(results, *args) -> None:
    results.put(_one_of_two(*args))


def test_rank_zero_downloads_for_all_and_its_failure_is_everyones(tmp_path, mirror):
    context = torch.multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    other = context.Process(target=_put_outcomes, args=(results, 1, str(tmp_path), mirror[0]))
    other.start()
    outcomes = [_one_of_two(0, str(tmp_path), mirror[0]), results.get()]
    other.join(60)
    assert other.exitcode == 0
    assert outcomes[0][0] == outcomes[1][0] and "the download of FashionMNIST failed" in outcomes[0][0]
    assert outcomes[0][1] == outcomes[1][1] == 6


class _OtherRank(Context):
    """Rank 1 of two, which hears from rank 0 that a file is missing."""

    def broadcast_object(self, obj=None):
        return DataError, "MNIST has no such file"


def test_rank_zeros_fault_keeps_its_kind_and_names_the_option_on_the_others():
    cfg = help_.make_config({"dataset": {"dataset_name": "MNIST"}})
    with pytest.raises(DataError, match=r"^dataset\.data_root: MNIST has no such file$"):
        load_data(cfg, _OtherRank(rank=1, world=2))
