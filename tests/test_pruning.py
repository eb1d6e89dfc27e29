"""prune(): the invariants of every method over random small networks, and each criterion's own properties."""

import logging
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from utils.allocation import keep_count, kept_counts
from utils.conv_type import density, insert_masks, masked_params
from utils.pruning_utils import CRITERIA, dead_layers, prune

METHODS = sorted(CRITERIA)
PER_LAYER = ["er_balanced", "er_erk", "random_balanced", "random_erk"]
GLOBAL = [method for method in METHODS if method not in PER_LAYER]


def masks_of(model):
    return [mask for _, _, mask in masked_params(model)]


def numbers(model):
    masks = masks_of(model)
    return sum(kept_counts(masks)), sum(mask.numel() for mask in masks)


# --- random small networks


class Attention(nn.Module):
    """Self-attention over the pixels of an image, as a residual branch."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.attention = nn.MultiheadAttention(channels, 1, batch_first=True)

    def forward(self, x):
        tokens = self.norm(x.flatten(2).transpose(1, 2))
        tokens = tokens + self.attention(tokens, tokens, tokens, need_weights=False)[0]
        return tokens.transpose(1, 2).reshape(x.shape)


class Twice(nn.Module):
    """The same layer in two places: one weight, two names."""

    def __init__(self, channels: int):
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 1)
        self.second = self.first

    def forward(self, x):
        return self.second(torch.relu(self.first(x)))


class Tied(nn.Module):
    """Two layers with one weight and biases of their own."""

    def __init__(self, channels: int):
        super().__init__()
        self.one, self.two = nn.Conv2d(channels, channels, 1), nn.Conv2d(channels, channels, 1)
        self.two.weight = self.one.weight

    def forward(self, x):
        return self.two(torch.relu(self.one(x)))


@st.composite
def networks(draw) -> Callable[[], nn.Module]:
    """A recipe for a network of up to six masked layers and a few hundred weights: the same one at each call."""
    seed = draw(st.integers(0, 1000))
    choices = ["conv", "depthwise", "grouped", "attention", "twice", "tied", "one"]
    kinds = draw(st.lists(st.sampled_from(choices), min_size=1, max_size=4))
    widths = [draw(st.sampled_from([2, 4])) for _ in kinds]
    zeros = draw(st.sampled_from(["none", "none", "some", "a layer", "all equal", "all"]))

    def build() -> nn.Module:
        torch.manual_seed(seed)
        layers, channels = [], 2
        for kind, width in zip(kinds, widths):
            if kind == "one":  # a layer of a single weight, on the mean over channels
                layers += [MeanChannel(), nn.Conv2d(1, 1, 1), Widen(channels)]
            elif kind == "attention":
                layers.append(Attention(channels))
            elif kind in ("twice", "tied"):
                layers.append(Twice(channels) if kind == "twice" else Tied(channels))
            elif kind == "depthwise":
                layers += [nn.Conv2d(channels, channels, 3, padding=1, groups=channels), nn.ReLU()]
            elif kind == "grouped":
                layers += [nn.Conv2d(channels, 2 * width, 1, groups=2, bias=False), nn.BatchNorm2d(2 * width)]
                channels = 2 * width
            else:
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
                channels = width
        model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.5), nn.Linear(channels, 3))
        with torch.no_grad():
            weights = [param for param in model.parameters() if param.dim() > 1]
            if zeros == "some":
                for weight in weights:
                    weight.mul_(torch.rand_like(weight) < 0.5)
            elif zeros == "a layer":
                weights[seed % len(weights)].zero_()
            elif zeros != "none":
                for weight in weights:
                    weight.fill_(0.1 if zeros == "all equal" else 0.0)
        return insert_masks(model)

    return build


class MeanChannel(nn.Module):
    def forward(self, x):
        return x.mean(1, keepdim=True)


class Widen(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.channels = channels

    def forward(self, x):
        return x.expand(-1, self.channels, -1, -1)


def batches_for(model, count=2):
    draws = torch.Generator().manual_seed(5)
    dtype = next(model.parameters()).dtype
    return [
        (torch.randn(3, 2, 4, 4, generator=draws).to(dtype), torch.randint(3, (3,), generator=draws))
        for _ in range(count)
    ]


def snapshot(model):
    """Everything that scoring may not change, apart from pruned weights and masks."""
    return {
        "state": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "modes": [module.training for module in model.modules()],
        "grads": [None if param.grad is None else param.grad.clone() for param in model.parameters()],
        "tensors": [(id(param), param.data_ptr(), param.requires_grad) for param in model.parameters()],
        "rng": torch.get_rng_state(),
    }


def assert_untouched(model, before, pruned=True):
    after = snapshot(model)
    assert after["modes"] == before["modes"]
    assert after["tensors"] == before["tensors"]
    assert torch.equal(after["rng"], before["rng"])
    for now, then in zip(after["grads"], before["grads"]):
        assert (now is None) == (then is None)
        assert now is None or torch.equal(now, then)
    expected = dict(before["state"])
    if pruned:
        for name, _, mask in masked_params(model):
            expected[name] = expected[name] * mask
    for name, tensor in after["state"].items():
        shared = ".second." in name or ".two." in name  # a weight's second name is masked by the mask at its first
        if not (pruned and (shared or name.endswith("_mask"))):
            assert torch.equal(tensor, expected[name]), name


quick = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@quick
@given(networks(), st.sampled_from(METHODS), st.lists(st.floats(0.0, 1.0), min_size=1, max_size=3))
def test_invariants_over_levels(build, method, shares):
    """Exact counts, masks that only lose ones, weights that are masked, nothing else changed, at every level."""
    model = build()
    kept, total = numbers(model)
    for module in list(model.modules())[::2]:
        module.eval()  # a mixture of modes, to be put back
    F.cross_entropy(model(batches_for(model)[0][0]), batches_for(model)[0][1]).backward()
    layers = len(masks_of(model))
    for share in shares:
        lowest = layers if method in PER_LAYER else 1
        keep = max(lowest, round(share * kept))
        if keep > kept:
            return
        before, masks = snapshot(model), [mask.clone() for mask in masks_of(model)]
        places = [mask.data_ptr() for mask in masks_of(model)]
        achieved = prune(model, method, keep / total, batches_for(model), torch.Generator().manual_seed(3), rounds=4)
        kept, _ = numbers(model)
        assert kept == keep
        assert achieved == keep / total == density(model)
        assert not any((new & ~old).any() for new, old in zip(masks_of(model), masks))
        assert [mask.data_ptr() for mask in masks_of(model)] == places, "masks must change in place"
        assert all((param[~mask] == 0).all() for _, param, mask in masked_params(model))
        assert_untouched(model, before)


@quick
@given(networks(), st.sampled_from(METHODS), st.floats(0.0, 1.0, exclude_min=True))
def test_any_density(build, method, wanted):
    """|kept - round(density * N)| = 0 at any density; per-layer methods refuse fewer weights than layers."""
    model = build()
    _, total = numbers(model)
    if method in PER_LAYER and keep_count(wanted, total) < len(masks_of(model)):
        with pytest.raises(ValueError, match="fewer than the"):
            prune(model, method, wanted)
        assert numbers(model)[0] == total
        return
    prune(model, method, wanted, batches_for(model), rounds=3)
    assert numbers(model)[0] == max(1, math.floor(wanted * total + 0.5))


@quick
@given(networks(), st.sampled_from(METHODS))
def test_density_one_keeps_everything(build, method):
    model = build()
    before = snapshot(model)
    assert prune(model, method, 1.0, batches_for(model)) == 1.0
    assert all(mask.all() for mask in masks_of(model))
    assert_untouched(model, before)


@quick
@given(networks(), st.sampled_from(GLOBAL))
def test_down_to_a_single_weight(build, method):
    model = build()
    _, total = numbers(model)
    prune(model, method, 1 / total, batches_for(model), rounds=3)
    assert numbers(model)[0] == 1


@quick
@given(networks(), st.sampled_from(PER_LAYER))
def test_per_layer_down_to_a_weight_a_layer(build, method):
    model = build()
    _, total = numbers(model)
    prune(model, method, len(masks_of(model)) / total)
    assert kept_counts(masks_of(model)) == [1] * len(masks_of(model))


@quick
@given(networks(), st.sampled_from(["grasp", "mag", "snip", "synflow"]))
def test_what_raises_changes_nothing(build, method):
    """A NaN in a weight, a batch that fails half-way, no batch at all: everything is as it was."""
    model = build()
    _, total = numbers(model)
    keep = (total - 1) / total
    if method != "mag":
        before = snapshot(model)
        with pytest.raises(ValueError, match=f"{method} .*no \\(images, labels\\)"):
            prune(model, method, keep, [])
        assert_untouched(model, before, pruned=False)
    if method in ("snip", "grasp"):
        good, (images, labels) = batches_for(model)
        before = snapshot(model)
        with pytest.raises((IndexError, RuntimeError)):
            prune(model, method, keep, [good, (images, labels + 100), good])
        assert_untouched(model, before, pruned=False)
    name, param, _ = list(masked_params(model))[-1]
    param.data.view(-1)[0] = torch.inf
    before = snapshot(model)
    with pytest.raises(ValueError, match=f"{method} to density .*not finite in ") as caught:
        prune(model, method, keep, batches_for(model))
    assert name in str(caught.value) or method != "mag"
    assert_untouched(model, before, pruned=False)


# --- arguments


def small(bias=False, seed=0):
    torch.manual_seed(seed)
    return insert_masks(
        nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1, bias=bias),
            nn.ReLU(),
            nn.Conv2d(4, 6, 3, bias=bias),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(24, 8, bias=bias),
            nn.ReLU(),
            nn.Linear(8, 3, bias=bias),
        )
    )


def test_every_method_of_the_contract_is_there():
    assert set(CRITERIA) == {
        *("mag", "snip", "grasp", "synflow", "random", "random_erk", "random_balanced", "er_erk", "er_balanced")
    }


def test_unknown_method_lists_the_choices_nearest_first():
    with pytest.raises(ValueError, match=r"'synflw' is not allowed: choose from synflow, .*mag"):
        prune(small(), "synflw", 0.5)


@pytest.mark.parametrize("wanted", [0.0, -0.1, 1.01, math.nan, math.inf])
def test_density_outside_0_1_is_refused(wanted):
    with pytest.raises(ValueError, match=r"mag to density .* above 0 and at most 1"):
        prune(small(), "mag", wanted)


@pytest.mark.parametrize("method", METHODS)
def test_pruned_weights_never_come_back(method):
    model = small()
    prune(model, "mag", 0.25)
    before = snapshot(model)
    with pytest.raises(ValueError, match=rf"{method} to density 0.5: .*density 0\.25.*never come back"):
        prune(model, method, 0.5, batches_for(model))
    assert_untouched(model, before, pruned=False)


@pytest.mark.parametrize("method", ["snip", "grasp", "synflow"])
def test_missing_batches_are_refused_by_name(method):
    with pytest.raises(ValueError, match=f"{method} needs batches"):
        prune(small(), method, 0.5)


def test_grasp_refuses_batches_that_can_be_read_only_once():
    model = small()
    with pytest.raises(ValueError, match="read only once"):
        prune(model, "grasp", 0.5, iter(batches_for(model)))


def test_other_refusals():
    with pytest.raises(ValueError, match="no masks"):
        prune(nn.Linear(2, 2), "mag", 0.5)
    with pytest.raises(ValueError, match="synflow_rounds: 0"):
        prune(small(), "synflow", 0.5, batches_for(small()), rounds=0)
    with pytest.raises(ValueError, match=r"score_dtype: torch\.float16"):
        prune(small(), "snip", 0.5, batches_for(small()), dtype=torch.float16)
    with pytest.raises(ValueError, match=r"random_erk to density 0\.001: 1 weights are fewer than the 4 layers"):
        prune(small(), "random_erk", 0.001)


# --- methods in combination


@pytest.mark.parametrize("first", METHODS)
@pytest.mark.parametrize("then", METHODS)
def test_any_method_after_any_other(first, then):
    """At initialization, then level after level from the density that was left: no level changes nothing."""
    model = small(bias=True)
    left, total = prune(model, first, 0.6, batches_for(model), rounds=3), numbers(model)[1]
    for level in range(1, 4):
        before = [mask.clone() for mask in masks_of(model)]
        wanted = left * 0.7**level
        assert abs(prune(model, then, wanted, batches_for(model), rounds=3) - wanted) <= 0.5 / total
        assert not any((new & ~old).any() for new, old in zip(masks_of(model), before))
        assert any((new != old).any() for new, old in zip(masks_of(model), before))


def test_erk_after_magnitude_takes_what_a_layer_has_left():
    model = small()
    prune(model, "mag", 0.2)
    room = kept_counts(masks_of(model))
    prune(model, "random_erk", 0.15)
    counts = kept_counts(masks_of(model))
    assert sum(counts) == keep_count(0.15, numbers(model)[1])
    assert all(count <= has for count, has in zip(counts, room))


def test_excluded_layers_stay_dense():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    dense = model[2].weight.clone()
    insert_masks(model, exclude=["2"])
    assert prune(model, "mag", 0.25) == 0.25
    assert torch.equal(model[2].weight, dense)
    assert model[0].weight.count_nonzero() == 16


def test_dead_layers_are_named_in_the_log(caplog):
    model = small()
    with torch.no_grad():
        model[2].weight.mul_(1e-6)
    with caplog.at_level(logging.WARNING):
        prune(model, "mag", 0.1)
    assert dead_layers(model) == ["2.weight"]
    assert "dead network" in caplog.text
    assert "2.weight" in caplog.text


def test_ties_at_zero_are_reported(caplog):
    model = small()
    with torch.no_grad():
        model[7].weight.zero_()  # no gradient passes
    with caplog.at_level(logging.WARNING):
        prune(model, "snip", 0.1, batches_for(model))
    assert "have score 0" in caplog.text


# --- criteria


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
    from utils.scores import Inputs, scoring, synflow_scores

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
    from dataclasses import replace

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
