"""torchvision's own ViT, Swin and ConvNeXt, made small: every method prunes them, attention included."""

import pytest
import torch
from torch import nn
from torchvision.models import ConvNeXt, SwinTransformer, VisionTransformer
from torchvision.models.convnext import CNBlockConfig

from tests.pruning_helpers import assert_untouched, masks_of, numbers, snapshot
from utils.conv_type import insert_masks, masked_params
from utils.pruning.allocation import keep_count
from utils.pruning.scores import Inputs, scoring, synflow_scores
from utils.pruning_utils import CRITERIA, dead_layers, prune


def vit(depth=2, width=16):
    # As torchvision leaves it: the classifier is all zero.
    return VisionTransformer(16, 4, depth, 2, width, 2 * width, num_classes=10)


def swin():
    return SwinTransformer([2, 2], 12, [2, 2], [2, 4], [2, 2], num_classes=10)


def convnext():
    return ConvNeXt([CNBlockConfig(8, 16, 2), CNBlockConfig(16, None, 2)], num_classes=10)


MODELS = {"vit": vit, "swin": swin, "convnext": convnext}


def batches():
    draws = torch.Generator().manual_seed(0)
    return [(torch.randn(4, 3, 16, 16, generator=draws), torch.randint(10, (4,), generator=draws)) for _ in range(2)]


def build(name, zero_head=False):
    torch.manual_seed(0)
    model = MODELS[name]()
    if name == "vit" and not zero_head:
        nn.init.trunc_normal_(model.heads.head.weight, std=0.02)
    return insert_masks(model)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("method", sorted(CRITERIA))
def test_every_method_prunes_and_leaves_no_trace(name, method):
    model = build(name)
    _, total = numbers(model)
    for density in (0.5, 0.1):
        before = snapshot(model)
        prune(model, method, density, batches(), rounds=5)
        assert numbers(model)[0] == keep_count(density, total)
        assert_untouched(model, before)


@pytest.mark.parametrize("method", ["mag", "snip", "grasp", "synflow"])
def test_attention_projections_are_scored(method):
    """Queries, keys and values: the packed in_proj loses weights and keeps some in each layer."""
    model = build("vit")
    prune(model, method, 0.3, batches(), rounds=20)
    packed = [mask for name, _, mask in masked_params(model) if name.endswith("in_proj_weight")]
    assert len(packed) == 2
    assert all(0 < mask.sum() < mask.numel() for mask in packed)


@pytest.mark.parametrize("name", MODELS)
def test_synflow_leaves_no_layer_dead_down_to_a_weight_a_layer(name):
    """Also from ViT's all-zero classifier, through which no score would pass."""
    model = build(name, zero_head=True)
    layers, (_, total) = len(masks_of(model)), numbers(model)
    for keep in (total // 100, 2 * layers, layers):
        prune(model, "synflow", keep / total, batches(), rounds=20)
        assert numbers(model)[0] == keep
        assert not dead_layers(model)


def test_an_all_zero_classifier_does_not_stop_the_flow():
    model = build("vit", zero_head=True)
    assert (model.heads.head.weight == 0).all()
    with scoring(model):
        sums = [score.sum().item() for score in synflow_scores(model, masks_of(model), Inputs(batches()))]
    # Not all equal, for LayerNorm is not linear; but of one order, where an even classifier would give rounding errors.
    assert max(sums) < 1e3 * min(sums)
