"""Order, shares, augmentation and normalisation of the loaders in memory, and the published sets' readers."""

import hashlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.io import savemat
from torchvision import datasets

from tests import data_helpers as help_
from utils.data.epochs import check_shares, epoch_order, global_batch, rank_places, share, steps_per_epoch
from utils.data.images import Normalizer, pixel_statistics
from utils.data.in_memory import CROP_PADDING, MemoryTestLoader, MemoryTrainLoader
from utils.data.published import files_of
from utils.data.specs import DATASETS
from utils.seeds import stable_seed

CPU = torch.device("cpu")


def memory_loader(n=54, size=6, channels=3, crop=True, flip=True, batch_size=16, seed=0, rank=0, world=1, **more):
    """Random pixels, normalised to themselves: (x / 1 - 0) / 1."""
    random = np.random.default_rng(1)
    images = random.integers(1, 256, (n, size, size, channels), dtype=np.uint8)
    normalize = Normalizer((0.0,) * channels, (1.0,) * channels, (channels, size, size), CPU, full_scale=1)
    plan = {"batch_size": batch_size, "drop_last": False, "seed": seed, "rank": rank, "world": world, **more}
    return images, MemoryTrainLoader(images, np.arange(n), normalize, crop, flip, **plan)


# ------------------------------------------------------------------------------------------------- order and shares


@given(st.integers(0, 500), st.integers(1, 9))
def test_shares_make_up_the_whole_and_differ_by_one_at_most(n, world):
    parts = [share(n, rank, world) for rank in range(world)]
    assert [i for part in parts for i in range(part.start, part.stop)] == list(range(n))
    sizes = [part.stop - part.start for part in parts]
    assert max(sizes) - min(sizes) <= 1


@given(st.integers(1, 300), st.integers(1, 70), st.booleans(), st.integers(1, 5))
def test_every_place_is_taken_once_by_one_rank_unless_refused(n, batch, drop_last, world):
    steps, size = steps_per_epoch(n, batch, drop_last), min(batch, n)
    parts = [[rank_places(step, n, size, rank, world) for rank in range(world)] for step in range(steps)]
    places = [i for step in parts for part in step for i in range(part.start, part.stop)]
    assert places == list(range(len(places)))
    dropped = n - len(places)
    assert dropped == (n % batch if drop_last and n >= batch else 0)
    smallest = min(part.stop - part.start for step in parts for part in step)
    for least in (1, 2):
        if smallest >= least:
            check_shares(n, batch, drop_last, world, least)
        else:
            with pytest.raises(ValueError, match=r"dataset\.batch_size"):
                check_shares(n, batch, drop_last, world, least)


@pytest.mark.parametrize(
    ("n", "batch", "drop_last", "sizes"),
    [(10, 4, False, [4, 4, 2]), (10, 4, True, [4, 4]), (8, 4, False, [4, 4]), (3, 4, False, [3]), (3, 4, True, [3])],
)
def test_batch_sizes_of_an_epoch_by_hand(n, batch, drop_last, sizes):
    _, loader = memory_loader(n=n, batch_size=batch, drop_last=drop_last)
    assert loader.steps_per_epoch == len(sizes)
    assert [loader.global_batch(step) for step in range(len(sizes))] == sizes
    assert [len(labels) for _, labels in loader.batches(0, 0)] == sizes
    assert [global_batch(step, n, loader.batch_size) for step in range(len(sizes))] == sizes


def test_order_depends_on_seed_level_and_epoch_alone():
    keys = [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0), (10, 1, 0), (1, 1, 0)]
    orders = {key: epoch_order(100, *key) for key in keys}
    torch.manual_seed(5)
    torch.rand(3)
    for key, order in orders.items():
        assert torch.equal(order, epoch_order(100, *key))
        assert torch.equal(order.sort().values, torch.arange(100))
        assert sum(torch.equal(order, other) for other in orders.values()) == 1
    # Written down once: a seed must mean the same on another machine and next year.
    assert stable_seed(0, 1, 2) == 9058871843155686531


def test_batches_leave_the_global_generator_alone():
    _, loader = memory_loader()
    before = torch.get_rng_state()
    list(loader.batches(0, 0))
    loader.score_batches(0, 1)
    assert torch.equal(before, torch.get_rng_state())


# ---------------------------------------------------------------------------------------------- one batch, many ranks


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("world", [2, 3])
def test_ranks_together_see_what_one_process_sees(world, channels):
    _, alone = memory_loader(channels=channels)
    ranks = [memory_loader(channels=channels, rank=rank, world=world)[1] for rank in range(world)]
    for level, epoch in ((0, 0), (2, 1)):
        parts = zip(*(loader.batches(level, epoch) for loader in ranks))
        for (images, labels), shares in zip(alone.batches(level, epoch), parts, strict=True):
            assert torch.equal(images, torch.cat([part for part, _ in shares]))
            assert torch.equal(labels, torch.cat([part for _, part in shares]))


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_every_test_image_once_over_all_ranks(world):
    images = np.random.default_rng(0).integers(0, 256, (5, 4, 4, 3), dtype=np.uint8)
    normalize = Normalizer((0.5,) * 3, (0.2,) * 3, (3, 4, 4), CPU)
    loaders = [MemoryTestLoader(images, np.arange(5), normalize, rank, world) for rank in range(world)]
    seen = [(image, int(label)) for loader in loaders for batch in loader.batches() for image, label in zip(*batch)]
    assert [label for _, label in seen] == list(range(5)) and all(loader.num_images == 5 for loader in loaders)
    expected = (images / 255 - 0.5) / 0.2
    np.testing.assert_allclose(torch.stack([i for i, _ in seen]).permute(0, 2, 3, 1), expected, rtol=1e-5, atol=1e-6)


def test_a_resumed_epoch_is_the_tail_of_the_whole_one():
    _, loader = memory_loader()
    whole = list(loader.batches(1, 2))
    for start in range(loader.steps_per_epoch + 1):
        tail = list(loader.batches(1, 2, start))
        assert len(tail) == len(whole) - start
        assert all(torch.equal(a, b) for x, y in zip(tail, whole[start:]) for a, b in zip(x, y))
    with pytest.raises(ValueError, match="start_step"):
        next(loader.batches(1, 2, loader.steps_per_epoch + 1))


def test_score_batches_are_the_first_full_global_batches_on_any_rank():
    _, alone = memory_loader(batch_size=16)
    first = list(alone.batches(3, 0))[:3]
    for rank, world in ((0, 1), (1, 3)):
        scored = memory_loader(batch_size=16, rank=rank, world=world)[1].score_batches(3, 3)
        assert all(torch.equal(a, b) for x, y in zip(scored, first, strict=True) for a, b in zip(x, y))
    with pytest.raises(ValueError, match=r"prune_params\.score_batches: 4 .*1 to 3"):
        alone.score_batches(3, 4)


# ---------------------------------------------------------------------------------- augmentation, against plain loops


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("crop", "flip"), [(False, False), (True, False), (False, True), (True, True)])
def test_each_image_is_a_crop_of_its_own_padded_self(crop, flip, channels):
    images, loader = memory_loader(n=200, crop=crop, flip=flip, channels=channels, batch_size=64)
    padded = np.pad(images, ((0, 0), (CROP_PADDING,) * 2, (CROP_PADDING,) * 2, (0, 0)))
    seen = []
    for batch, labels in loader.batches(0, 0):
        assert batch.dtype == torch.float32 and labels.dtype == torch.int64
        assert channels == 1 or batch.is_contiguous(memory_format=torch.channels_last)
        for image, label in zip(batch.permute(0, 2, 3, 1).to(torch.uint8).numpy(), labels.tolist()):
            views = {
                (dy, dx, mirrored): view[:, ::-1] if mirrored else view
                for dy in range(2 * CROP_PADDING + 1)
                for dx in range(2 * CROP_PADDING + 1)
                for view in [padded[label, dy : dy + 6, dx : dx + 6]]
                for mirrored in (False, True)
            }
            found = [key for key, view in views.items() if np.array_equal(view, image)]
            assert found, "an image that is no crop of its original"
            seen.append((label, found))
    assert sorted(label for label, _ in seen) == list(range(200))
    sure = [found[0] for _, found in seen if len(found) == 1]
    assert len(sure) > 150
    assert {mirrored for _, _, mirrored in sure} == ({False, True} if flip else {False})
    for axis in (0, 1):
        offsets = {key[axis] for key in sure}
        assert offsets == (set(range(2 * CROP_PADDING + 1)) if crop else {CROP_PADDING})


def test_a_crop_and_a_flip_by_hand():
    """One 2x2 image, cropped one pixel down and left of its place, then mirrored."""
    normalize = Normalizer((0.0,), (1.0,), (1, 2, 2), CPU, full_scale=1)
    image = np.array([[1, 2], [3, 4]], dtype=np.uint8).reshape(1, 2, 2, 1)
    plan = {"batch_size": 2, "drop_last": False, "seed": 0, "rank": 0, "world": 1}
    loader = MemoryTrainLoader(np.repeat(image, 2, 0), np.array([0, 1]), normalize, True, True, **plan)
    corner = (CROP_PADDING + 1) * (2 + 2 * CROP_PADDING) + CROP_PADDING - 1
    images, labels = loader.gather(torch.tensor([[corner, corner], [0, 1], [0, 1]]))
    assert labels.tolist() == [0, 1]
    # Rows from 1 on, columns from -1 on: [[., 3], [., .]], and its mirror image.
    assert images.tolist() == [[[[0, 3], [0, 0]]], [[[3, 0], [0, 0]]]]


@pytest.mark.parametrize("alternate", [False, True])
def test_draws_made_ahead_are_the_same(alternate):
    plan = {"n": 50, "size": 8, "channels": 3, "batch_size": 16, "alternate": alternate}
    (_, ahead), (_, plain) = memory_loader(**plan), memory_loader(**plan)
    for level, epoch in ((0, 0), (0, 1), (1, 0), (1, 2)):
        expected = plain.draws(level, epoch)
        ahead.draw_ahead(0, 1)  # another epoch's, in three of the four cases
        found = list(ahead.batches(level, epoch, 1))
        ahead.draw_ahead(level, epoch)
        again = list(ahead.batches(level, epoch, 1))
        assert torch.equal(ahead.draws(level, epoch), expected)
        for batches in (found, again):
            for mine, theirs in zip(batches, plain.batches(level, epoch, 1), strict=True):
                assert all(torch.equal(a, b) for a, b in zip(mine, theirs))


def test_flips_are_even_and_differ_between_epochs():
    images, loader = memory_loader(n=2000, size=2, channels=1, crop=False, batch_size=2000)
    flips = []
    for epoch in range(2):
        batch, labels = next(loader.batches(0, epoch))
        flips.append(np.zeros(2000, dtype=bool))
        flips[-1][labels.numpy()] = (batch[:, 0].numpy() != images[labels.numpy()][..., 0]).any((1, 2))
    assert all(900 < flip.sum() < 1100 for flip in flips)
    assert 850 < (flips[0] != flips[1]).sum() < 1150


# ------------------------------------------------------------------------------------------------------ normalisation


def test_normalisation_by_hand():
    normalize = Normalizer((0.5, 0.0, 1.0), (0.5, 1.0, 0.25), (3, 1, 2), CPU)
    out = normalize(torch.tensor([[0, 0, 0, 255, 255, 255]], dtype=torch.uint8))
    assert out.shape == (1, 3, 1, 2)
    torch.testing.assert_close(out[0, :, 0], torch.tensor([[-1.0, 1.0], [0.0, 1.0], [-4.0, 0.0]]))


def test_channels_last_off_gives_plain_strides():
    normalize = Normalizer((0.5,) * 3, (0.2,) * 3, (3, 4, 4), CPU, channels_last=False)
    assert normalize(torch.zeros(2, 48, dtype=torch.uint8)).is_contiguous()


def test_statistics_are_exact():
    images = np.random.default_rng(2).integers(0, 256, (5000, 3, 4, 3), dtype=np.uint8)
    images[..., 2] = 7
    mean, std = pixel_statistics(images)
    np.testing.assert_allclose(mean, (images / 255).mean((0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(std[:2], (images / 255).std((0, 1, 2))[:2], rtol=1e-12)
    assert std[2] == 1.0  # constant: zero after normalisation, not 0/0


@pytest.mark.parametrize("name", ["Digits", "FashionMNIST"])
def test_published_constants_fit_the_data(name, tmp_path):
    root = help_.fashion_root(tmp_path) if name == "FashionMNIST" else tmp_path
    spec = DATASETS[name]
    pixels, _ = files_of(name).read(root, train=True)
    mean, std = (value * 255 / spec.full_scale for (value,) in pixel_statistics(pixels))
    assert (mean, std) == pytest.approx((spec.mean[0], spec.std[0]), abs=1e-4)
    data = help_.load(root, dataset_name=name, batch_size=500)
    images, labels = next(data.train.batches(0, 0))
    assert abs(images.mean()) < 0.05 and abs(images.std() - 1) < 0.05
    assert images.shape[1:] == data.image_shape == spec.image_shape and set(labels.tolist()) == set(range(10))


# ------------------------------------------------------------------------------------------------------- the data sets


@pytest.mark.parametrize(("name", "classes"), [("CIFAR10", 10), ("CIFAR100", 100)])
def test_a_data_set_has_as_many_classes_as_its_files(name, classes):
    assert files_of(name).spec.num_classes == DATASETS[name].num_classes == classes


def test_digits_are_split_once_for_all():
    files = files_of("Digits")
    (train, train_labels), (test, test_labels) = files.read(None, True), files.read(None, False)
    assert train.shape == (1437, 8, 8, 1) and test.shape == (360, 8, 8, 1)
    assert np.bincount(test_labels).tolist() == [36] * 10
    everything, _ = help_.digit_images()
    joined = np.concatenate([train, test])[..., 0]
    assert sorted(map(bytes, joined)) == sorted(map(bytes, everything))
    # Written down once: the split must not move under anybody's results.
    assert hashlib.sha256(test.tobytes() + test_labels.tobytes()).hexdigest()[:16] == "dbc7af74908c4dba"
    assert len(train_labels) == 1437


def test_fashion_mnist_as_debian_packages_it(tmp_path):
    data = help_.load(help_.fashion_root(tmp_path), dataset_name="FashionMNIST", batch_size=1000)
    assert (data.train.num_images, data.test.num_images, data.num_classes) == (60000, 10000, 10)
    labels = torch.cat([labels for _, labels in data.test.batches()])
    assert labels[:10].tolist() == [9, 2, 1, 1, 6, 1, 4, 6, 5, 7]  # as the package's own reader gives them
    assert labels.bincount().tolist() == [1000] * 10


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_mnist_is_read_unpacked_or_not(tmp_path, suffix):
    help_.idx_files(tmp_path / "MNIST" / "raw", suffix=suffix)
    data = help_.load(tmp_path, dataset_name="MNIST", batch_size=8)
    images, labels = next(iter(data.test.batches()))
    digits, targets = help_.digit_images()
    assert np.array_equal(help_.pixels_of(images, data)[:, 10:18, 10:18, 0], digits[40:52] * 15)
    assert labels.tolist() == targets[40:52].tolist()


def test_a_new_set_in_a_known_format_is_one_line_in_the_table(tmp_path, monkeypatch):
    monkeypatch.setitem(DATASETS, "KMNIST", replace(DATASETS["MNIST"], mean=(0.1918,), std=(0.3483,)))
    help_.idx_files(tmp_path / "KMNIST" / "raw")
    images, labels = files_of("KMNIST").read(tmp_path, train=True)
    digits, targets = help_.digit_images()
    assert np.array_equal(images[:, 10:18, 10:18, 0], digits[:40] * 15) and np.array_equal(labels, targets[:40])
    with pytest.raises(ValueError, match="ImageNet is a tree"):
        files_of("ImageNet")


@pytest.mark.parametrize(("source", "classes"), [(datasets.CIFAR10, 10), (datasets.CIFAR100, 100)])
def test_cifar_pickles_are_read_as_height_width_channels(tmp_path, monkeypatch, source, classes):
    expected = help_.cifar_files(tmp_path, source, monkeypatch)
    data = help_.load(tmp_path, dataset_name=source.__name__, batch_size=8, drop_last=True)
    images, labels = next(iter(data.test.batches()))
    assert np.array_equal(help_.pixels_of(images, data), expected[-7:]) and labels.tolist() == list(range(7))
    assert data.num_classes == classes and data.train.crop and data.train.flip


def test_svhn_is_read_and_its_label_ten_is_the_digit_zero(tmp_path, monkeypatch):
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3, 20), dtype=np.uint8)
    listed = {}
    for split, (url, name, _) in datasets.SVHN.split_list.items():
        if split != "extra":
            savemat(tmp_path / name, {"X": pixels, "y": np.tile(np.arange(1, 11), 2).astype(np.uint8)[:, None]})
            listed[split] = [url, name, help_.md5(tmp_path / name)]
    monkeypatch.setattr(datasets.SVHN, "split_list", listed)
    data = help_.load(tmp_path, dataset_name="SVHN", batch_size=8)
    images, labels = next(iter(data.test.batches()))
    assert np.array_equal(help_.pixels_of(images, data), pixels.transpose(3, 0, 1, 2))
    assert labels.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0] * 2
    assert not data.train.crop and not data.train.flip


@pytest.mark.parametrize(
    ("augment", "crop", "flip"),
    [
        ("auto", False, False),
        ("none", False, False),
        ("crop", True, False),
        ("crop_flip", True, True),
        ("flip", False, True),
    ],
)
def test_augment_option_overrides_the_usual_recipe(augment, crop, flip):
    data = help_.load(dataset_name="Digits", augment=augment)
    assert (data.train.crop, data.train.flip) == (crop, flip)
