"""torchvision's classification models: built for any number of input channels, with the CIFAR stem on small images."""

from collections.abc import Callable
from functools import partial

from torch import nn
from torchvision import models

from utils.networks.cifar import CifarVGG, ImageShape, UnsuitableImages, is_small


def torchvision_model(name: str, num_classes: int, image_shape: ImageShape) -> nn.Module:
    """torchvision's own model, with the options it needs for other image sizes and to return one tensor of logits.

    Raises:
        UnsuitableImages: it cannot take images of this shape.
    """
    channels, height, width = image_shape
    options: dict[str, object] = {}
    if name in ("googlenet", "inception_v3"):
        options = {"aux_logits": False, "init_weights": True}
    elif name.startswith("vit_"):
        patch = int(name.rpartition("_")[2])
        if height != width or height % patch:
            raise UnsuitableImages(f"it needs square images whose side is a multiple of its patch, {patch} pixels")
        options = {"image_size": height}
    elif name == "maxvit_t":
        options = {"input_size": (height, width)}
    try:
        model = models.get_model(name, weights=None, num_classes=num_classes, **options)
    except ValueError as error:  # MaxViT checks its partitions when it is built
        raise UnsuitableImages(str(error).partition("\n")[0]) from error
    if channels != 3:
        _set_input_channels(model, channels)
    return model


_fan_out = partial(nn.init.kaiming_normal_, mode="fan_out", nonlinearity="relu")

# torchvision hard-codes 3 input channels, and initialises the first convolution as each paper did. `reset_parameters`
# is torch's default, for models that keep it. Biases that torchvision sets to zero stay zero.
_FIRST_CONV_INIT: dict[type[nn.Module], Callable[[nn.Conv2d], object]] = {
    models.AlexNet: nn.Conv2d.reset_parameters,
    models.ConvNeXt: lambda conv: nn.init.trunc_normal_(conv.weight, std=0.02),
    models.DenseNet: lambda conv: nn.init.kaiming_normal_(conv.weight),
    models.EfficientNet: lambda conv: _fan_out(conv.weight),
    models.GoogLeNet: lambda conv: nn.init.trunc_normal_(conv.weight, std=0.01),
    models.Inception3: lambda conv: nn.init.trunc_normal_(conv.weight, std=0.1),
    models.MaxVit: lambda conv: nn.init.normal_(conv.weight, std=0.02),
    models.MNASNet: lambda conv: _fan_out(conv.weight),
    models.MobileNetV2: lambda conv: _fan_out(conv.weight),
    models.MobileNetV3: lambda conv: _fan_out(conv.weight),
    models.RegNet: lambda conv: _fan_out(conv.weight),
    models.ResNet: lambda conv: _fan_out(conv.weight),
    models.ShuffleNetV2: nn.Conv2d.reset_parameters,
    models.SqueezeNet: lambda conv: nn.init.kaiming_uniform_(conv.weight),
    models.SwinTransformer: nn.Conv2d.reset_parameters,
    models.VGG: lambda conv: _fan_out(conv.weight),
    models.VisionTransformer: lambda conv: nn.init.trunc_normal_(conv.weight, std=conv.weight[0].numel() ** -0.5),
}


def _set_input_channels(model: nn.Module, channels: int) -> None:
    """Give the first convolution `channels` input channels, initialised as that model does it.

    Raises:
        UnsuitableImages: the initialisation of this kind of model is not in `_FIRST_CONV_INIT`.
    """
    if type(model) not in _FIRST_CONV_INIT:
        raise UnsuitableImages("its first layer is only known for 3 channels")
    conv = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
    weight = conv.weight
    conv.in_channels = channels
    conv.weight = nn.Parameter(weight.new_empty((weight.shape[0], channels, *weight.shape[2:])))
    _FIRST_CONV_INIT[type(model)](conv)


def resnet(name: str, num_classes: int, image_shape: ImageShape) -> nn.Module:
    """torchvision's ResNet; for small images with the CIFAR stem: a 3x3 convolution of stride 1 and no max-pool."""
    if not is_small(image_shape):
        return torchvision_model(name, num_classes, image_shape)
    model = models.get_model(name, weights=None, num_classes=num_classes)
    model.conv1 = nn.Conv2d(image_shape[0], 64, 3, 1, 1, bias=False)
    _fan_out(model.conv1.weight)
    model.maxpool = nn.Identity()
    return model


def vgg(depth: int, batch_norm: bool, num_classes: int, image_shape: ImageShape) -> nn.Module:
    """torchvision's VGG; for small images `CifarVGG`."""
    if is_small(image_shape):
        return CifarVGG(depth, batch_norm, num_classes, image_shape)
    return torchvision_model(f"vgg{depth}_bn" if batch_norm else f"vgg{depth}", num_classes, image_shape)
