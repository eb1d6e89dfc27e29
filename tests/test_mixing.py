"""Mixup, CutMix and erasing of whole batches: torchvision's definitions, the same batch however it is split."""

from random import Random

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torchvision.transforms import v2

from harness_params import load_config, make_config
from tests.data_helpers import digit_tree, epoch, load, photo_tree
from tests.recorded_graph import RecordedGraphs
from tests.test_graphs import CPU, assert_equal, make_trainer, study
from tests.traps import KINDS, SHORT, StopAt
from utils.data.images import Normalizer
from utils.data.in_memory import MemoryTrainLoader
from utils.data.mixing import Mixing, boxes, draw_rectangle, draw_rectangles, erase, hard_labels
from utils.errors import ConfigError

HEIGHT, WIDTH, CLASSES = 12, 9, 5
DRAWS = torch.Generator().manual_seed(3)
IMAGES = torch.randn(6, 3, HEIGHT, WIDTH, generator=DRAWS).to(memory_format=torch.channels_last)
LABELS = torch.tensor([0, 1, 2, 3, 4, 0])
PLAN = {"batch_size": 8, "drop_last": False, "seed": 4}


def mixed(mixing: Mixing, step: int) -> tuple:
    drawn = mixing.draw(1, 0, 2, step, HEIGHT, WIDTH)
    images, labels = mixing.mix(IMAGES, LABELS, IMAGES.roll(1, 0), LABELS.roll(1), drawn)
    return images, labels, drawn[:4].tolist(), drawn[4:].view(torch.float64).tolist()


@pytest.mark.parametrize("step", range(8))
def test_mixup_is_torchvisions(step):
    images, labels, box, (own, other, share, _) = mixed(Mixing(0.4, 0, CLASSES), step)
    assert box == [0, 0, 0, 0] and own == share and other == 1 - own
    theirs = v2.MixUp(num_classes=CLASSES)
    params = {"lam": share, "labels": LABELS, "batch_size": 6}
    assert torch.equal(images, theirs.transform(IMAGES, params))
    assert torch.equal(labels, theirs.transform(LABELS, params))
    assert images.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("step", range(8))
def test_cutmix_is_torchvisions(step):
    images, labels, (top, bottom, left, right), weights = mixed(Mixing(0, 1.0, CLASSES), step)
    assert weights[:3] == [1, 0, 1 - (bottom - top) * (right - left) / (HEIGHT * WIDTH)]
    theirs = v2.CutMix(num_classes=CLASSES)
    params = {"box": (left, top, right, bottom), "lam_adjusted": weights[2], "labels": LABELS, "batch_size": 6}
    assert torch.equal(images, theirs.transform(IMAGES, params))
    assert torch.equal(labels, theirs.transform(LABELS, params))


def test_what_is_drawn_has_the_stated_distribution():
    """Beta(0.5, 0.5) has mean 1/2 and variance 1/8; of both kinds each step takes one at random."""
    both = [Mixing(0.5, 1.0, 2).draw(0, 0, 0, step, 32, 32) for step in range(1500)]
    cut = torch.tensor([bool(drawn[4:].view(torch.float64)[1] == 0) for drawn in both])
    assert cut.double().mean().item() == pytest.approx(0.5, abs=0.04)
    shares = torch.stack([drawn[4:].view(torch.float64)[2] for drawn, by_box in zip(both, cut) if not by_box])
    assert (shares.mean().item(), shares.var().item()) == pytest.approx((0.5, 0.125), abs=0.03)
    sizes = torch.stack([drawn[:4] for drawn, by_box in zip(both, cut) if by_box])
    assert sizes.min() == 0 and sizes.max() == 32 and (sizes[:, 1] >= sizes[:, 0]).all()


def test_labels_of_mixed_images_count_by_the_larger_share():
    assert hard_labels(torch.tensor([[0.3, 0.7], [0.5, 0.5], [1.0, 0.0]])).tolist() == [1, 0, 0]
    assert hard_labels(torch.tensor([2, 1])).tolist() == [2, 1]


@pytest.mark.parametrize("image", range(20))
def test_a_rectangle_is_erased_as_torchvision_does(image):
    edges = draw_rectangles(1.0, 20, 0, 0, 0, HEIGHT, WIDTH)[:, image]
    top, bottom, left, right = edges.tolist()
    one = IMAGES[:1].clone()
    expected = v2.functional.erase(one, top, left, bottom - top, right - left, torch.zeros(1, 1, 1))
    assert torch.equal(erase(one, edges.unsqueeze(1)), expected)
    assert 0 <= top < bottom <= HEIGHT and 0 <= left < right <= WIDTH


def test_rectangles_have_the_stated_areas_and_ratios():
    rng = Random(0)
    by_image = torch.tensor([draw_rectangle(0.25, 64, 64, rng) for _ in range(4000)]).t()
    at_once = draw_rectangles(0.25, 4000, 0, 0, 0, 64, 64)
    torch.manual_seed(0)
    theirs = v2.RandomErasing(p=1)
    theirs = [theirs.make_params([torch.zeros(3, 64, 64)]) for _ in range(1000)]
    areas = torch.tensor([params["h"] * params["w"] / 64**2 for params in theirs])
    for top, bottom, left, right in (by_image, at_once):
        found = bottom > top
        assert found.double().mean().item() == pytest.approx(0.25, abs=0.03)
        area = ((bottom - top) * (right - left))[found] / 64**2
        assert area.min() > 0.015 and area.max() < 0.35
        assert area.mean().item() == pytest.approx(areas.mean().item(), abs=0.015)
        assert (top[found] + bottom[found]).double().mean().item() == pytest.approx(64, abs=3)
        assert (left[found] + right[found]).double().mean().item() == pytest.approx(64, abs=3)


# --- in memory -------------------------------------------------------------------------------------------------------


def loader(rank: int = 0, world: int = 1, **options) -> MemoryTrainLoader:
    images = np.random.default_rng(0).integers(0, 256, (22, 8, 8, 3), dtype=np.uint8)
    normalize = Normalizer((0.5,) * 3, (0.25,) * 3, (3, 8, 8), CPU)
    return MemoryTrainLoader(
        images, np.arange(22) % 5, normalize, True, True, **options, **PLAN, rank=rank, world=world
    )


ALL = {"erasing": 0.5, "mixing": Mixing(0.8, 1.0, 5)}


@pytest.mark.parametrize("world", [2, 3])
def test_a_mixed_batch_is_the_same_however_it_is_split(world):
    whole = list(loader(**ALL).batches(1, 2))
    ranks = [list(loader(rank, world, **ALL).batches(1, 2)) for rank in range(world)]
    for step, batch in enumerate(whole):
        parts = [torch.cat([rank[step][part] for rank in ranks]) for part in (0, 1)]
        assert torch.equal(parts[0], batch[0]) and torch.equal(parts[1], batch[1])


def test_a_resumed_epoch_has_the_same_batches_and_no_two_epochs_do():
    one = loader(**ALL)
    epochs = [list(one.batches(0, epoch)) for epoch in range(2)]
    for step in range(3):
        assert torch.equal(next(one.batches(0, 1, step))[0], epochs[1][step][0])
    assert not any(torch.equal(first[1], second[1]) for first, second in zip(*epochs))


def test_mixing_changes_no_other_draw_and_scores_are_of_unmixed_images():
    plain, with_all = loader(), loader(**ALL)
    assert torch.equal(plain.draws(0, 0), with_all.draws(0, 0)[:3])
    mixed_only = loader(mixing=ALL["mixing"])
    (images, labels), (unmixed, expected) = mixed_only.score_batches(0, 1)[0], plain.score_batches(0, 1)[0]
    assert torch.equal(images, unmixed) and torch.equal(labels, expected)
    assert not torch.equal(next(mixed_only.batches(0, 0))[0], unmixed)


@pytest.mark.parametrize("options", [{}, {"erasing": 0.5}, {"mixing": Mixing(0.8, 0, 5)}, ALL])
def test_the_shape_of_the_draws_is_known_before(options):
    assert loader(**options).draws_shape == loader(**options).draws(0, 0).shape


def test_an_erased_image_is_zero_in_its_rectangle():
    plain, erased = next(loader().batches(0, 0))[0], next(loader(erasing=1.0).batches(0, 0))[0]
    inside = boxes(loader(erasing=1.0).draws(0, 0)[3:7, :8], 8, 8).expand_as(erased)
    assert (erased[inside] == 0).all() and torch.equal(erased[~inside], plain[~inside]) and inside.any()


# --- training --------------------------------------------------------------------------------------------------------


def augmented(kind):
    return make_trainer(kind, {"optimizer": {"label_smoothing": 0.1}, "loader": ALL})


def test_a_study_by_graphs_has_the_bits_of_one_without():
    assert_equal(study(augmented(RecordedGraphs), "wr"), study(augmented(None), "wr"))


def test_the_loss_is_that_of_torch_for_probabilities():
    one = augmented(None)
    one.model.train()
    images, labels = next(one.data.train.batches(0, 0))
    before = {name: tensor.clone() for name, tensor in one.model.state_dict().items()}
    loss, logits = one._step((images, labels))
    smooth = labels * 0.9 + 0.1 / 5
    assert loss.item() == pytest.approx(-(smooth * F.log_softmax(logits, 1)).sum(1).mean().item(), rel=1e-6)
    assert any(not torch.equal(before[name], tensor) for name, tensor in one.model.state_dict().items())


MIXED = {"dataset.mixup": 0.8, "dataset.cutmix": 1.0, "dataset.random_erasing": 0.25, **SHORT, **KINDS["lrr"]}


def test_a_run_stopped_within_an_epoch_goes_on_bit_for_bit(fork):
    whole = fork("whole", **MIXED)
    fork("stopped", status=143, trap=StopAt(2), **MIXED)
    fork("stopped", resume=True, **MIXED).assert_same_figures(whole)
    single = fork("plain", **{**MIXED, "dataset.mixup": 0, "dataset.cutmix": 0, "dataset.random_erasing": 0})
    assert (
        whole.csv("epochwise_metrics/level_0_metrics")["train_loss"][0]
        > (single.csv("epochwise_metrics/level_0_metrics")["train_loss"][0])
    )


def test_augmentation_that_a_loader_lacks_is_refused():
    with pytest.raises(ConfigError) as caught:
        make_config({"dataset": {"loader": "ffcv", "dataset_name": "ImageNet", "mixup": 1, "random_erasing": 0.1}})
    assert [fault.partition(":")[0] for fault in caught.value.faults] == ["dataset.mixup", "dataset.random_erasing"]
    for words in (["--dataset.randaugment=9"], ["--dataset.dataset_name=CIFAR10", "--dataset.randaugment=9"]):
        with pytest.raises(ConfigError, match=r"dataset\.randaugment: 9 .* 0 unless the torchvision loader"):
            load_config(words)


def test_randaugment_is_refused_for_small_images_in_memory(fork, tmp_path):
    tree = {"dataset.dataset_name": "ImageFolder", "dataset.data_root": digit_tree(tmp_path / "tree")}
    done = fork("small", status=2, **tree, **{"dataset.randaugment": 9})
    assert "dataset.randaugment: 9 is not allowed: these images are held in memory" in done.err


# --- torchvision's loader --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return photo_tree(tmp_path_factory.mktemp("photos"))


def by_workers(root, rank: int = 0, world: int = 1, **options):
    options = {"dataset_name": "ImageFolder", "loader": "torchvision", "batch_size": 6, "num_workers": 0, **options}
    return load(root, rank, world, **options)


def test_workers_images_are_mixed_the_same_however_they_are_split(photos):
    options = {"mixup": 0.8, "cutmix": 1.0, "random_erasing": 0.5, "randaugment": 9}
    whole, _ = epoch(by_workers(photos, **options)), torch.manual_seed(5)
    data = [by_workers(photos, rank, 2, **options) for rank in range(2)]
    ranks = [list(one.train.batches(0, 0)) for one in data]
    split = [torch.cat([rank[step][part] for step in range(len(ranks[0])) for rank in ranks]) for part in (0, 1)]
    assert torch.equal(whole[0], split[0]) and torch.equal(whole[1], split[1])
    assert whole[1].shape == (len(whole[0]), data[0].num_classes) and hard_labels(whole[1]).unique().numel() > 1
    first = data[0].train.score_batches(0, 1)[0][1]
    assert first.dtype == torch.int64


def test_randaugment_changes_images_and_leaves_the_global_generator_alone(photos):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    found = epoch(by_workers(photos, randaugment=9, augment="none"))[0]
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(found, epoch(by_workers(photos, randaugment=9, augment="none"))[0])
    plain = epoch(by_workers(photos, augment="none"))[0]
    assert 0.3 < (found != plain).flatten(1).any(1).double().mean().item() <= 1


def test_workers_erase_after_normalisation(photos):
    erased = epoch(by_workers(photos, random_erasing=1.0, augment="none"))[0]
    plain = epoch(by_workers(photos, augment="none"))[0]
    changed = (erased != plain).any(1)
    assert changed.flatten(1).any(1).all()
    assert (erased.permute(0, 2, 3, 1)[changed] == 0).all()
