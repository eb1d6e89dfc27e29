"""FFCV's known faults, closed: never a silent hang, no thread left behind; and files that cannot be read."""

import gc
import os
import shutil
import sys
import threading
import time

import numpy as np
import pytest
import torch

from tests.ffcv_helpers import (
    SETTINGS,
    THREADS_AFTER_IMPORT,
    TRAIN,
    VAL,
    damage,
    ffcv,
    images_of,
    make_tree,
    threads,
    write_raw,
)
from utils.errors import ConfigError, DataError, RunError
from utils.ffcv.pixels import compile_decoder, decode_images
from utils.ffcv.prefetch import Prefetcher

pytestmark = pytest.mark.ffcv


@pytest.mark.parametrize("name", ["raw", "jpeg"])
def test_a_damaged_image_is_an_error_not_a_hang(name, tmp_path, request):
    folder = request.getfixturevalue(name)
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    (path,) = tmp_path.glob("train_*")
    damage(path, np.array([9]))
    with pytest.raises(DataError, match=rf"{path.name}: .*image 9 in the file is damaged"):
        list(ffcv(tmp_path).train.batches(0, 0))
    assert not threads()


def test_the_decoder_is_compiled_before_anyone_waits(raw, monkeypatch):
    compile_decoder()
    list(ffcv(raw).train.batches(0, 0))
    assert len(decode_images.signatures) == 1  # it was compiled for just what batches need

    def refuse() -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("utils.ffcv.loader.compile_decoder", refuse)
    with pytest.raises(ZeroDivisionError):
        ffcv(raw)


def prefetcher(fill, timeout: float = 30) -> Prefetcher:
    return Prefetcher(fill, [2] * 9, (4, 4, 3), None, 2, timeout, "x.beton")


def test_an_error_in_the_thread_reaches_the_trainer():
    def fill(k, pixels, labels, pool):
        if k == 2:
            raise OSError("the disk is gone")

    seen = []
    with pytest.raises(RunError, match=r"x\.beton: .*the disk is gone"):
        seen.extend(prefetcher(fill))
    assert len(seen) == 2 and not threads()


def test_a_bug_in_the_thread_keeps_its_kind():
    def fill(k, pixels, labels, pool):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        list(prefetcher(fill))
    assert not threads()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_thread_that_dies_is_noticed():
    def fill(k, pixels, labels, pool):
        raise SystemExit  # ends a thread without a word

    with pytest.raises(RunError, match="has died"):
        list(prefetcher(fill))
    assert not threads()


def test_a_stalled_disk_is_noticed():
    disk = threading.Event()
    with pytest.raises(RunError, match=r"no batch for 0\.5 s"):
        list(prefetcher(lambda *_: disk.wait(), timeout=0.5))
    disk.set()
    wait_for_no_thread()


def wait_for_no_thread() -> None:
    end = time.monotonic() + 5
    while threads() and time.monotonic() < end:
        time.sleep(0.02)
    assert not threads()


def test_a_slow_consumer_sees_every_batch_unspoilt():
    seen = []
    for pixels, labels in prefetcher(lambda k, pixels, labels, pool: (pixels.fill_(k), labels.fill_(k))):
        time.sleep(0.01)
        seen.append((pixels.unique().tolist(), labels.tolist()))
    assert seen == [([k], [k, k]) for k in range(9)]


@pytest.mark.parametrize("how", ["used up", "closed", "forgotten", "data closed", "error"])
def test_no_thread_is_left(raw, how):
    data = ffcv(raw, batch_size=4)
    batches = data.train.batches(0, 0)
    next(batches)
    assert threads()  # more batches are left than it may decode ahead
    if how == "used up":
        list(batches)
    elif how == "closed":
        batches.close()
    elif how == "forgotten":
        del batches
        gc.collect()
    elif how == "data closed":
        data.close()
    else:
        with pytest.raises(ZeroDivisionError):
            batches.throw(ZeroDivisionError())
    assert not threads()


def test_two_iterators_at_once(raw):
    data = ffcv(raw)
    one = [images for (images, _), _ in zip(data.train.batches(0, 0), data.test.batches())]
    assert torch.equal(torch.cat(one), images_of(list(data.train.batches(0, 0))[: len(one)]))


def test_ffcvs_pipelines_are_not_used(raw, monkeypatch):
    """Their grouping never ends for some; nor are its iterators, whose threads die or stay."""
    from ffcv.loader import Loader
    from ffcv.loader.epoch_iterator import EpochIterator
    from ffcv.pipeline.graph import Graph

    def refuse(*_, **__):
        raise AssertionError("FFCV's own pipeline was asked for")

    for kind in (Loader, EpochIterator, Graph):
        monkeypatch.setattr(kind, "__init__", refuse)
    assert len(images_of(ffcv(raw).train.batches(0, 0))) == TRAIN


def test_torchs_threads_are_left_alone(raw):
    assert THREADS_AFTER_IMPORT == 3
    torch.set_num_threads(2)
    list(ffcv(raw, num_workers=1).test.batches())
    assert torch.get_num_threads() == 2


def test_too_many_workers_are_clamped_and_said_once(raw, capsys, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    data, _ = (ffcv(raw, rank, 2, num_workers=999) for rank in range(2))
    assert data.train.reader.threads == data.test.reader.threads == 2
    assert [line for line in capsys.readouterr().err.splitlines() if "num_workers" in line] == [
        "harness: note: dataset.num_workers: 999 asked for, 2 used: one per core"
    ]
    assert len(images_of(data.test.batches())) == (VAL // 2)


def test_which_file_is_read(raw, jpeg, tmp_path):
    root = tmp_path / "root"
    with pytest.raises(ValueError, match=r"dataset\.train_beton: no train_\*\.beton in .*root"):
        ffcv(root)
    shutil.copytree(raw, root / "betons")
    assert ffcv(root).train.num_images == TRAIN
    shutil.copytree(jpeg, root / "other")
    with pytest.raises(ValueError, match=r"dataset\.train_beton: name one of the 2 files: .*train_0.*train_500"):
        ffcv(root)
    chosen = root / "other" / "train_500_1.00_90.beton"
    data = ffcv(root, train_beton=str(chosen))
    assert data.train.reader.beton.path == chosen and data.test.reader.beton.path == chosen.with_name(
        "val_500_1.00_90.beton"
    )
    with pytest.raises(ValueError, match=r"dataset\.val_beton: .*none\.beton is not a file"):
        ffcv(root, train_beton=str(chosen), val_beton=str(root / "none.beton"))
    with pytest.raises(ValueError, match=r"dataset\.val_beton: name one of the 2 files"):
        ffcv(root, train_beton=str(shutil.copy(chosen, tmp_path / "train_x.beton")))


@pytest.mark.parametrize("kind", ["cut off", "empty", "text", "half written"])
def test_a_file_that_is_no_beton(raw, tmp_path, kind):
    shutil.copytree(raw, tmp_path, dirs_exist_ok=True)
    path = tmp_path / f"train_{SETTINGS}.beton"
    whole = path.read_bytes()
    changed = {"cut off": whole[:-30], "empty": b"", "text": b"hello " * 99, "half written": whole[: len(whole) // 2]}
    path.write_bytes(changed[kind])
    with pytest.raises(DataError, match=rf"dataset\.train_beton: {path} "):
        ffcv(tmp_path)


def test_classes(raw, tmp_path):
    with pytest.raises(ConfigError, match=r"dataset\.num_classes: 5 is not allowed: .* has 3 classes"):
        ffcv(raw, num_classes=5)
    with pytest.raises(ConfigError, match=r"has 3 classes, ImageNet has 1000"):
        ffcv(raw, dataset_name="ImageNet")
    two = make_tree(tmp_path / "two", 12, 6)
    for split in ("train", "test"):
        shutil.rmtree(two / split / "class2")
    write_raw(two, tmp_path / "out")
    with pytest.raises(DataError, match=r"dataset\.val_beton: .* has label 2, .* only labels 0 to 1"):
        ffcv(tmp_path / "out", val_beton=str(raw / f"val_{SETTINGS}.beton"))


def test_without_ffcv(raw, monkeypatch):
    monkeypatch.delitem(sys.modules, "utils.ffcv.library")
    monkeypatch.delattr("utils.ffcv.library")
    monkeypatch.setitem(sys.modules, "ffcv.reader", None)
    with pytest.raises(ConfigError, match=r"dataset\.loader: ffcv is not allowed here: FFCV cannot be imported"):
        ffcv(raw)
