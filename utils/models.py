"""Models by name: networks of the lottery-ticket papers, every classification model of torchvision, and of timm.

`MODELS` is the registry: name -> ``builder(num_classes, image_shape)``. To add a model, write a builder and one line
here. Names that torchvision and the CIFAR literature share (resnet18, vgg16_bn, ...) stand for torchvision's network on
large images and for the CIFAR form up to 64x64 pixels. timm/NAME is a model of timm, where that is installed. No
weights are downloaded: training starts from initialisation.
"""

import difflib
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import nn
from torch.func import functional_call
from torchvision import models

from utils.config.sections.model_params import TIMM
from utils.networks.blurpool import add_blurpool
from utils.networks.cifar import (
    CifarResNet,
    ConvNet,
    ImageShape,
    LeNet300100,
    PreResNet,
    UnsuitableImages,
)
from utils.networks.open_lth import cifar_resnet, cifar_vgg
from utils.networks.timm import timm_model
from utils.networks.torchvision import resnet, torchvision_model, vgg
from utils.registry import Table, plain

Builder = Callable[[int, ImageShape], nn.Module]


def create_model(
    name: str,
    num_classes: int,
    image_shape: ImageShape = (3, 224, 224),
    blurpool: bool = False,
    other_shapes: Sequence[ImageShape] = (),
    arguments: Sequence[str] = (),
) -> nn.Module:
    """Build a freshly initialised model from float images (N, C, H, W) to logits (N, num_classes).

    Weights are drawn from torch's global generator. A forward pass on the meta device (shapes only: no data, no random
    numbers) finds out whether the model can take the images, so that they are refused here and not at the first step.

    Args:
        name: one of `model_names`; case, hyphens and underscores do not matter ("ResNet-18" is resnet18). Or timm/NAME.
        image_shape: (channels, height, width) in pixels.
        blurpool: anti-aliased downsampling, see `add_blurpool`.
        other_shapes: shapes of further images that it will be given.
        arguments: of a model of timm, see `timm_model`.

    Raises:
        ValueError: an unknown name, images that this model cannot take, fewer than one class, arguments that it does
            not have, or blurpool on a model without a convolution to blur.
    """
    if num_classes < 1:
        raise ValueError(f"dataset.num_classes: {num_classes} is not allowed: at least 1")
    if len(image_shape) != 3 or min(image_shape) < 1:
        raise ValueError(f"image_shape {tuple(image_shape)} is not (channels, height, width), each at least 1")
    channels, height, width = image_shape
    name, build = _builder(name, arguments)
    try:
        model = build(num_classes, (channels, height, width))
        if blurpool and not add_blurpool(model):
            raise ValueError(
                f"model_params.blurpool: true changes nothing in {name} (no strided convolution of 16 or more input "
                "channels); leave it false"
            )
        for shape in (image_shape, *other_shapes):
            _try_shapes(model, num_classes, shape)
    except UnsuitableImages as error:
        size = " and ".join("x".join(map(str, shape)) for shape in (image_shape, *other_shapes))
        raise ValueError(f"model_params.model_name: {name} cannot take images of {size}: {error}") from error
    return model


def _builder(name: str, arguments: Sequence[str]) -> tuple[str, Builder]:
    """The canonical name of a model, and what builds it."""
    spelt = name.strip().lower()
    if spelt.startswith(TIMM):
        spelt = spelt.replace("-", "_")
        return spelt, partial(timm_model, spelt.removeprefix(TIMM), arguments=arguments)
    if arguments:
        raise ValueError(f"model_params.model_args: only for models of timm ({TIMM}NAME), not for {name}")
    name = canonical_name(name)
    return name, MODELS[name]


def model_names() -> list[str]:
    """Names of all models but timm's, sorted."""
    return sorted(MODELS)


def canonical_name(name: str) -> str:
    """The registry's spelling of a model's name: "ResNet18" and "resnet-18" are resnet18.

    Raises:
        ValueError: no such model, or several if separators are ignored; the message lists the nearest names.
    """
    spelt = {known.lower().replace("-", "_"): known for known in MODELS}  # a plugin's may have capitals
    asked = name.strip().lower().replace("-", "_")
    if asked in spelt:
        return spelt[asked]
    # regnet_x_16gf and regnet_x_1_6gf are one name without separators: such a spelling is refused.
    same = [known for known in MODELS if plain(known) == plain(asked)]
    if len(same) == 1:
        return same[0]
    nearest = same or difflib.get_close_matches(asked, MODELS, n=5, cutoff=0.4)
    raise ValueError(
        f"model_params.model_name: {name!r} is not a known model; nearest: {', '.join(nearest) or 'none'}. List all "
        f'{len(MODELS)}: python -c "from utils.models import model_names; print(*model_names())"; {TIMM}NAME: of timm'
    )


def _try_shapes(model: nn.Module, num_classes: int, image_shape: ImageShape) -> None:
    """Run the model on the meta device.

    Raises:
        UnsuitableImages: it cannot take images of this shape.
    """
    tensors = [*model.named_parameters(), *model.named_buffers()]
    on_meta = {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors}
    images = torch.empty((2, *image_shape), device="meta")
    model.eval()  # in training mode BN refuses single values per channel, and changes its statistics
    try:
        with torch.no_grad():
            logits = functional_call(model, on_meta, (images,))
    except (RuntimeError, AssertionError, ValueError) as error:
        raise UnsuitableImages(str(error).partition("\n")[0]) from error
    finally:
        model.train()
    assert logits.shape == (2, num_classes), logits.shape


_LINES: dict[str, Builder] = {
    # Every classification model of the installed torchvision, by its own name. The lines below take precedence.
    **{name: partial(torchvision_model, name) for name in models.list_models(module=models)},
    "lenet_300_100": LeNet300100,
    "conv2": partial(ConvNet, 2),
    "conv4": partial(ConvNet, 4),
    "conv6": partial(ConvNet, 6),
    "resnet20": partial(CifarResNet, 20),
    "resnet32": partial(CifarResNet, 32),
    "resnet44": partial(CifarResNet, 44),
    "resnet56": partial(CifarResNet, 56),
    "resnet110": partial(CifarResNet, 110),
    "cifar_resnet_20": partial(cifar_resnet, 20, 16),
    "cifar_resnet_32": partial(cifar_resnet, 32, 16),
    "cifar_resnet_32_32": partial(cifar_resnet, 32, 32),
    "cifar_resnet_44": partial(cifar_resnet, 44, 16),
    "cifar_resnet_56": partial(cifar_resnet, 56, 16),
    "cifar_resnet_110": partial(cifar_resnet, 110, 16),
    "cifar_vgg_11": partial(cifar_vgg, 11),
    "cifar_vgg_13": partial(cifar_vgg, 13),
    "cifar_vgg_16": partial(cifar_vgg, 16),
    "cifar_vgg_19": partial(cifar_vgg, 19),
    "preresnet": PreResNet,
    "resnet18": partial(resnet, "resnet18"),
    "resnet34": partial(resnet, "resnet34"),
    "resnet50": partial(resnet, "resnet50"),
    "resnet101": partial(resnet, "resnet101"),
    "resnet152": partial(resnet, "resnet152"),
    "resnext50_32x4d": partial(resnet, "resnext50_32x4d"),
    "resnext101_32x8d": partial(resnet, "resnext101_32x8d"),
    "resnext101_64x4d": partial(resnet, "resnext101_64x4d"),
    "wide_resnet50_2": partial(resnet, "wide_resnet50_2"),
    "wide_resnet101_2": partial(resnet, "wide_resnet101_2"),
    "vgg11": partial(vgg, 11, False),
    "vgg13": partial(vgg, 13, False),
    "vgg16": partial(vgg, 16, False),
    "vgg19": partial(vgg, 19, False),
    "vgg11_bn": partial(vgg, 11, True),
    "vgg13_bn": partial(vgg, 13, True),
    "vgg16_bn": partial(vgg, 16, True),
    "vgg19_bn": partial(vgg, 19, True),
}
MODELS: Table[Builder] = Table("model", Callable, _LINES)  # type: ignore[arg-type]
