"""prune(): the invariants of every method over random small networks, its arguments and refusals."""

import logging
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from tests.pruning_helpers import assert_untouched, batches_for, masks_of, networks, numbers, small, snapshot
from utils.conv_type import density, insert_masks, kept_counts, masked_params
from utils.pruning.allocation import keep_count
from utils.pruning_utils import CRITERIA, dead_layers, prune

METHODS = sorted(CRITERIA)
PER_LAYER = ["er_balanced", "er_erk", "random_balanced", "random_erk"]
GLOBAL = [method for method in METHODS if method not in PER_LAYER]

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
