"""Each criterion's own properties: what it scores, and that nothing but that matters."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from tests.pruning_helpers import assert_untouched, batches_for, masks_of, numbers, small, snapshot
from utils.conv_type import insert_masks, masked_params
from utils.pruning import scores
from utils.pruning.allocation import keep_count
from utils.pruning.scores import Inputs, scoring, synflow_scores
from utils.pruning_utils import CRITERIA, dead_layers, prune

METHODS = sorted(CRITERIA)


def test_mag_keeps_the_largest_weights():
    model = small()
    before = torch.cat([param.detach().abs().flatten() for _, param, _ in masked_params(model)])
    prune(model, "mag", 0.3)
    mask = torch.cat([mask.flatten() for mask in masks_of(model)])
    assert before[mask].min() >= before[~mask].max()


@pytest.mark.parametrize("method", ["random", "random_erk", "random_balanced"])
def test_random_masks_follow_the_generator_alone(method):
    def masks(seed, model_seed):
        model = small(seed=model_seed)
        prune(model, method, 0.3, generator=torch.Generator().manual_seed(seed))
        return torch.cat([mask.flatten() for mask in masks_of(model)])

    assert torch.equal(masks(1, 0), masks(1, 1))
    assert not torch.equal(masks(1, 0), masks(2, 0))


def test_random_masks_are_independent_of_an_initialisation_with_the_same_seed():
    torch.manual_seed(7)
    model = insert_masks(nn.Linear(200, 200, bias=False))  # its weights are the first draws of seed 7, and uniform
    weights = model.weight.detach().clone()
    prune(model, "random", 0.5, generator=torch.Generator().manual_seed(7))
    kept, gone = weights[model.weight_mask], weights[~model.weight_mask]
    assert abs(kept.mean() - gone.mean()) < 0.05 * weights.std()


def test_random_without_a_generator_follows_the_seed_and_does_not_draw_from_the_global_one():
    def masks(seed):
        model = small()
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        prune(model, "random", 0.3)
        assert torch.equal(torch.get_rng_state(), state)
        return torch.cat([mask.flatten() for mask in masks_of(model)])

    assert torch.equal(masks(1), masks(1))
    assert not torch.equal(masks(1), masks(2))


def test_er_methods_are_the_same_allocations():
    for name in ("erk", "balanced"):
        models = small(), small()
        for model, method in zip(models, (f"er_{name}", f"random_{name}")):
            prune(model, method, 0.3, generator=torch.Generator().manual_seed(1))
        assert all(torch.equal(a, b) for a, b in zip(*map(masks_of, models)))


def test_random_survival_is_uniform():
    torch.manual_seed(0)
    hits = torch.zeros(1000)
    for seed in range(200):
        model = insert_masks(nn.Linear(10, 100))
        prune(model, "random", 0.2, generator=torch.Generator().manual_seed(seed))
        hits += model.weight_mask.flatten()
    # Binomial(200, 0.2): mean 40, deviation 5.66.
    assert hits.mean() == pytest.approx(40)
    assert abs(hits.std() - 5.66) < 0.5
    assert hits.min() > 12 and hits.max() < 68


@pytest.mark.parametrize("method", ["snip", "grasp"])
def test_scoring_batches_one_by_one_is_scoring_them_as_one(method):
    """Sums over equal batches: mean losses of two halves are, up to a factor, the mean loss of the whole."""
    halves = batches_for(small().double())
    whole = [tuple(torch.cat(parts) for parts in zip(*halves))]
    models = small().double(), small().double()
    for model, batches in zip(models, (halves, whole)):
        prune(model, method, 0.2, batches)
    assert all(torch.equal(a, b) for a, b in zip(*map(masks_of, models)))


@pytest.mark.parametrize("method", ["snip", "grasp"])
def test_a_large_batch_is_scored_in_parts(method, monkeypatch):
    """Which bounds the memory, and gives the masks of the whole; parts of unequal size weigh by their images."""
    (images, labels), *_ = batches_for(small().double())
    models, seen = [small().double(), small().double()], []
    for model, most in zip(models, (len(images), len(images) // 2 + 1)):
        monkeypatch.setattr(scores, "SCORE_IMAGES", most)
        model.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
        prune(model, method, 0.2, [(images, labels)])
    assert max(seen) == len(images) and min(seen) < len(images) / 2
    assert all(torch.equal(a, b) for a, b in zip(*map(masks_of, models)))


@pytest.mark.parametrize("method", ["snip", "grasp"])
def test_batch_norm_without_statistics_sees_the_whole_batch(method, monkeypatch):
    def masks(most: int) -> torch.Tensor:
        monkeypatch.setattr(scores, "SCORE_IMAGES", most)
        torch.manual_seed(0)
        norm = nn.BatchNorm2d(6, track_running_stats=False)
        model = insert_masks(nn.Sequential(nn.Conv2d(2, 6, 3), norm, nn.ReLU(), nn.Flatten(), nn.Linear(24, 3)))
        (images, labels), *_ = batches_for(model.double())
        prune(model, method, 0.3, [(images, labels)])
        return torch.cat([mask.flatten() for mask in masks_of(model)])

    assert torch.equal(masks(2), masks(1000))


@pytest.mark.parametrize("method", ["snip", "grasp"])
def test_batch_norm_uses_its_running_statistics(method):
    """The statistics of the scoring batch do not matter, the model's do."""

    def masks(mean):
        torch.manual_seed(0)
        model = insert_masks(nn.Sequential(nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.Flatten(), nn.Linear(24, 3)))
        model[1].running_mean.fill_(mean)
        assert model.training
        prune(model, method, 0.3, batches_for(model))
        assert model.training and model[1].num_batches_tracked == 0
        return torch.cat([mask.flatten() for mask in masks_of(model)])

    assert not torch.equal(masks(0.0), masks(3.0))  # in train mode the mean would be subtracted again


def test_float64_scores_of_a_float32_model_are_those_of_a_float64_model():
    for method in ("snip", "grasp"):
        model, wide = small(), small().double()
        prune(model, method, 0.2, batches_for(model), dtype=torch.float64)
        prune(wide, method, 0.2, batches_for(wide))
        assert next(model.parameters()).dtype == torch.float32
        assert all(torch.equal(a, b) for a, b in zip(masks_of(model), masks_of(wide)))


def test_bfloat16_weights_are_scored_in_float32():
    for method in METHODS:
        model = small().bfloat16()
        prune(model, method, 0.2, [(x.float(), y) for x, y in batches_for(model)], rounds=3)
        assert numbers(model)[0] == keep_count(0.2, numbers(model)[1])
        assert next(model.parameters()).dtype == torch.bfloat16


# --- synflow


def synflow_layer_sums(model, shape):
    with scoring(model):
        scores = synflow_scores(model, masks_of(model), Inputs([(torch.zeros(1, *shape), None)]))
    return [score.sum().item() for score in scores]


def test_synflow_conserves_the_flow():
    """Tanaka et al. 2020, theorem 2: without biases every layer's scores sum to the same, R, at any sparsity."""
    model = small()
    for wanted in (1.0, 0.3, 0.05):
        prune(model, "synflow", wanted, batches_for(model))
        sums = synflow_layer_sums(model, (2, 4, 4))
        assert min(sums) > 0
        assert max(sums) / min(sums) == pytest.approx(1, rel=1e-12)


def test_synflow_conserves_the_flow_through_relu6_and_an_all_zero_classifier():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 40, 3, padding=1, bias=False), nn.ReLU6(), nn.Conv2d(40, 20, 4, bias=False), nn.ReLU6(inplace=True)
    ).append(nn.Flatten())
    model.append(nn.Linear(20, 3, bias=False))
    with torch.no_grad():
        model[0].weight.mul_(100)  # far above 6
        model[5].weight.zero_()
    insert_masks(model)
    sums = synflow_layer_sums(model, (2, 4, 4))
    assert min(sums) > 0
    assert max(sums) / min(sums) == pytest.approx(1, rel=1e-12)
    prune(model, "synflow", 0.01, batches_for(model))
    assert not dead_layers(model)
    assert (model[5].weight == 0).all()


def test_synflow_keeps_every_layer_alive_where_one_shot_magnitude_does_not():
    for seed in range(3):
        model, one_shot = small(seed=seed), small(seed=seed)
        for net in (model, one_shot):
            with torch.no_grad():
                net[5].weight.mul_(1e-3)
        total = numbers(model)[1]
        prune(model, "synflow", 6 / total, batches_for(model))
        prune(one_shot, "mag", 6 / total)
        assert dead_layers(one_shot)
        assert not dead_layers(model)
        assert min(synflow_layer_sums(model, (2, 4, 4))) > 0, "no path is left"


def test_synflow_rounds_follow_the_schedule(monkeypatch):
    """Round i prunes to d0 * (d / d0)^(i / n): counted where the allocation is called, from density 1 and from 1/2."""
    asked = []
    real = CRITERIA["synflow"]

    def watched(scores, masks, keep):
        asked.append(keep)
        return real.allocate(scores, masks, keep)

    monkeypatch.setitem(CRITERIA, "synflow", replace(real, allocate=watched))
    model = insert_masks(nn.Sequential(nn.Flatten(), nn.Linear(32, 64), nn.Linear(64, 32)))  # 4096 weights
    prune(model, "synflow", 0.5, batches_for(model), rounds=1)
    prune(model, "synflow", 0.5 / 16, batches_for(model), rounds=4)
    assert asked == [2048, 1024, 512, 256, 128]
    asked.clear()
    prune(model, "synflow", 1 / 4096, batches_for(model))
    assert len(asked) <= 100 and asked[-1] == 1 and asked == sorted(asked, reverse=True)


def test_synflow_does_not_look_at_the_images():
    models = small(), small()
    for model, scale in zip(models, (0.0, math.nan)):
        prune(model, "synflow", 0.2, [(images * scale, labels) for images, labels in batches_for(model)])
    assert all(torch.equal(a, b) for a, b in zip(*map(masks_of, models)))


def test_synflow_in_float64_survives_a_flow_beyond_float32():
    torch.manual_seed(0)
    model = insert_masks(nn.Sequential(nn.Flatten(), *(nn.Linear(32, 32, bias=False) for _ in range(20))))
    with torch.no_grad():
        for _, param, _ in masked_params(model):
            param.mul_(100)
    prune(model, "synflow", 0.05, batches_for(model))
    assert not dead_layers(model)


# --- a loader that draws, autocast, no_grad, compiled


@pytest.mark.parametrize("method", ["snip", "grasp", "synflow"])
def test_a_data_loader_does_not_move_the_global_random_state(method):
    model = small()
    images, labels = (torch.cat(parts) for parts in zip(*batches_for(model)))
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, labels), batch_size=3)
    before = snapshot(model)
    prune(model, method, 0.4, loader)
    assert_untouched(model, before)


@pytest.mark.parametrize("method", ["snip", "grasp", "synflow"])
def test_surroundings_do_not_matter(method):
    """Called under no_grad and autocast, on a model compiled in place: the masks of a plain call."""
    plain, model = small(), small()
    prune(plain, method, 0.2, batches_for(plain))
    model.compile()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        prune(model, method, 0.2, batches_for(model))
    assert all(torch.equal(a, b) for a, b in zip(masks_of(plain), masks_of(model)))
