"""timm's models by name: DeiT on small images, trained, pruned and rewound; what is refused, and how."""

import importlib
import os
import sys

import pytest
import torch
from torch import nn

import harness
from harness_params import make_config
from tests.pruning_helpers import assert_untouched, numbers, snapshot
from utils.conv_type import insert_masks, masked_params
from utils.errors import ConfigError
from utils.models import create_model
from utils.pruning.allocation import keep_count
from utils.pruning_utils import dead_layers, prune

DEIT = "timm/deit_tiny_patch16_224"
# DeiT-tiny with an eighth of its width and two of its twelve blocks, on 8x8 digits.
SMALL_DEIT = {
    "model_params.model_name": DEIT,
    "model_params.model_args": "patch_size:4,depth:2,embed_dim:24,num_heads:3",
    "experiment_params.epochs_per_level": 2,
    "prune_params.num_levels": 2,
    "prune_params.rewind_epoch": 1,
    "optimizer.warmup_epochs": 0,
}


@pytest.fixture
def timm():
    if os.environ.get("CI"):
        return importlib.import_module("timm")  # CI must not skip its tests
    return pytest.importorskip("timm", reason="timm is not installed: pip install timm")


def batch(side=32):
    draws = torch.Generator().manual_seed(0)
    return [(torch.randn(4, 3, side, side, generator=draws), torch.randint(10, (4,), generator=draws))]


# -- without timm ------------------------------------------------------------------------------------------------------


def test_a_missing_package_is_one_line_that_says_what_to_install(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "timm", None)  # what an import of a package that is not there finds
    base = tmp_path / "runs"
    words = [f"--model_params.model_name={DEIT}", f"--experiment_params.base_dir={base}", "--dist_params.nproc=1"]
    assert harness.main(words) == 2
    out, err = capsys.readouterr()
    assert out == "" and err == (
        f"harness: model_params.model_name: {DEIT} needs the package timm, which is not installed: pip install timm\n"
    )
    assert not base.exists()


@pytest.mark.parametrize(
    ("model_params", "says"),
    [
        ({"model_name": "resnet20", "model_args": ["patch_size:4"]}, r"only for models of timm.*not for resnet20"),
        ({"model_name": DEIT, "model_args": ["patch_size"]}, r"model_args: \[patch_size\] .* ARGUMENT:VALUE"),
        ({"model_name": DEIT, "model_args": [":4"]}, r"model_args: \[:4\] .* ARGUMENT:VALUE"),
        ({"model_name": DEIT, "model_args": ["patch size:4"]}, r"model_args: \[patch size:4\] .* ARGUMENT:VALUE"),
    ],
)
def test_arguments_are_checked_with_the_config(model_params, says):
    with pytest.raises(ConfigError, match=rf"model_params\.model_args: .*{says.removeprefix('model_args: ')}"):
        make_config({"model_params": model_params})


# -- structure ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "width", "parameters"),
    [("deit_tiny_patch16_224", 192, 5_362_762), ("deit_small_patch16_224", 384, 21_342_346)],
)
def test_deit_at_32_pixels_and_patches_of_4(timm, name, width, parameters):
    model = insert_masks(create_model(f"timm/{name}", 10, (3, 32, 32), arguments=["patch_size:4"]))
    assert model.pos_embed.shape == (1, 1 + 8 * 8, width)
    assert sum(param.numel() for param in model.parameters()) == parameters
    masked = [name for name, _, _ in masked_params(model)]
    block = ["attn.qkv.weight", "attn.proj.weight", "mlp.fc1.weight", "mlp.fc2.weight"]
    assert masked == [
        "patch_embed.proj.weight", *(f"blocks.{i}.{layer}" for i in range(12) for layer in block), "head.weight",
    ]  # fmt: skip


def test_weights_are_drawn_once_from_the_global_generator(timm):
    """Also of a model that is built twice, to learn its arguments first."""
    torch.manual_seed(3)
    ours = create_model(DEIT, 10, (1, 8, 8), arguments=["patch_size:2", "depth:1"])
    torch.manual_seed(3)
    theirs = timm.create_model("deit_tiny_patch16_224", num_classes=10, in_chans=1, img_size=8, patch_size=2, depth=1)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert all(torch.equal(value, theirs.state_dict()[key]) for key, value in ours.state_dict().items())


def test_arguments_arrive_with_their_types(timm):
    words = ["depth:3", "qkv_bias:false", "drop_path_rate:0.2", "global_pool:avg", "mlp_ratio:2"]
    model = create_model(DEIT, 10, (3, 32, 32), arguments=words)
    assert len(model.blocks) == 3 and model.blocks[0].attn.qkv.bias is None and model.global_pool == "avg"
    assert model.blocks[2].drop_path1.drop_prob == pytest.approx(0.2)
    assert model.blocks[0].mlp.fc1.out_features == 2 * 192


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("resnet18", (1, 28, 28)),
        ("convnext_atto", (3, 32, 32)),
        ("swin_tiny_patch4_window7_224", (3, 32, 32)),
        ("vit_tiny_patch16_224", (3, 32, 48)),
        ("MobileNetV3-small-050", (1, 32, 32)),
    ],
)
def test_other_families_and_shapes(timm, name, shape):
    model = create_model(f"timm/{name}", 7, shape)
    assert model.training and model(torch.randn(2, *shape)).shape == (2, 7)


@pytest.mark.parametrize(
    ("name", "shape", "arguments", "says"),
    [
        ("deit_tiny_patch16_225", (3, 32, 32), (), r"model_name: 'timm/deit_tiny_patch16_225'.*nearest: timm/deit"),
        ("", (3, 32, 32), (), r"model_name: 'timm/' is not a model of timm"),
        ("hf_hub:timm/resnet18", (3, 32, 32), (), r"model_name: 'timm/hf_hub:timm/resnet18' is not a model of timm"),
        ("deit_tiny_patch16_224", (3, 40, 40), (), r"model_name: timm/deit_tiny_patch16_224 .* 3x40x40: .*16x16"),
        ("deit_tiny_patch16_224", (3, 32, 32), ("patch_sise:4",), r"model_args: patch_sise .*nearest: patch_size, "),
        ("deit_tiny_patch16_224", (3, 32, 32), ("img_size:64",), r"model_args: img_size .*the data set decides it"),
        ("deit_tiny_patch16_224", (3, 32, 32), ("num_classes:4",), r"model_args: num_classes .*dataset\.num_classes"),
        ("deit_tiny_patch16_224", (3, 32, 32), ("num_heads:5",), r"model_args \[num_heads:5\]: dim should be"),
        ("deit_tiny_patch16_224", (3, 32, 32), ("patch_size:big",), r"model_args \[patch_size:big\]"),
        ("test_nfnet", (3, 96, 96), (), r"model_name: timm/test_nfnet cannot be pruned: .*ScaledStdConv2d"),
        ("resnetv2_50x1_bit", (3, 64, 64), (), r"model_name: timm/resnetv2_50x1_bit cannot be pruned: .*StdConv2d"),
    ],
)  # fmt: skip
def test_refusals(timm, name, shape, arguments, says):
    with pytest.raises(ValueError, match=rf"model_params\.{says}"):
        create_model(f"timm/{name}", 10, shape, arguments=arguments)


# -- pruned, trained, rewound ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", ["tiny", "small"])
@pytest.mark.parametrize("method", ["mag", "snip", "synflow", "grasp", "random_erk", "random_balanced"])
def test_every_method_prunes_deit(timm, method, size):
    torch.manual_seed(0)
    name, words = f"timm/deit_{size}_patch16_224", ["patch_size:4", "depth:2"]
    model = insert_masks(create_model(name, 10, (3, 32, 32), arguments=words))
    _, total = numbers(model)
    for density in (0.5, 0.1):
        before = snapshot(model)
        prune(model, method, density, batch(), rounds=5)
        assert numbers(model)[0] == keep_count(density, total)
        assert_untouched(model, before)
    assert not dead_layers(model)
    attention = [mask for name, _, mask in masked_params(model) if ".attn." in name]
    assert len(attention) == 4 and all(0 < mask.sum() < mask.numel() for mask in attention)


@pytest.mark.parametrize("kind", ["imp", "wr", "lrr"])
def test_deit_is_trained_pruned_and_rewound(timm, fork, kind):
    """On the digits: a run of the command, its densities exact, its pruned weights zero, what it rewinds to its own."""
    run = fork(kind, **SMALL_DEIT, **{"experiment_params.training_type": kind})
    assert list(run.csv("summary")["density"]) == [1.0, 0.5]
    states = {name: run.checkpoint(name) for name in ("init", "level_0", "level_1")}
    masks = {key: value for key, value in states["level_1"].items() if key.endswith("_mask")}
    assert len(masks) == 10 and "blocks.1.attn.qkv.weight_mask" in masks
    for key, mask in masks.items():
        assert not states["level_1"][key.removesuffix("_mask")][~mask].any()
    assert not torch.equal(states["init"]["pos_embed"], states["level_0"]["pos_embed"])
    assert (run.path / "checkpoints" / "model_rewind.pt").exists() == (kind == "wr")


def test_a_killed_run_of_deit_goes_on_bit_for_bit(timm, forks):
    options = {**SMALL_DEIT, "experiment_params.training_type": "wr"}
    whole = forks("whole", **options)
    part = forks.start("part", **options)
    part.wait_for_rows(1, level=1)
    part.kill()
    part.finish(status=None)
    forks("part", resume=True, **options).assert_same_figures(whole)


def test_deit_loads_into_plain_timm(timm):
    model = insert_masks(create_model(DEIT, 10, (3, 32, 32), arguments=["patch_size:4"]))
    weights = {name: tensor for name, tensor in model.state_dict().items() if not name.endswith("_mask")}
    plain = timm.create_model("deit_tiny_patch16_224", num_classes=10, img_size=32, patch_size=4)
    plain.load_state_dict(weights, strict=True)
    assert all(isinstance(module, nn.Linear) for name, module in plain.named_modules() if name.endswith("qkv"))
