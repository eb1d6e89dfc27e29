"""Models as a run uses them: initialisation, anti-aliased downsampling, masks, copies, layouts, DDP."""

import copy
import math
from pathlib import Path

import pytest
import torch
from torch import nn
from torchvision import models as tv

from tests.processes import in_ranks
from utils.conv_type import apply_masks, density, insert_masks, masked_params
from utils.distributed import Context
from utils.models import create_model
from utils.networks.blurpool import add_blurpool
from utils.networks.torchvision import _FIRST_CONV_INIT, _set_input_channels


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


# -- initialisation ----------------------------------------------------------------------------------------------------


def assert_normal(weight: torch.Tensor, std: float) -> None:
    """Mean 0 and `std` within 5 standard errors, and the tails of a normal: 4.6% beyond 2 std (a uniform has none)."""
    n = weight.numel()
    assert abs(weight.mean().item()) < 5 * std / math.sqrt(n)
    assert weight.std().item() == pytest.approx(std, rel=5 / math.sqrt(2 * n))
    assert (weight.abs() > 2 * std).float().mean().item() == pytest.approx(0.0455, abs=5 * math.sqrt(0.0455 / n))


def test_glorot_normal_of_lenet_and_conv_nets():
    lenet, conv = create_model("lenet_300_100", 10, (1, 28, 28)), create_model("conv4", 10, (3, 16, 16))
    assert_normal(lenet.fc1.weight, math.sqrt(2 / (784 + 300)))
    assert_normal(lenet.fc2.weight, math.sqrt(2 / (300 + 100)))
    assert_normal(conv.features[0].weight, math.sqrt(2 / (9 * 3 + 9 * 64)))
    assert_normal(conv.features[5].weight, math.sqrt(2 / (9 * 64 + 9 * 128)))
    assert_normal(conv.fc1.weight, math.sqrt(2 / (128 * 4 * 4 + 256)))
    for model in (lenet, conv):
        assert all(not param.any() for name, param in model.named_parameters() if name.endswith("bias"))


@pytest.mark.parametrize("channels", [1, 3])
def test_kaiming_normal_of_residual_nets(channels):
    resnet20, resnet18, preresnet = (
        create_model(name, 10, (channels, 32, 32)) for name in ("resnet20", "resnet18", "preresnet")
    )
    assert_normal(resnet20.conv1.weight, math.sqrt(2 / (9 * 16)))
    assert_normal(resnet20.layer3[0].conv1.weight, math.sqrt(2 / (9 * 64)))
    assert_normal(resnet18.conv1.weight, math.sqrt(2 / (9 * 64)))
    assert_normal(resnet18.layer2[0].conv1.weight, math.sqrt(2 / (9 * 128)))
    assert_normal(preresnet.layer4[0].downsample.weight, math.sqrt(2 / 512))
    assert_normal(create_model("vgg11", 10, (channels, 32, 32)).features[0].weight, math.sqrt(2 / (9 * 64)))


# One model of each kind; True where the first convolution's std falls with its number of inputs.
FIRST_CONVS = [
    ("alexnet", True),
    ("convnext_tiny", False),
    ("densenet121", True),
    ("efficientnet_b0", False),
    ("googlenet", False),
    ("inception_v3", False),
    ("maxvit_t", False),
    ("mnasnet0_5", False),
    ("mobilenet_v2", False),
    ("mobilenet_v3_small", False),
    ("regnet_x_400mf", False),
    ("resnet18", False),
    ("shufflenet_v2_x0_5", True),
    ("squeezenet1_0", True),
    ("swin_t", True),
    ("vgg11", False),
    ("vit_b_32", True),
]


def first_conv(model: nn.Module) -> nn.Conv2d:
    return next(module for module in model.modules() if isinstance(module, nn.Conv2d))


@pytest.mark.parametrize(("name", "by_fan_in"), FIRST_CONVS)
def test_other_channel_counts_keep_torchvisions_init(name, by_fan_in):
    options = {"init_weights": True} if name in ("googlenet", "inception_v3") else {}
    model = tv.get_model(name, weights=None, num_classes=2, **options)
    original = first_conv(model).weight.detach()
    for channels, ratio in ((3, 1.0), (6, math.sqrt(0.5) if by_fan_in else 1.0)):
        _set_input_channels(model, channels)
        weight = first_conv(model).weight.detach()
        assert weight.shape[1] == first_conv(model).in_channels == channels
        spread = 6 / math.sqrt(original.numel())  # the two samples' standard errors, sixfold
        assert weight.std().item() == pytest.approx(ratio * original.std().item(), rel=spread)
        # The same family too: the share beyond 1.8 std is 7% for a normal and none for a uniform.
        tails = [(w.abs() > 1.8 * w.std()).float().mean().item() for w in (weight, original)]
        assert tails[0] == pytest.approx(tails[1], abs=0.04)


def test_every_kind_of_torchvision_model_takes_other_channel_counts():
    for name in tv.list_models(module=tv):
        kind = tv.get_model_builder(name).__annotations__["return"]
        assert kind in _FIRST_CONV_INIT, f"{name}: add its kind to the table of first convolutions"


# -- blurpool ----------------------------------------------------------------------------------------------------------


def test_blurpool_by_hand():
    conv = nn.Conv2d(16, 4, 3, stride=2, padding=1)
    plain = copy.deepcopy(conv)
    assert add_blurpool(conv) == 1
    x = torch.randn(2, 16, 7, 7)
    padded, blurred = nn.functional.pad(x, (1, 1, 1, 1)), torch.zeros_like(x)
    for i, row in enumerate((1, 2, 1)):
        for j, column in enumerate((1, 2, 1)):
            blurred += row * column / 16 * padded[:, :, i : i + 7, j : j + 7]
    torch.testing.assert_close(conv(x), plain(blurred))


def test_blurpool_removes_the_highest_frequency():
    conv = nn.Conv2d(16, 4, 1, stride=2, bias=False)
    checkers = (-1.0) ** (torch.arange(9)[:, None] + torch.arange(9)) * torch.ones(1, 16, 1, 1)
    aliased = conv(checkers)
    add_blurpool(conv)
    assert aliased.abs().min() > 0.01  # a stride of 2 sees a constant
    assert conv(checkers)[:, :, 1:-1, 1:-1].abs().max() < 1e-6


@pytest.mark.parametrize(
    ("name", "size", "convolutions"), [("resnet20", 32, 2), ("resnet18", 32, 6), ("resnet50", 224, 6)]
)
def test_blurpool_keeps_classes_and_names(name, size, convolutions):
    plain, blurred = (create_model(name, 10, (3, size, size), blurpool=flag) for flag in (False, True))
    assert sum("blur_kernel" in buffer for buffer, _ in blurred.named_buffers()) == convolutions
    assert list(plain.state_dict()) == list(blurred.state_dict())
    assert [type(m) for m in plain.modules()] == [type(m) for m in blurred.modules()]
    assert not blurred.conv1._forward_pre_hooks  # 3 input channels: the stem stays as it is


def test_blurpool_draws_the_same_weights_and_changes_the_output():
    logits, x = [], torch.randn(2, 3, 32, 32)
    for flag in (False, True):
        torch.manual_seed(1)
        logits.append(create_model("resnet20", 10, (3, 32, 32), blurpool=flag).eval()(x))
    assert not torch.allclose(*logits)


# -- what a training run does to a model -------------------------------------------------------------------------------

FAMILIES = [
    ("lenet_300_100", (3, 8, 8), False),
    ("conv6", (3, 16, 16), False),
    ("resnet20", (3, 16, 16), True),
    ("resnet18", (1, 16, 16), True),
    ("preresnet", (3, 16, 16), True),
    ("vgg11_bn", (1, 28, 28), False),
    ("densenet121", (3, 32, 32), False),
    ("efficientnet_b0", (3, 32, 32), True),
    ("mobilenet_v3_small", (1, 32, 32), True),
    ("regnet_x_400mf", (3, 32, 32), True),
    ("shufflenet_v2_x0_5", (3, 32, 32), True),
    ("squeezenet1_1", (3, 32, 32), False),
]


@pytest.mark.parametrize(("name", "shape", "blurpool"), FAMILIES)
def test_masks_training_copies_and_layouts(name, shape, blurpool):
    model = insert_masks(create_model(name, 5, shape, blurpool))
    masks = list(masked_params(model))
    with torch.no_grad():
        for _, _, mask in masks:
            mask.copy_(torch.rand(mask.shape) < 0.5)
    apply_masks(model)
    assert density(model) == pytest.approx(0.5, abs=0.01)

    images = torch.randn(4, *shape)
    model(images).square().sum().backward()
    assert all(param.grad is not None and param.grad.isfinite().all() for _, param, _ in masks)
    other = copy.deepcopy(model).eval()
    fresh = insert_masks(create_model(name, 5, shape, blurpool)).eval()
    fresh.load_state_dict(model.state_dict())
    model.eval()
    with torch.no_grad():
        logits = model(images)
        assert logits.shape == (4, 5)
        assert torch.equal(other(images), logits) and torch.equal(fresh(images), logits)
        last = other.to(memory_format=torch.channels_last)(images.to(memory_format=torch.channels_last))
        torch.testing.assert_close(last, logits, rtol=1e-3, atol=1e-4 * logits.abs().max().item())
        exact = other.double()(images.double())
    assert exact.dtype == torch.float64
    torch.testing.assert_close(exact.float(), logits, rtol=1e-3, atol=1e-4 * logits.abs().max().item())


def gradients_and_statistics(ctx: Context, name: str, folder: Path) -> None:
    """What a rank's own images give alone, and what they give wrapped with the other ranks'."""
    torch.manual_seed(0)
    model = insert_masks(create_model(name, 5, (3, 16, 16), blurpool=True))
    alone = copy.deepcopy(model)
    images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(ctx.rank))
    wrapped = ctx.wrap(model)
    for net in (alone, wrapped):
        net(images)  # statistics broadcast by a step would be seen in the next
        net(images).square().mean().backward()
    found = []
    for net in (alone, model):
        buffers = {key: value for key, value in net.state_dict().items() if key not in dict(net.named_parameters())}
        found.append(({key: param.grad for key, param in net.named_parameters()}, buffers))
    torch.save(found, folder / f"{ctx.rank}.pt")


@pytest.mark.parametrize("name", ["resnet20", "preresnet"])
def test_two_ranks_average_their_gradients_and_keep_their_own_statistics(name, tmp_path):
    in_ranks(2, gradients_and_statistics, name, tmp_path)
    (alone_0, wrapped_0), (alone_1, wrapped_1) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert len(wrapped_0[0]) > 50
    for key, gradient in wrapped_0[0].items():
        assert torch.equal(gradient, wrapped_1[0][key]), key
        assert gradient.any() and not torch.equal(alone_0[0][key], alone_1[0][key]), key
        torch.testing.assert_close(gradient, (alone_0[0][key] + alone_1[0][key]) / 2)
    for alone, wrapped in ((alone_0, wrapped_0), (alone_1, wrapped_1)):
        assert all(torch.equal(value, wrapped[1][key]) for key, value in alone[1].items()) and len(wrapped[1]) > 50
    assert not torch.equal(wrapped_0[1]["bn1.running_mean"], wrapped_1[1]["bn1.running_mean"])


def test_channels_last_survives_option_a():
    model = create_model("resnet20", 10, (3, 16, 16)).to(memory_format=torch.channels_last)
    layouts = []
    for block in (*model.layer2, *model.layer3):
        block.register_forward_hook(
            lambda _, __, out: layouts.append(out.is_contiguous(memory_format=torch.channels_last))
        )
    model(torch.randn(4, 3, 16, 16).to(memory_format=torch.channels_last))
    assert layouts == [True] * 6


def test_weights_load_into_plain_torchvision():
    model = insert_masks(create_model("resnet18", 7, (3, 224, 224), blurpool=True))
    weights = {name: tensor for name, tensor in model.state_dict().items() if not name.endswith("_mask")}
    tv.resnet18(num_classes=7).load_state_dict(weights, strict=True)


def test_seed_decides_the_weights_and_nothing_else_is_drawn():
    states = []
    for _ in range(2):
        torch.manual_seed(3)
        states.append((create_model("resnet20", 10, (3, 32, 32)).state_dict(), torch.rand(1)))
    (first, draw), (second, again) = states
    assert all(torch.equal(first[name], second[name]) for name in first) and torch.equal(draw, again)
    assert int(first["bn1.num_batches_tracked"]) == 0  # the trial on the meta device left the statistics alone
    assert not first["bn1.running_mean"].any()


def test_models_come_in_training_mode():
    assert all(module.training for module in create_model("resnet20", 10, (3, 32, 32)).modules())
