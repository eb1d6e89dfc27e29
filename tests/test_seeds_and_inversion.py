"""Two seeds, of weights and of data order; and pruning by inverted scores."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from harness_params import load_config, make_config
from tests.data_helpers import digit_tree
from tests.pruning_helpers import batches_for, masks_of, small
from tests.test_tickets import ONE_LEVEL
from utils.conv_type import insert_masks
from utils.dataset import load_data
from utils.distributed import Context
from utils.pruning.methods import METHODS
from utils.pruning_utils import prune

# --- data_seed -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loader", ["memory", "torchvision"])
def test_data_seed_decides_order_and_augmentation_alone(tmp_path, loader):
    tree = digit_tree(tmp_path)

    def batches(seed: int, data_seed: int, level: int = 1):
        cfg = make_config({
            "dataset": {"dataset_name": "ImageFolder", "data_root": str(tree), "loader": loader, "batch_size": 20,
                        "augment": "crop_flip", "num_workers": 0},
            "experiment_params": {"seed": seed, "data_seed": data_seed},
        })  # fmt: skip
        train = load_data(cfg, Context()).train
        images, labels = zip(*train.batches(level, 0))
        scored, scored_labels = zip(*train.score_batches(level, 2))
        return torch.cat(images), torch.cat(labels), torch.cat(scored), torch.cat(scored_labels)

    of_seed, own, other = batches(0, -1), batches(5, 0), batches(0, 3)
    assert all(torch.equal(a, b) for a, b in zip(of_seed, batches(0, 0)))
    assert torch.equal(of_seed[0], own[0]) and torch.equal(of_seed[1], own[1])  # the data's seed is 0 in both
    assert not torch.equal(of_seed[2], own[2])  # pruning goes by the seed
    assert not torch.equal(of_seed[0], other[0]) and not torch.equal(of_seed[1], other[1])
    assert torch.equal(of_seed[2], other[2]) and torch.equal(of_seed[3], other[3])


def test_runs_share_their_weights_and_masks_and_differ_in_sgd_noise(forks):
    snip = {**ONE_LEVEL, "prune_params.er_method": "snip", "prune_params.er_init": 0.5}
    one, two, same = (forks(f"d{d}", **snip, **{"experiment_params.data_seed": d}) for d in (1, 2, 0))
    init, plain = one.checkpoint("init"), forks("plain", **snip)
    assert all(torch.equal(tensor, two.checkpoint("init")[name]) for name, tensor in init.items())
    assert not torch.equal(one.checkpoint("level_0")["fc1.weight"], two.checkpoint("level_0")["fc1.weight"])
    same.assert_same_figures(plain)
    done = forks("d1", resume=True, status=2, **snip, **{"experiment_params.data_seed": 2})
    assert "experiment_params.data_seed: 2 would change the experiment" in done.err


# --- invert_scores ---------------------------------------------------------------------------------------------------


def tiny(weights: list[list[float]]) -> nn.Module:
    """Linear layers without biases, of these weights in a row each."""
    layers = [nn.Linear(len(row), 1, bias=False) for row in weights]
    for layer, row in zip(layers, weights):
        layer.weight.data = torch.tensor([row])
    return insert_masks(nn.ModuleList(layers))


@pytest.mark.parametrize(
    ("weights", "density", "kept"),
    [
        ([[3.0, -1.0, 2.0, -4.0]], 0.5, [[0, 1, 1, 0]]),
        ([[5.0, 1.0], [-2.0, 0.5]], 0.25, [[0, 0], [0, 1]]),
        ([[1.0, 2.0, 1.0, -1.0]], 0.5, [[1, 0, 1, 0]]),  # of equal scores the first stay
        ([[0.0, 0.0, 2.0, 1.0]], 0.25, [[1, 0, 0, 0]]),
        ([[1.0, 2.0]], 1.0, [[1, 1]]),
    ],
)
def test_smallest_magnitudes_stay(weights, density, kept):
    model = tiny(weights)
    assert prune(model, "mag", density, invert_scores=True) == density
    assert [mask.int().tolist()[0] for mask in masks_of(model)] == kept


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(sorted(METHODS)), st.floats(0.02, 1.0), st.integers(0, 3))
def test_counts_are_exact_and_random_methods_stay_as_they_are(method, density, seed):
    def pruned(invert: bool):
        model = small(seed=seed)
        generator = torch.Generator().manual_seed(seed)
        prune(model, method, density, batches_for(model), generator, rounds=5, invert_scores=invert)
        return torch.cat([mask.flatten() for mask in masks_of(model)])

    plain, inverted = pruned(False), pruned(True)
    assert plain.sum() == inverted.sum()
    if METHODS[method].score == "random_scores":
        assert torch.equal(plain, inverted)
    elif not METHODS[method].in_rounds and density <= 0.5:
        assert not (plain & inverted).any()  # the lowest half and the highest half


def test_synflow_is_inverted_in_each_round():
    """In one round and in many: the weights of lowest score go on losing their neighbours' flow."""
    kept = []
    for rounds in (1, 30):
        model = small()
        prune(model, "synflow", 0.3, batches_for(model), rounds=rounds, invert_scores=True)
        kept.append(torch.cat([mask.flatten() for mask in masks_of(model)]))
    assert kept[0].sum() == kept[1].sum() and not torch.equal(kept[0], kept[1])


def test_inverted_runs_keep_the_lowest_and_level_after_level_fewer(forks):
    run = forks("inverted", **{**ONE_LEVEL, "prune_params.num_levels": 2, "prune_params.invert_scores": True})
    before, after = run.checkpoint("level_0"), run.checkpoint("level_1")
    names = [name.removesuffix("_mask") for name in after if name.endswith("_mask")]
    weights = torch.cat([before[name].abs().flatten() for name in names])
    masks = torch.cat([after[f"{name}_mask"].flatten() for name in names])
    assert weights[masks].max() <= weights[~masks].min()
    assert masks.float().mean() == pytest.approx(0.8, abs=1e-4)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], False),
        (["--prune_params.num_levels=1"], True),
        (["--prune_params.prune_method=random"], True),
        (["--prune_params.prune_method=random", "--prune_params.er_method=snip", "--prune_params.er_init=0.5"], False),
        (["--prune_params.num_levels=1", "--prune_params.er_method=er_erk", "--prune_params.er_init=0.5"], True),
    ],
)
def test_inversion_without_scores_is_told(words, told):
    cfg = load_config(["--prune_params.invert_scores=true", *words])
    assert ("prune_params.invert_scores" in [note.option for note in cfg.notes]) == told
