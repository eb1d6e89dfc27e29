"""prune_params.scope layer: every layer pruned at its own rate, in exact numbers."""

import math

import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from harness_params import load_config, make_config
from tests.pruning_helpers import masks_of
from utils.conv_type import insert_masks, kept_counts, masked_params, matches
from utils.errors import ConfigError
from utils.models import create_model
from utils.pruning.allocation import layer_counts
from utils.pruning.methods import layer_wise
from utils.pruning_utils import prune
from utils.runs.pruning import layer_rates

LENET = [235_200, 30_000, 1_000]  # 784x300, 300x100, 100x10
PAPER = {"prune_params.scope": "layer", "prune_params.layer_rates": "[fc3:0.1]", "prune_params.prune_rate": 0.2}


def lenet(**prune_params):
    cfg = make_config({"prune_params": {"scope": "layer", "prune_rate": 0.2, **prune_params}})
    return cfg, insert_masks(create_model("lenet_300_100", 10, (1, 28, 28)))


# -- numbers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("level", "counts", "percent"),  # percent of all weights: as Frankle & Carbin 2019 print it
    [
        (0, [235_200, 30_000, 1_000], 100.0),
        (1, [188_160, 24_000, 900], 80.0),
        (3, [120_422, 15_360, 729], 51.3),  # 0.8^3 = 0.512 and 0.9^3 = 0.729
        (7, [49_325, 6_291, 478], 21.1),  # 0.2097152 and 0.4782969
        (9, [31_568, 4_027, 387], 13.5),
        (15, [8_275, 1_056, 206], 3.6),
        (20, [2_712, 346, 122], 1.2),
    ],
)
def test_lenet_by_hand(level, counts, percent):
    found = layer_counts([0.2, 0.2, 0.1], LENET, LENET, level, dense=True)
    assert found == counts
    assert round(100 * sum(found) / sum(LENET), 1) == percent


def test_from_a_sparse_start_each_level_takes_its_rate_of_what_is_left():
    assert layer_counts([0.5, 0.1, 0.2], [100, 100, 100], [7, 10, 0], 4, dense=False) == [4, 9, 0]


@given(
    st.lists(st.tuples(st.floats(0, 0.99), st.integers(1, 10**6)), min_size=1, max_size=5),
    st.integers(1, 12),
    st.booleans(),
)
def test_counts_fall_from_level_to_level_and_never_to_zero(layers, levels, dense):
    rates, totals = [rate for rate, _ in layers], [total for _, total in layers]
    left = totals if dense else [math.ceil(total / 2) for total in totals]
    for level in range(1, levels + 1):
        counts = layer_counts(rates, totals, left, level, dense)
        assert all(1 <= now <= was for now, was in zip(counts, left))
        if dense:
            assert all(abs(now - total * (1 - rate) ** level) <= 1 for now, total, rate in zip(counts, totals, rates))
        left = counts


# -- which rate --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entries", "rates"),
    [
        ([], [0.2, 0.2, 0.2]),
        (["fc3:0.1"], [0.2, 0.2, 0.1]),
        (["fc3.weight:0.1"], [0.2, 0.2, 0.1]),
        (["fc*:0.3", "fc3:0.1"], [0.3, 0.3, 0.1]),
        (["fc3:0.1", "fc*:0.3"], [0.3, 0.3, 0.3]),  # the last match counts
        (["fc[12]:0.4", "*:0.5", "fc2:0"], [0.5, 0.0, 0.5]),
    ],
)
def test_the_last_match_counts(entries, rates):
    cfg, model = lenet(layer_rates=entries)
    assert layer_rates(cfg, model) == rates


def test_patterns_fit_weights_and_layers():
    assert matches("features.0.weight", "features.0") and matches("features.0.weight", "features.*")
    assert matches("features.0.weight", "*.weight") and not matches("features.0.weight", "features")


def test_conv_nets_as_in_the_paper():
    """Convolutions at one rate, fully connected layers at another, the output layer at half of that."""
    cfg = make_config(
        {"prune_params": {"scope": "layer", "prune_rate": 0.2, "layer_rates": ["features.*:0.15", "fc3:0.1"]}}
    )
    model = insert_masks(create_model("conv6", 10, (3, 32, 32)))
    names = [name for name, _, _ in masked_params(model)]
    expected = [0.15 if name.startswith("features") else 0.1 if name == "fc3.weight" else 0.2 for name in names]
    assert layer_rates(cfg, model) == expected and expected.count(0.15) == 6


# -- which weights -----------------------------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(layer_wise()), st.lists(st.integers(1, 40), min_size=3, max_size=3))
def test_each_layer_keeps_its_best_weights(method, counts):
    torch.manual_seed(0)
    model = insert_masks(create_model("lenet_300_100", 10, (1, 4, 4)))
    batches = [(torch.randn(8, 1, 4, 4), torch.arange(8))]
    total = sum(mask.numel() for mask in masks_of(model))
    weights = {name: param.detach().clone() for name, param, _ in masked_params(model)}
    achieved = prune(model, method, sum(counts) / total, batches, shares=counts)
    assert kept_counts(masks_of(model)) == counts and achieved == sum(counts) / total
    if method == "mag":
        for name, _, mask in masked_params(model):
            magnitudes = weights[name].abs()
            assert magnitudes[mask].min() >= magnitudes[~mask].max()


def test_more_than_a_layer_has_left_is_refused_and_nothing_changes():
    model = insert_masks(create_model("lenet_300_100", 10, (1, 4, 4)))
    sizes = [mask.numel() for mask in masks_of(model)]
    with pytest.raises(ValueError, match="cannot keep"):
        prune(model, "mag", 0.5, shares=[sizes[0] + 1, 1, sum(sizes) // 2 - sizes[0] - 2])
    assert all(mask.all() for mask in masks_of(model))


# -- runs --------------------------------------------------------------------------------------------------------------


def layers_of(run) -> pd.DataFrame:
    """Kept weights by level (rows) and layer (columns)."""
    return run.csv("layerwise_density").pivot(index="level", columns="layer", values="kept")


def test_a_run_keeps_exactly_its_rates_and_resumes_bit_for_bit(forks):
    options = {**PAPER, "prune_params.num_levels": 4, "experiment_params.epochs_per_level": 2}
    run = forks("whole", **options)
    kept, sizes = layers_of(run), [64 * 300, 300 * 100, 100 * 10]
    assert [list(row) for row in kept.itertuples(index=False)] == [
        layer_counts([0.2, 0.2, 0.1], sizes, sizes, level, dense=True) for level in range(4)
    ]
    assert list(run.csv("summary")["density"]) == pytest.approx([row.sum() / sum(sizes) for row in kept.to_numpy()])
    part = forks.start("part", **options)
    part.wait_for_rows(1, level=2)
    part.kill()
    part.finish(status=None)
    forks("part", resume=True, **options).assert_same_figures(run)


def test_a_run_from_a_random_network(forks):
    """At initialization er_method shares the weights out; from level 1 each layer loses its rate of what it has."""
    run = forks(
        "erk",
        **{
            "prune_params.scope": "layer", "prune_params.layer_rates": "fc3:0,fc1:0.5", "prune_params.prune_rate": 0.2,
            "prune_params.er_method": "er_erk", "prune_params.er_init": 0.1, "experiment_params.epochs_per_level": 2,
        },
    )  # fmt: skip
    kept = layers_of(run)
    assert kept.loc[0].sum() == round(0.1 * 50_200) and kept.loc[0, "fc3.weight"] < 1000
    for level in (1, 2):
        was = kept.loc[level - 1]
        assert kept.loc[level, "fc3.weight"] == was["fc3.weight"]
        assert kept.loc[level, "fc1.weight"] == math.floor(0.5 * was["fc1.weight"] + 0.5)
        assert kept.loc[level, "fc2.weight"] == math.floor(0.8 * was["fc2.weight"] + 0.5)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--prune_params.layer_rates=conv*:0.1"], "prune_params.layer_rates: conv* matches no layer that is pruned"),
        (["--prune_params.layer_rates=fc3:0.1,fc4:0.2"], "prune_params.layer_rates: fc4 matches no layer"),
        (["--prune_params.layer_rates=fc3:1"], "prune_params.layer_rates: fc3:1 is not allowed: a list"),
        (["--prune_params.layer_rates=fc3"], "prune_params.layer_rates: fc3 is not allowed: a list"),
        (["--prune_params.prune_method=synflow"], "prune_params.scope: layer is not allowed: layer only with"),
        (["--prune_params.prune_method=random_erk"], "prune_params.scope: layer is not allowed: layer only with"),
        (["--prune_params.layer_rates=fc3:0.1", "--prune_params.exclude=fc3"], "fc3 matches no layer that is pruned"),
    ],
)
def test_refusals(tmp_path, capsys, words, says):
    import harness

    base = tmp_path / "runs"
    words = ["--prune_params.scope=layer", f"--experiment_params.base_dir={base}", "--dist_params.nproc=1", *words]
    assert harness.main(words) == 2
    err = capsys.readouterr().err
    assert says in err and len(err.strip().splitlines()) == 1
    assert not base.exists()


def test_rates_without_the_scope_are_told(capsys, tmp_path):
    from utils.config.effects import without_effect

    cfg = load_config(["--prune_params.layer_rates=fc3:0.1"])
    assert ("prune_params.layer_rates", "scope is global: all layers are pruned at one rate") in list(
        without_effect(cfg, cfg.schema)
    )
    with pytest.raises(ConfigError, match=r"prune_params\.scope: layers is not allowed"):
        make_config({"prune_params": {"scope": "layers"}})
