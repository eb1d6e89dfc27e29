"""dataset.alternate_flip: flips drawn once per level and image, inverted each epoch; refused where they cannot be."""

import numpy as np
import pytest
import torch

from harness_params import make_config
from tests.data_helpers import load
from utils.data.images import Normalizer
from utils.data.in_memory import MemoryTrainLoader
from utils.errors import ConfigError

N = 600
PLAN = {"batch_size": 64, "drop_last": False, "seed": 3, "rank": 0, "world": 1}


def flips_by_image(level: int, epoch: int, crop: bool = False, **plan) -> torch.Tensor:
    """bool (N,): which images came out mirrored. Each image's brightest side and label tell which it is."""
    images = np.zeros((N, 8, 8, 1), dtype=np.uint8)
    images[:, :, :4] = 200  # left half bright, right half dark; padding is dark too
    normalize = Normalizer((0.0,), (1.0,), (1, 8, 8), torch.device("cpu"))
    loader = MemoryTrainLoader(images, np.arange(N), normalize, crop, True, True, **{**PLAN, **plan})
    flipped = torch.zeros(N, dtype=torch.bool)
    for batch, labels in loader.batches(level, epoch):
        columns = batch.sum(dim=(1, 2))
        flipped[labels] = columns[:, 4:].sum(1) > columns[:, :4].sum(1)
    return flipped


@pytest.mark.parametrize("epoch", [0, 1, 6])
def test_next_epoch_shows_every_image_the_other_way(epoch):
    assert torch.equal(flips_by_image(0, epoch), ~flips_by_image(0, epoch + 1))
    assert torch.equal(flips_by_image(0, epoch), flips_by_image(0, epoch + 2))


def test_first_flips_are_even_and_differ_by_seed_and_level():
    first = flips_by_image(0, 0)
    # A fair coin thrown 600 times: mean 300, deviation 12.2; six deviations is one in 5e8.
    assert abs(int(first.sum()) - N // 2) < 75
    for other in (flips_by_image(1, 0), flips_by_image(0, 0, seed=4)):
        assert abs(int((first ^ other).sum()) - N // 2) < 75


def test_independent_of_shares_and_batch_size():
    whole = flips_by_image(2, 1)
    parts = [flips_by_image(2, 1, rank=rank, world=3) for rank in range(3)]
    assert torch.equal(whole, parts[0] | parts[1] | parts[2])
    assert torch.equal(whole, flips_by_image(2, 1, batch_size=100))


def test_order_of_the_epoch_is_the_same_with_and_without():
    """The option changes flips and nothing else: images come in the same order, from the same crops."""
    on, off = (
        load(seed=5, augment="crop_flip", alternate_flip=value, dataset_name="Digits").train for value in (True, False)
    )
    differing = 0
    for (a, labels_a), (b, labels_b) in zip(on.batches(0, 3), off.batches(0, 3)):
        assert torch.equal(labels_a, labels_b)
        same = (a == b).flatten(1).all(1)
        mirrored = (a == b.flip(3)).flatten(1).all(1)
        assert bool((same | mirrored).all())
        differing += int((~same).sum())
    assert differing > 0


@pytest.mark.parametrize(
    ("dataset", "why"),
    [
        ({"dataset_name": "CIFAR10", "augment": "crop"}, "only with dataset.augment flip or crop_flip"),
        ({"dataset_name": "CIFAR10", "augment": "none"}, "only with dataset.augment flip or crop_flip"),
        ({"dataset_name": "ImageNet"}, "only for images held in memory"),
        ({"dataset_name": "ImageFolder", "loader": "torchvision"}, "only for images held in memory"),
    ],
)
def test_refused_where_it_would_do_nothing(dataset, why):
    with pytest.raises(ConfigError, match=f"dataset.alternate_flip: true is not allowed: {why}"):
        make_config({"dataset": {"alternate_flip": True, **dataset}})


def test_refused_where_the_data_set_is_not_flipped():
    with pytest.raises(ValueError, match=r"dataset.alternate_flip.*auto, which flips no image of Digits"):
        load(dataset_name="Digits", alternate_flip=True)
