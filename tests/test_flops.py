"""utils.analysis.flops: multiply-adds against figures worked by hand and torch's own counter; bytes by hand."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from utils.analysis.flops import LayerCost, StoredBytes, layer_costs, stored_bytes, weight_uses
from utils.conv_type import insert_masks, masked_params
from utils.models import create_model


def on_meta(name: str, shape: tuple[int, int, int], classes: int = 10) -> nn.Module:
    with torch.device("meta"):
        return create_model(name, classes, shape).to("meta")


def torchs_count(model: nn.Module, shape: tuple[int, int, int]) -> float:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(torch.zeros((1, *shape), device=next(model.parameters()).device))
    return counter.get_total_flops() / 2


def test_lenet_by_hand():
    """784 x 300, 300 x 100, 100 x 10; of the first layer's weights 1,000 are kept, the last layer has no mask."""
    model = insert_masks(create_model("lenet_300_100", 10, (1, 28, 28)), exclude=["fc3"])
    first = next(mask for _, _, mask in masked_params(model))
    first.zero_().flatten()[:1000] = True
    costs = layer_costs(weight_uses(model, (1, 28, 28)), model.state_dict())
    assert costs == [
        LayerCost("fc1.weight", 1, 235200, 1000, True),
        LayerCost("fc2.weight", 1, 30000, 30000, True),
        LayerCost("fc3.weight", 1, 1000, 1000, False),
    ]
    assert sum(cost.multiply_adds for cost in costs) == 266200
    assert sum(cost.kept_multiply_adds for cost in costs) == 32000


def test_bytes_by_hand():
    """LeNet-300-100: 266,610 float32; CSR with 4-byte indices; one bit per masked weight."""
    model = insert_masks(create_model("lenet_300_100", 10, (1, 28, 28)), exclude=["fc3"])
    masks = [mask for _, _, mask in masked_params(model)]
    masks[0].zero_().flatten()[:1000] = True
    unmasked = 4 * (300 + 100 + 1000 + 10)
    assert stored_bytes(model.state_dict()) == StoredBytes(
        dense=4 * 266610,
        sparse=unmasked + 1000 * 8 + 301 * 4 + 30000 * 8 + 101 * 4,
        bitmask=unmasked + 1000 * 4 + 29400 + 30000 * 4 + 3750,
    )


def test_bytes_of_statistics_and_halves():
    """BatchNorm's count is an int64; half precision counts as float32; a bit more than a byte is two."""
    state = {"n": torch.zeros((), dtype=torch.int64), "w": torch.zeros(3, 3).half(), "w_mask": torch.eye(3).bool()}
    assert stored_bytes(state) == StoredBytes(8 + 36, 8 + 3 * 8 + 4 * 4, 8 + 3 * 4 + 2)
    assert stored_bytes({"alone_mask": torch.ones(5)}) == StoredBytes(20, 20, 20), "a mask of nothing is a tensor"


class Layers(nn.Module):
    """All kinds of layers, one weight used twice, one not at all, and a product without weights."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, stride=2, padding=1, groups=2)
        self.up = nn.ConvTranspose2d(4, 3, 2, stride=2)
        self.twice, self.never = nn.Linear(3, 3), nn.Linear(7, 7)
        self.register_buffer("blur", torch.ones(3, 1, 3, 3))
        self.head = nn.Linear(3, 5)

    def forward(self, images):
        x = self.up(self.conv(images))
        x = nn.functional.conv2d(x, self.blur, padding=1, groups=3)
        x = self.twice(self.twice(x.flatten(2).transpose(1, 2)))
        x = (x @ x.transpose(1, 2)) @ x
        return self.head(x.mean(1))


def test_layers_by_hand():
    """An image of 2 x 8 x 6: conv gives 4 x 4 x 3 (weights 4 x 1 x 3 x 3), up 3 x 8 x 6 (4 x 3 x 2 x 2) from those 12
    positions; 48 tokens of 3 through the linear layer twice; the filter 48 x 27, the products 2 x 48 x 48 x 3."""
    model = Layers().train()
    uses = weight_uses(model, (2, 8, 6))
    assert uses.weights == {"conv.weight": 12, "up.weight": 12, "twice.weight": 96, "head.weight": 1}
    assert uses.activations == 48 * 27 + 2 * 48 * 48 * 3
    assert model.training and all(param.grad is None for param in model.parameters())


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_convolutional_networks_are_as_torch_counts_them(name):
    shape = (3, 224, 224)
    model = on_meta(name, shape, 1000)
    uses = weight_uses(model, shape)
    assert uses.activations == 0
    total = sum(cost.multiply_adds for cost in layer_costs(uses, model.state_dict()))
    assert total == torchs_count(model, shape)
    if name == "resnet18":
        assert total == 1_814_073_344, "1.8e9 in He et al. 2015, table 1"


@pytest.mark.parametrize("name", ["vit_b_16", "swin_t", "maxvit_t"])
def test_transformers_are_as_torch_counts_them(name):
    """Attention's projections are used without their layers being called; its products have no weights."""
    shape = (3, 224, 224)
    model = on_meta(name, shape)
    uses = weight_uses(model, shape)
    used = {param for param, size in model.named_parameters() if size.ndim > 1 and param in uses.weights}
    assert used >= {name for name, _, _ in masked_params(insert_masks(model))}
    total = sum(cost.multiply_adds for cost in layer_costs(uses, dict(model.named_parameters())))
    assert total + uses.activations == torchs_count(model, shape) and uses.activations > 0


def test_kept_weights_of_a_convolution_count_once_per_position():
    """ResNet-20 on 32 x 32: the first convolution is used at 1,024 positions, the last at 64."""
    model = insert_masks(create_model("resnet20", 10, (3, 32, 32)))
    masks = {name: mask for name, _, mask in masked_params(model)}
    for mask in masks.values():
        mask.zero_().flatten()[:7] = True
    costs = layer_costs(weight_uses(model, (3, 32, 32)), model.state_dict())
    assert [cost.kept_multiply_adds for cost in costs] == [7 * 1024] * 7 + [7 * 256] * 6 + [7 * 64] * 6 + [7]
    assert sum(cost.multiply_adds for cost in costs) == 40_551_040
