"""Models: published parameter counts, CIFAR forms, shortcuts, names and clear refusals."""

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torchvision import models as tv

from utils.conv_type import insert_masks, masked_params
from utils.models import MODELS, canonical_name, create_model, model_names
from utils.networks.cifar import _BlockA, _PreActBlock

TORCHVISION = tv.list_models(module=tv)


class WeightsOnMeta(TorchFunctionMode):
    """Makes torch.empty, where every layer's weights come from, return meta tensors: structure without the memory.

    (Under torch.device("meta") RegNet cannot be built: torchvision works out its widths with real tensors.)
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is torch.empty:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def count(model: nn.Module) -> int:
    return sum(param.numel() for param in model.parameters())


def structure(*args, **kwargs) -> nn.Module:
    with WeightsOnMeta():
        return create_model(*args, **kwargs)


# -- parameter counts --------------------------------------------------------------------------------------------------

SMALL_COUNTS = [
    ("lenet_300_100", (1, 28, 28), 266_610),
    ("conv2", (3, 32, 32), 4_301_642),  # 4.3 M
    ("conv4", (3, 32, 32), 2_425_930),  # 2.4 M
    ("conv6", (3, 32, 32), 2_262_602),  # the paper says 1.7 M in all, 1.1 M in convolutions: see the next test
    ("resnet20", (3, 32, 32), 269_722),  # 0.27 M
    ("resnet32", (3, 32, 32), 464_154),  # 0.46 M
    ("resnet44", (3, 32, 32), 658_586),  # 0.66 M
    ("resnet56", (3, 32, 32), 853_018),  # 0.85 M
    ("resnet110", (3, 32, 32), 1_727_962),  # 1.7 M
    ("resnet18", (3, 32, 32), 11_173_962),  # 11.17 M
    ("resnet50", (3, 32, 32), 23_520_842),
    ("preresnet", (3, 32, 32), 11_172_170),
    ("vgg16_bn", (3, 32, 32), 14_728_266),
    ("cifar_resnet_20", (3, 32, 32), 272_474),  # counted in open_lth's own networks, these five
    ("cifar_resnet_32_32", (3, 32, 32), 1_860_522),
    ("cifar_resnet_56", (3, 32, 32), 855_770),
    ("cifar_vgg_16", (3, 32, 32), 14_728_266),
    ("cifar_vgg_19", (3, 32, 32), 20_040_522),
]


@pytest.mark.parametrize(("name", "shape", "parameters"), SMALL_COUNTS)
def test_parameters_of_small_image_models(name, shape, parameters):
    assert count(structure(name, 10, shape)) == parameters


@pytest.mark.parametrize(("name", "convolutions"), [("conv2", 38e3), ("conv4", 260e3), ("conv6", 1.1e6)])
def test_convolution_weights_of_conv_nets_match_the_paper(name, convolutions):
    weights = sum(m.weight.numel() for m in structure(name, 10, (3, 32, 32)).modules() if isinstance(m, nn.Conv2d))
    assert weights == pytest.approx(convolutions, rel=0.05)


# Every kind in every run; further sizes of the same kinds are built the same way, so they can wait for `-m slow`.
KINDS = {"alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "efficientnet_v2_s", "googlenet", "inception_v3"}
KINDS |= {"maxvit_t", "mnasnet0_5", "mobilenet_v2", "mobilenet_v3_small", "regnet_x_400mf", "resnet18", "resnet50"}
KINDS |= {"shufflenet_v2_x0_5", "squeezenet1_0", "swin_t", "swin_v2_t", "vgg11", "vgg16_bn", "vit_b_16", "vit_b_32"}
ALL_SIZES = [pytest.param(name, marks=[] if name in KINDS else pytest.mark.slow) for name in TORCHVISION]

# torchvision publishes Inception with its auxiliary head, and ViT-H/14 for 518 pixels (more position embeddings).
NOT_AS_PUBLISHED = {"inception_v3": 23_834_568, "vit_h_14": 632_045_800}


@pytest.mark.parametrize("name", ALL_SIZES)
def test_every_torchvision_classifier_at_224(name):
    """create_model itself runs the forward on the meta device, and asserts logits of (2, num_classes)."""
    model = structure(name, 1000, (3, 224, 224))
    published = NOT_AS_PUBLISHED.get(name) or tv.get_model_weights(name).DEFAULT.meta["num_params"]
    assert count(model) == published
    layers = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    attention = {f"{n}.in_proj_weight" for n, m in model.named_modules() if isinstance(m, nn.MultiheadAttention)}
    with torch.device("meta"):
        insert_masks(model)
    assert {n for n, _, _ in masked_params(model)} == layers | attention
    assert bool(attention) == name.startswith("vit")


def test_cifar_resnet_depth_is_the_name():
    for depth in (20, 32, 44, 56, 110):
        model = structure(f"resnet{depth}", 10, (3, 32, 32))
        assert sum(isinstance(m, nn.Conv2d | nn.Linear) for m in model.modules()) == depth


def test_registry_has_every_name():
    assert set(TORCHVISION) < set(MODELS) and model_names() == sorted(MODELS)
    depths = (20, 32, 44, 56, 110)
    ours = {"lenet_300_100", "conv2", "conv4", "conv6", "preresnet", *(f"resnet{n}" for n in depths)}
    ours |= {
        "cifar_resnet_32_32",
        *(f"cifar_resnet_{n}" for n in depths),
        *(f"cifar_vgg_{n}" for n in (11, 13, 16, 19)),
    }
    assert ours == set(MODELS) - set(TORCHVISION)


# -- initialisation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["resnet20", "resnet110", "preresnet", "resnet18"])
def test_a_resnets_classifier_is_drawn_as_torch_draws_it(name):
    """Uniform within 1 / sqrt(fan_in); He's normal weights would be 2.45 times as wide, and mostly outside."""
    fc = create_model(name, 1000, (3, 32, 32)).fc
    bound = fc.in_features**-0.5
    for values in (fc.weight.flatten(), fc.bias):
        assert 0.97 * bound < values.abs().max() <= bound
        assert values.std().item() == pytest.approx(bound / 3**0.5, rel=0.08)


@pytest.mark.parametrize("name", ["resnet20", "preresnet", "vgg16_bn", "resnet18"])
def test_convolutions_are_he_normal_with_fan_out(name):
    convolutions = [m for m in create_model(name, 10, (3, 32, 32)).modules() if isinstance(m, nn.Conv2d)]
    assert len(convolutions) >= 13
    for conv in convolutions:
        fan_out = conv.out_channels * conv.kernel_size[0] * conv.kernel_size[1]
        assert conv.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.12)
        assert conv.bias is None or not conv.bias.any()


def test_small_vggs_classifier_is_torchvisions():
    classifier = create_model("vgg16_bn", 10, (3, 32, 32)).classifier
    assert classifier.weight.std().item() == pytest.approx(0.01, rel=0.05) and not classifier.bias.any()


@pytest.mark.parametrize("name", ["lenet_300_100", "conv4"])
def test_frankle_and_carbins_networks_are_gaussian_glorot(name):
    modules = create_model(name, 10, (3, 32, 32)).modules()
    layers = [module for module in modules if isinstance(module, nn.Conv2d | nn.Linear)]
    assert len(layers) == {"lenet_300_100": 3, "conv4": 7}[name]
    for layer in layers:
        area = layer.weight[0, 0].numel()
        fans = (layer.weight.shape[0] + layer.weight.shape[1]) * area
        assert layer.weight.std().item() == pytest.approx((2 / fans) ** 0.5, rel=0.12)
        assert not layer.bias.any()


# -- CIFAR forms -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["resnet18", "resnet34", "resnet50", "wide_resnet50_2", "resnext50_32x4d", "preresnet"]
)
def test_stem_follows_the_image_size(name):
    small, large = structure(name, 10, (3, 64, 64)), structure(name, 10, (3, 65, 64))
    assert (small.conv1.kernel_size, small.conv1.stride) == ((3, 3), (1, 1))
    assert isinstance(small.maxpool, nn.Identity)
    assert (large.conv1.kernel_size, large.conv1.stride) == ((7, 7), (2, 2))
    assert isinstance(large.maxpool, nn.MaxPool2d)


def test_vgg_follows_the_image_size():
    small, large = structure("vgg16_bn", 10, (3, 64, 64)), structure("vgg16_bn", 10, (3, 65, 64))
    assert [m.in_features for m in small.modules() if isinstance(m, nn.Linear)] == [512]
    assert isinstance(large, tv.VGG) and len([m for m in large.modules() if isinstance(m, nn.Linear)]) == 3
    features = {name for name in large.state_dict() if name.startswith("features")}
    assert features == {name for name in small.state_dict() if name.startswith("features")}


def test_vgg_leaves_out_only_pools_without_pixels():
    for size, pools in ((64, 5), (32, 5), (31, 4), (28, 4), (8, 3), (1, 0)):
        model = structure("vgg11", 10, (1, size, size))
        assert sum(isinstance(m, nn.MaxPool2d) for m in model.modules()) == pools


def test_option_a_shortcut_by_hand():
    block = _BlockA(2, 4, stride=2).eval()
    nn.init.zeros_(block.bn2.weight)  # nothing but the shortcut is left
    x = torch.randn(3, 2, 5, 5)
    out = block(x)
    assert out.shape == (3, 4, 3, 3)
    for n, c, i, j in torch.cartesian_prod(*map(torch.arange, out.shape)).tolist():
        expected = max(x[n, c, 2 * i, 2 * j].item(), 0.0) if c < 2 else 0.0
        assert out[n, c, i, j].item() == expected
    assert not [name for name in structure("resnet20", 10, (3, 32, 32)).state_dict() if "downsample" in name]


def test_residual_branch_of_option_a():
    block = _BlockA(4, 4, stride=1).eval()
    nn.init.constant_(block.bn1.weight, 0.5)
    x = torch.randn(2, 4, 6, 6)
    branch = block.bn2(block.conv2(torch.relu(block.bn1(block.conv1(x)))))
    torch.testing.assert_close(block(x), torch.relu(branch + x))


def test_preactivation_block_has_a_clean_shortcut():
    same, changed = _PreActBlock(4, 4, 1, preact=True).eval(), _PreActBlock(4, 8, 2, preact=True).eval()
    x = torch.randn(2, 4, 6, 6)
    for block in (same, changed):
        nn.init.zeros_(block.conv2.weight)
        nn.init.constant_(block.bn1.bias, 0.3)
    assert torch.equal(same(x), x)  # no ReLU, no BN on the way
    torch.testing.assert_close(changed(x), changed.downsample(torch.relu(changed.bn1(x))))


def test_preresnet_activates_every_path_once():
    model = create_model("preresnet", 10, (3, 32, 32))
    assert model.layer1[0].bn1 is None and model.layer1[1].bn1 is not None
    assert sum(isinstance(m, nn.BatchNorm2d) for m in model.modules()) == 17  # one before each of 16, one at the end


# -- open_lth's networks -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [20, 32, 44, 56, 110])
def test_projection_shortcuts_are_beside_the_depth(depth):
    model = structure(f"cifar_resnet_{depth}", 10, (3, 32, 32))
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    shortcuts = [conv for conv in convolutions if conv.kernel_size == (1, 1)]
    assert len(convolutions) - len(shortcuts) + 1 == depth
    assert [(conv.in_channels, conv.out_channels, conv.stride) for conv in shortcuts] == [
        (16, 32, (2, 2)), (32, 64, (2, 2)),
    ]  # fmt: skip
    plain = structure(f"resnet{depth}", 10, (3, 32, 32))
    assert count(model) - count(plain) == 16 * 32 + 32 * 64 + 2 * (32 + 64)  # the convolutions and their BatchNorms
    assert set(plain.state_dict()) < set(model.state_dict())


def test_a_projection_block_by_hand():
    """relu(bn2(conv2(relu(bn1(conv1 x)))) + bn(conv1x1 x)), where the shape changes; else x itself is added."""
    model = create_model("cifar_resnet_20", 10, (3, 32, 32)).eval()
    x, block = torch.randn(2, 16, 8, 8), model.layer2[0]
    inner = block.bn2(block.conv2(torch.relu(block.bn1(block.conv1(x)))))
    torch.testing.assert_close(block(x), torch.relu(inner + block.downsample[1](block.downsample[0](x))))
    x, block = torch.randn(2, 32, 8, 8), model.layer2[1]
    inner = block.bn2(block.conv2(torch.relu(block.bn1(block.conv1(x)))))
    assert block.downsample is None
    torch.testing.assert_close(block(x), torch.relu(inner + x))


def test_open_lths_vgg_averages_its_last_maps():
    model = create_model("cifar_vgg_16", 10, (3, 32, 32)).eval()
    pools = [m for m in model.modules() if isinstance(m, nn.MaxPool2d)]
    assert len(pools) == 4
    x = torch.randn(2, 3, 32, 32)
    last = model.features(x)
    assert last.shape == (2, 512, 2, 2)
    torch.testing.assert_close(model(x), model.classifier(nn.functional.avg_pool2d(last, 2).flatten(1)))


@pytest.mark.parametrize("name", ["cifar_resnet_20", "cifar_vgg_16"])
def test_open_lths_initialisation(name):
    """Weights N(0, 2 / fan_in), the classifier's too; biases as torch draws them; BatchNorm U(0, 1) and 0."""
    model = create_model(name, 10, (3, 32, 32))
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            fan_in = module.weight[0].numel()
            expected = pytest.approx((2 / fan_in) ** 0.5, rel=5 / (2 * module.weight.numel()) ** 0.5)
            assert module.weight.std().item() == expected
            if module.bias is not None:
                assert 0.3 * fan_in**-0.5 < module.bias.abs().max() <= fan_in**-0.5
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    weights = torch.cat([norm.weight for norm in norms])
    assert weights.min() >= 0 and weights.max() <= 1
    assert weights.mean().item() == pytest.approx(0.5, abs=0.04) and weights.std().item() == pytest.approx(
        12**-0.5, rel=0.06
    )
    assert not any(norm.bias.any() for norm in norms)


# -- names and refusals ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("ResNet18", "resnet18"),
        ("ResNet-18", "resnet18"),
        ("resnet_50", "resnet50"),
        ("LeNet-300-100", "lenet_300_100"),
        ("VGG16-BN", "vgg16_bn"),
        ("vgg16bn", "vgg16_bn"),
        ("Conv-6", "conv6"),
        ("ViT-B-16", "vit_b_16"),
        ("regnet-x-16gf", "regnet_x_16gf"),
        ("regnet_x_1_6gf", "regnet_x_1_6gf"),
        ("PreResNet", "preresnet"),
        ("cifar-resnet-20", "cifar_resnet_20"),
    ],
)
def test_spellings(written, name):
    assert canonical_name(written) == name


@pytest.mark.parametrize(
    ("name", "shape", "options", "says"),
    [
        ("resnet19", (3, 32, 32), {}, r"model_params\.model_name: 'resnet19'.*resnet18.*model_names"),
        ("", (3, 32, 32), {}, r"model_params\.model_name: ''"),
        ("regnetx16gf", (3, 224, 224), {}, r"nearest: regnet_x_16gf, regnet_x_1_6gf"),
        ("vit_b_16", (3, 40, 40), {}, r"model_params\.model_name: vit_b_16 .* 3x40x40: .*multiple of its patch, 16"),
        ("vit_b_16", (3, 32, 64), {}, r"model_params\.model_name: vit_b_16 .* 3x32x64: .*square"),
        ("maxvit_t", (3, 32, 32), {}, r"model_params\.model_name: maxvit_t .* 3x32x32: .*partition size 7"),
        ("alexnet", (3, 32, 32), {}, r"model_params\.model_name: alexnet .* 3x32x32: .*too small"),
        ("inception_v3", (3, 64, 64), {}, r"model_params\.model_name: inception_v3 .* 3x64x64"),
        ("conv6", (1, 7, 7), {}, r"model_params\.model_name: conv6 .* 1x7x7: .*8x8"),
        ("lenet_300_100", (1, 8, 8), {"blurpool": True}, r"model_params\.blurpool: true changes nothing in lenet"),
        ("vgg11", (3, 32, 32), {"blurpool": True}, r"model_params\.blurpool: true changes nothing in vgg11"),
        ("lenet_300_100", (1, 8, 8), {"num_classes": 0}, r"dataset\.num_classes: 0"),
        ("lenet_300_100", (8, 8), {}, r"image_shape \(8, 8\)"),
    ],
)
def test_refusals(name, shape, options, says):
    with WeightsOnMeta(), pytest.raises(ValueError, match=says):
        create_model(name, **{"num_classes": 10, "image_shape": shape, **options})


@pytest.mark.parametrize("name", ["convnext_tiny", "swin_t", "swin_v2_t", "vit_b_16"])
def test_large_image_models_on_small_images(name):
    structure(name, 10, (3, 32, 32))  # tried on the meta device as it is built
