"""Allocations against tables worked by hand, naive sorting, and a solution in exact fractions."""

from fractions import Fraction

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st

from utils.conv_type import kept_counts
from utils.pruning.allocation import (
    balanced,
    erk,
    erk_quotas,
    global_top_k,
    global_top_k_alive,
    keep_count,
    round_counts,
    share,
)

# A small network: conv 3->8 (3x3), conv 8->16 (3x3), linear 16->10.
SHAPES = [(8, 3, 3, 3), (16, 8, 3, 3), (10, 16)]
SIZES = [216, 1152, 160]
QUOTAS = [17, 30, 26]  # 8+3+3+3, 16+8+3+3, 10+16


def full_masks(shapes):
    return [torch.ones(shape, dtype=torch.bool) for shape in shapes]


# --- rounding


@pytest.mark.parametrize(
    ("density", "total", "count"),
    [(1.0, 10, 10), (0.5, 5, 3), (0.25, 10, 3), (0.2, 266_200, 53_240), (1e-9, 10, 1), (0.04, 10, 1), (0.16, 10, 2)],
)
def test_keep_count_rounds_half_up_and_keeps_one(density, total, count):
    assert keep_count(density, total) == count


@pytest.mark.parametrize(
    ("density", "start", "total", "rounds", "counts"),
    [
        (0.25, 1.0, 100, 2, [50, 25]),  # densities 0.5 and 0.25
        (0.125, 1.0, 10, 3, [5, 3, 1]),  # prunes int(5.0), int(7.5), and at last keeps floor(1.25 + 0.5)
        (0.1, 1.0, 1000, 2, [317, 100]),  # sqrt(0.1) = 0.3162: prunes int(683.77), where rounding would prune 684
        (0.125, 0.5, 64, 2, [16, 8]),  # from density 1/2 on: densities 1/4 and 1/8
        (0.5, 1.0, 8, 1, [4]),
        (0.9, 1.0, 5, 3, [5, 5, 5]),  # nothing to prune but half a weight: never fewer than the last count
    ],
)
def test_round_counts_by_hand(density, start, total, rounds, counts):
    assert round_counts(density, start, total, rounds) == counts


@given(st.integers(1, 10**6), st.floats(1e-6, 1), st.floats(1e-6, 1), st.integers(1, 100))
def test_round_counts_fall_to_the_number_to_keep(total, one, other, rounds):
    start = max(1, round(max(one, other) * total)) / total
    density = min(one, other, start)
    counts = round_counts(density, start, total, rounds)
    assert len(counts) == rounds and counts[-1] == keep_count(density, total)
    assert counts == sorted(counts, reverse=True) and counts[0] <= max(round(start * total), counts[-1])


# --- exact top-k


def naive_top_k(scores, masks, keep):
    """Sorts every weight still there by (score descending, place ascending): what top-k means, without a threshold."""
    places = [
        (-score, layer, place)
        for layer, (layer_scores, mask) in enumerate(zip(scores, masks))
        for place, (score, kept) in enumerate(zip(layer_scores.flatten().tolist(), mask.flatten().tolist()))
        if kept
    ]
    new = [torch.zeros(mask.numel(), dtype=torch.bool) for mask in masks]
    for _, layer, place in sorted(places)[:keep]:
        new[layer][place] = True
    return [flat.view(mask.shape) for flat, mask in zip(new, masks)]


@st.composite
def scored_layers(draw):
    """Scores with many ties and zeros of both signs, under partly pruned masks, some in channels_last layout."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    levels = draw(st.sampled_from([1, 2, 5, 1000]))
    scores, masks = [], []
    for _ in range(draw(st.integers(1, 4))):
        shape = draw(st.sampled_from([(1,), (3, 4), (2, 3, 2, 2), (4, 1, 3, 3)]))
        score = torch.tensor(rng.integers(-levels, levels + 1, shape), dtype=dtype) / levels
        mask = torch.tensor(rng.random(shape) < draw(st.sampled_from([0.0, 0.5, 1.0])))
        score[~mask] = draw(st.sampled_from([torch.nan, torch.inf, 2.0]))  # must not matter
        if len(shape) == 4 and draw(st.booleans()):
            score, mask = (tensor.to(memory_format=torch.channels_last) for tensor in (score, mask))
        scores.append(score)
        masks.append(mask)
    return scores, masks


@settings(max_examples=150, deadline=None)
@given(scored_layers(), st.data())
def test_global_top_k_is_exact_whatever_the_ties(layers, data):
    scores, masks = layers
    before = [mask.clone() for mask in masks]
    keep = data.draw(st.integers(0, sum(kept_counts(masks))))
    new = global_top_k(scores, masks, keep)
    assert sum(kept_counts(new)) == keep
    assert all(torch.equal(got, wanted) for got, wanted in zip(new, naive_top_k(scores, masks, keep)))
    assert all(torch.equal(mask, old) for mask, old in zip(masks, before))


def test_ties_go_to_the_lowest_flat_index_in_model_order():
    scores = [torch.tensor([[1.0, 3.0], [1.0, 1.0]]), torch.tensor([1.0, 2.0])]
    new = global_top_k(scores, full_masks([(2, 2), (2,)]), 4)
    assert new[0].tolist() == [[True, True], [True, False]]
    assert new[1].tolist() == [False, True]


def test_float64_scores_are_compared_in_float64():
    scores = [torch.tensor([1.0, 1.0 + 1e-12], dtype=torch.float64), torch.tensor([1.0 + 2e-12], dtype=torch.float64)]
    new = global_top_k(scores, full_masks([(2,), (1,)]), 2)
    assert new[0].tolist() == [False, True]
    assert new[1].tolist() == [True]


def test_top_k_refuses_more_than_is_left():
    with pytest.raises(ValueError, match="cannot keep 3 of 2"):
        global_top_k([torch.ones(3)], [torch.tensor([True, False, True])], 3)


def test_alive_keeps_the_last_weight_of_a_dying_layer():
    scores = [torch.tensor([9.0, 8.0, 7.0, 6.0]), torch.tensor([1.0, 2.0]), torch.tensor([5.0])]
    masks = full_masks([(4,), (2,), (1,)])
    masks[2][0] = False  # dead before: stays dead and does not count
    assert [mask.tolist() for mask in global_top_k_alive(scores, masks, 3)] == [
        [True, True, False, False],
        [False, True],
        [False],
    ]
    # Fewer weights than living layers: nothing to guarantee, plain top-k.
    assert kept_counts(global_top_k_alive(scores, masks, 1)) == [1, 0, 0]


@settings(max_examples=100, deadline=None)
@given(scored_layers(), st.data())
def test_alive_is_plain_top_k_but_for_dying_layers(layers, data):
    scores, masks = layers
    keep = data.draw(st.integers(0, sum(kept_counts(masks))))
    plain, alive = global_top_k(scores, masks, keep), global_top_k_alive(scores, masks, keep)
    assert sum(kept_counts(alive)) == keep
    assert not any((new & ~mask).any() for new, mask in zip(alive, masks))
    living = [i for i, count in enumerate(kept_counts(masks)) if count]
    dying = [i for i in living if kept_counts(plain)[i] == 0]
    gained = sum((new & ~old).sum().item() for new, old in zip(alive, plain))
    if keep >= len(living):
        assert all(kept_counts(alive)[i] for i in living)
        assert gained == len(dying)
    else:
        assert gained == 0


# --- shares by hand


def test_erk_quota_is_the_sum_of_the_shape():
    assert erk_quotas(SHAPES) == QUOTAS
    # Depthwise: in_channels / groups is 1. Attention's in_proj is a linear layer from 8 to 24.
    assert erk_quotas([(32, 1, 3, 3), (24, 8)]) == [39, 32]


@pytest.mark.parametrize(
    ("keep", "shares"),
    [
        # e = 153 / 73 = 2.0959: 35.63, 62.88, 54.49
        (153, [36, 63, 54]),
        # e = 764 / 73 = 10.466: 177.9, 314.0, 272.1. The linear layer has 160 only: dense. The others share 604:
        # e = 604 / 47 = 12.851: 218.5, 385.5. The first has 216 only: dense. The second gets 764 - 160 - 216.
        (764, [216, 388, 160]),
        (1528, SIZES),
        (3, [1, 1, 1]),
        (4, [1, 2, 1]),  # the largest quota is the first to reach 1.5
    ],
)
def test_erk_by_hand(keep, shares):
    assert share(QUOTAS, SIZES, keep) == shares
    torch.manual_seed(0)
    new = erk([torch.rand(shape) for shape in SHAPES], full_masks(SHAPES), keep)
    assert kept_counts(new) == shares


@pytest.mark.parametrize(
    ("keep", "shares"),
    [
        (458, [153, 153, 152]),  # 152.67 each: those first in model order are rounded up
        (535, [188, 187, 160]),  # 178.3 each: the linear layer is dense, 375 are shared by two
        (764, [216, 388, 160]),  # 254.7 each: two are dense
        (1528, SIZES),
    ],
)
def test_balanced_by_hand(keep, shares):
    assert share([1, 1, 1], SIZES, keep) == shares
    torch.manual_seed(0)
    new = balanced([torch.rand(shape) for shape in SHAPES], full_masks(SHAPES), keep)
    assert kept_counts(new) == shares


def test_no_layer_is_asked_for_more_than_it_still_has():
    # After other pruning the second layer has 40 weights left and the third is dead.
    assert share(QUOTAS, [216, 40, 0], 153) == [113, 40, 0]
    assert share([1, 1, 1], [216, 40, 0], 153) == [113, 40, 0]


def test_a_layer_keeps_its_largest_scores():
    scores = [torch.tensor([0.1, 0.9, 0.5]), torch.tensor([0.3, 0.2, 0.4])]
    new = balanced(scores, full_masks([(3,), (3,)]), 3)
    assert [mask.tolist() for mask in new] == [[False, True, True], [False, False, True]]


def test_unreachable_shares_are_refused():
    with pytest.raises(ValueError, match="2 weights are fewer than the 3 layers"):
        share(QUOTAS, SIZES, 2)
    with pytest.raises(ValueError, match="cannot keep 1529 of 1528"):
        share(QUOTAS, SIZES, 1529)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 300), st.integers(0, 200)), min_size=1, max_size=8), st.data())
def test_shares_are_exact_bounded_and_monotone(layers, data):
    quotas, room = zip(*layers)
    alive = sum(has > 0 for has in room)
    if alive == 0:
        return
    keep = data.draw(st.integers(alive, sum(room)))
    shares = share(quotas, room, keep)
    assert sum(shares) == keep
    assert all(min(1, has) <= n <= has for n, has in zip(shares, room))
    if keep < sum(room):
        assert all(more >= n for n, more in zip(shares, share(quotas, room, keep + 1)))


# --- ResNet-18 in closed form


def fixpoint_shares(quotas, sizes, keep):
    """The papers' loop in exact fractions: shares in proportion; those above their size dense; the rest again."""
    dense = set()
    while True:
        rest = keep - sum(sizes[i] for i in dense)
        e = Fraction(rest, sum(quota for i, quota in enumerate(quotas) if i not in dense))
        above = {i for i, quota in enumerate(quotas) if i not in dense and e * quota > sizes[i]}
        if not above:
            return [Fraction(size) if i in dense else e * quotas[i] for i, size in enumerate(sizes)]
        dense |= above


@pytest.fixture(scope="module")
def resnet18_shapes():
    model = torchvision.models.resnet18(num_classes=10)
    return [tuple(param.shape) for param in model.parameters() if param.dim() > 1]


@pytest.mark.parametrize("kind", ["erk", "balanced"])
def test_resnet18_shares_are_the_closed_form(resnet18_shapes, kind):
    sizes = [int(np.prod(shape)) for shape in resnet18_shapes]
    quotas = [sum(shape) if kind == "erk" else 1 for shape in resnet18_shapes]
    before = [0] * len(sizes)
    for density in [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.8, 0.9, 0.99, 1.0]:
        keep = keep_count(density, sum(sizes))
        shares, exact = share(quotas, sizes, keep), fixpoint_shares(quotas, sizes, keep)
        assert sum(shares) == keep == sum(exact)
        assert all(n <= size for n, size in zip(shares, sizes))
        assert all(abs(n - real) <= 1 for n, real in zip(shares, exact))
        assert all(n >= less for n, less in zip(shares, before))
        before = shares


def test_resnet18_erk_densities_follow_the_papers_formula(resnet18_shapes):
    # At 5% the smallest shortcut and the classifier are dense; every other layer has density
    # e * (n_in + n_out + k_h + k_w) / (n_in * n_out * k_h * k_w) with one e.
    sizes = [int(np.prod(shape)) for shape in resnet18_shapes]
    shares = share(erk_quotas(resnet18_shapes), sizes, keep_count(0.05, sum(sizes)))
    factors, dense = [], []
    for shape, size, n in zip(resnet18_shapes, sizes, shares):
        if n < size:
            n_out, n_in, k_h, k_w = (*shape, 0, 0)[:4]
            factors.append(n / size * (n_in * n_out * (k_h or 1) * (k_w or 1)) / (n_in + n_out + k_h + k_w))
        else:
            dense.append(shape)
    assert dense == [(128, 64, 1, 1), (10, 512)]
    assert max(factors) / min(factors) == pytest.approx(1, rel=2e-3)
