"""FFCV's loader: the same images as torchvision's, reproducible to the bit, and as the options say."""

import shutil

import numpy as np
import pytest
import torch

from harness_params import make_config
from tests.data_helpers import load, photo_tree
from tests.ffcv_helpers import (
    SETTINGS,
    TRAIN,
    VAL,
    assert_same,
    damage,
    ffcv,
    images_of,
    labels_of,
    write,
    write_raw,
)
from tests.streams_double import LateDevice
from utils.data.epochs import epoch_order
from utils.data.images import epoch_resolution
from utils.dataset import load_data
from utils.distributed import Context
from utils.ffcv import loader as ffcv_loader
from utils.ffcv.batches import FFCVTestLoader
from utils.ffcv.beton import Beton

pytestmark = pytest.mark.ffcv
LEVEL = 1 / 255 / 0.225  # a grey level, normalised


# ------------------------------------------------------------------------------------------------- as torchvision does


def assert_same_batches(mine, theirs, mean_below: float) -> None:
    """Equal labels, and pixels that differ by `mean_below` grey levels on average, in each batch."""
    mine, theirs = list(mine), list(theirs)
    assert len(mine) == len(theirs)
    for (images, labels), (other, other_labels) in zip(mine, theirs):
        assert torch.equal(labels, other_labels) and labels.dtype == torch.int64
        assert images.shape == other.shape and images.dtype == torch.float32
        assert images.stride() == other.stride()
        assert (images - other).abs().mean() < mean_below * LEVEL


@pytest.mark.parametrize("size", [16, 32, 200])
def test_evaluation_is_torchvisions(tree, raw, size):
    mine, theirs = (load_(root, size) for load_, root in ((_ffcv, raw), (_folder, tree)))
    assert mine.test.num_images == theirs.test.num_images == VAL
    assert mine.num_classes == theirs.num_classes == 3 and mine.image_shape == theirs.image_shape == (3, size, size)
    images, other = images_of(mine.test.batches()), images_of(theirs.test.batches())
    assert (images - other).abs().max() < 1.1 * LEVEL
    assert_same_batches(mine.test.batches(), theirs.test.batches(), 0.3)


def _ffcv(root, size, **dataset):
    return ffcv(root, resolution=size, **dataset)


def _folder(root, size, **dataset):
    options = {"dataset_name": "ImageFolder", "batch_size": 8, "num_workers": 0, "loader": "torchvision"}
    return load(root, resolution=size, **options, **dataset)


@pytest.mark.parametrize("augment", ["crop_flip", "flip", "none"])
def test_training_takes_torchvisions_crops_and_flips(tree, raw, augment):
    """The same experiment through either loader, not only the same distribution."""
    mine, theirs = _ffcv(raw, 32, augment=augment), _folder(tree, 32, augment=augment)
    assert_same_batches(mine.train.batches(1, 2), theirs.train.batches(1, 2), 0.3)
    assert_same_batches(mine.train.score_batches(1, 2), theirs.train.score_batches(1, 2), 0.3)


def test_stored_jpegs_are_decoded_rightly(raw, jpeg):
    """Every image is near its exact pixels: JPEG loses up to 5 grey levels of this noise, other images are 50 away."""
    assert Beton(jpeg / "train_500_1.00_90.beton").is_jpeg.all()
    images, exact = (images_of(ffcv(root).train.batches(0, 0)) for root in (jpeg, raw))
    assert ((images - exact).abs().mean(dim=(1, 2, 3)) < 6 * LEVEL).all()


def test_real_photographs(tmp_path):
    tree = photo_tree(tmp_path / "photos", per_class=8)
    write_raw(tree, tmp_path / "raw")
    assert write(tree, tmp_path / "usual", "--max_resolution", "500") == 0
    theirs = _folder(tree, 224)
    for folder, mean_below in (("raw", 0.3), ("usual", 4)):
        mine = _ffcv(tmp_path / folder, 224)
        assert_same_batches(mine.test.batches(), theirs.test.batches(), mean_below)
    assert_same_batches(_ffcv(tmp_path / "raw", 224).train.batches(0, 0), theirs.train.batches(0, 0), 0.3)


def test_memory_format_is_the_configs(raw):
    dataset = {"dataset_name": "ImageFolder", "loader": "ffcv", "data_root": str(raw), "resolution": 32}
    cfg = make_config({"dataset": dataset, "experiment_params": {"channels_last": False}})
    images, _ = next(load_data(cfg, Context()).test.batches())
    assert images.is_contiguous() and not images.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(images, images_of(ffcv(raw, batch_size=128).test.batches()))


@pytest.mark.parametrize("careless", ["", "wait"])
def test_batches_by_way_of_a_device_are_the_same(raw, careless):
    """To the bit; where the wait for the copy is left out, they are not."""
    plain, sent = ffcv(raw), ffcv(raw)
    sent.train.reader.side = sent.test.reader.side = LateDevice(careless=careless)
    for mine, other in (
        (sent.train.batches(1, 2), plain.train.batches(1, 2)),
        (sent.train.score_batches(0, 2), plain.train.score_batches(0, 2)),
        (sent.test.batches(), plain.test.batches()),
    ):
        same = [torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in zip(list(mine), list(other), strict=True)]
        assert len(same) >= 2 and all(same) != bool(careless)


# ------------------------------------------------------------------------------------------------------- reproducible


@pytest.mark.parametrize("world", [2, 3])
def test_batches_do_not_depend_on_processes_or_threads(raw, world):
    whole = list(ffcv(raw, num_workers=1).train.batches(1, 3))
    ranks = [list(ffcv(raw, rank, world, num_workers=2).train.batches(1, 3)) for rank in range(world)]
    for step, (images, labels) in enumerate(whole):
        assert torch.equal(images, torch.cat([ranks[rank][step][0] for rank in range(world)]))
        assert torch.equal(labels, torch.cat([ranks[rank][step][1] for rank in range(world)]))


def test_an_epoch_is_a_function_of_seed_level_and_epoch(raw):
    def epoch(seed: int, level: int, number: int) -> torch.Tensor:
        return images_of(ffcv(raw, seed=seed).train.batches(level, number))

    first = epoch(0, 0, 0)
    np.random.seed(5)  # FFCV's own crops would depend on it
    assert torch.equal(first, epoch(0, 0, 0))
    for other in ((1, 0, 0), (0, 1, 0), (0, 0, 1)):
        assert not torch.equal(first, epoch(*other))


def test_every_image_once_an_epoch_in_epoch_order(raw):
    data = ffcv(raw)
    labels = Beton(raw / f"train_{SETTINGS}.beton").labels
    batches = list(data.train.batches(2, 1))
    assert [len(batch) for _, batch in batches] == [8, 8, 8, 6] and data.train.steps_per_epoch == 4
    np.testing.assert_array_equal(labels_of(batches).numpy(), labels[epoch_order(TRAIN, 0, 2, 1)])
    assert len(list(ffcv(raw, drop_last=True).train.batches(2, 1))) == 3


def test_a_resumed_epoch_reads_no_earlier_image(raw, tmp_path):
    whole = list(ffcv(raw).train.batches(0, 1))
    shutil.copytree(raw, tmp_path, dirs_exist_ok=True)
    seen = epoch_order(TRAIN, 0, 0, 1)[:16].numpy()
    damage(tmp_path / f"train_{SETTINGS}.beton", seen)
    assert_same(ffcv(tmp_path).train.batches(0, 1, 2), whole[2:])


@pytest.mark.parametrize("world", [1, 2, 3, 16])
def test_evaluation_counts_each_image_once(raw, world):
    """Also with more processes than images."""
    data = ffcv(raw)
    parts = [FFCVTestLoader(data.test.reader, 32, 4, rank, world).batches() for rank in range(world)]
    batches = [batch for part in parts for batch in part]
    assert torch.equal(images_of(batches), images_of(data.test.batches()))
    np.testing.assert_array_equal(labels_of(batches).numpy(), Beton(raw / f"val_{SETTINGS}.beton").labels)
    if world < 4:
        assert sum(len(labels_of(ffcv(raw, rank, world).test.batches())) for rank in range(world)) == VAL


def test_score_batches_are_the_same_for_all(raw):
    first = list(ffcv(raw).train.batches(1, 0))[:2]
    for rank in range(2):
        assert_same(ffcv(raw, rank, 2).train.score_batches(1, 2), first)


# ------------------------------------------------------------------------------------------------------------- options


def test_resolution_of_an_epoch():
    """16 epochs from 160 to 192 and on, by hand: 160 + 32 * e/15, to the nearest multiple of 32."""
    assert [epoch_resolution(e, 16, 160, 192) for e in range(16)] == [160] * 8 + [192] * 8
    assert [epoch_resolution(e, 5, 96, 224) for e in range(5)] == [96, 128, 160, 192, 224]
    assert [epoch_resolution(e, 4, 100, 130) for e in range(4)] == [100, 100, 128, 130]
    assert epoch_resolution(0, 1, 96, 224) == 224


def test_progressive_resizing_and_evaluation_resolution(raw):
    data = ffcv(raw, resolution=0, start_resolution=32, end_resolution=96, eval_resolution=80)
    last = make_config({}).experiment_params.epochs_per_level - 1
    assert next(data.train.batches(0, 0))[0].shape[2:] == (32, 32)
    assert next(data.train.batches(0, last // 2 + 1))[0].shape[2:] == (64, 64)
    assert next(data.train.batches(0, last))[0].shape[2:] == (96, 96)
    assert next(data.test.batches())[0].shape[2:] == (80, 80) and data.image_shape == (3, 96, 96)
    with pytest.raises(ValueError, match=r"dataset\.resolution: 64 is not allowed"):
        ffcv(raw, resolution=64, start_resolution=32, end_resolution=96)


def test_os_cache(raw, capsys, monkeypatch):
    def cached(**dataset) -> bool:
        return ffcv(raw, **dataset).train.reader.beton.cached

    assert cached() and cached(os_cache="on") and not cached(os_cache="off")
    assert "os_cache" not in capsys.readouterr().err
    exact = images_of(ffcv(raw).train.batches(0, 0))
    assert torch.equal(exact, images_of(ffcv(raw, os_cache="off").train.batches(0, 0)))
    monkeypatch.setattr(ffcv_loader, "available_memory", lambda: 1000)
    assert not cached() and cached(os_cache="on")
    assert "note: dataset.os_cache: auto = off" in capsys.readouterr().err


# -------------------------------------------------------------------------------------------------- validation images


def test_validation_images_are_torchvisions(tree, raw):
    """The same images are held out by either loader, and training goes on with the same others."""
    options = {"augment": "none", "validation_images": 9}
    mine, theirs = _ffcv(raw, 32, **options), _folder(tree, 32, **options)
    assert mine.validation.num_images == theirs.validation.num_images == 9
    assert mine.train.num_images == theirs.train.num_images == TRAIN - 9
    assert_same_batches(mine.validation.batches(), theirs.validation.batches(), 0.3)
    assert_same_batches(mine.train.batches(1, 2), theirs.train.batches(1, 2), 0.3)
    assert_same_batches(mine.train.score_batches(1, 2), theirs.train.score_batches(1, 2), 0.3)
    assert_same_batches(mine.test.batches(), theirs.test.batches(), 0.3)
    ranks = [_ffcv(raw, 32, **options, rank=rank, world=3, drop_last=True) for rank in range(3)]
    parts = [batch for data in ranks for batch in data.validation.batches()]
    assert torch.equal(images_of(parts), images_of(mine.validation.batches()))
    assert mine.identity != _ffcv(raw, 32).identity
