"""The CIFAR networks of open_lth, the public code of Frankle et al.: their structure and their initialisation.

Names of layers are those of this program's own CIFAR networks, so patterns of layer names fit both.
"""

from torch import nn
from torchvision.models.resnet import BasicBlock

from utils.networks.cifar import CifarResNet, CifarVGG, ImageShape


def open_lth_init(model: nn.Module) -> None:
    """open_lth's defaults: model_init kaiming_normal, batchnorm_init uniform.

    Convolutions and linear layers ~ N(0, 2 / fan_in), their biases as torch draws them, U(-b, b) with
    b = 1 / sqrt(fan_in); BatchNorm's weights ~ U(0, 1), its biases 0.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.reset_parameters()  # the bias
            nn.init.kaiming_normal_(module.weight)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight)
            nn.init.zeros_(module.bias)


def _projection_block(channels: int, out: int, stride: int) -> BasicBlock:
    """torchvision's block of two 3x3 convolutions. Where the shape changes, the shortcut is a 1x1 convolution and a
    BatchNorm (option B of He et al. 2016)."""
    if stride == 1 and channels == out:
        return BasicBlock(channels, out)
    shortcut = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))
    return BasicBlock(channels, out, stride, shortcut)


def cifar_resnet(depth: int, width: int, num_classes: int, image_shape: ImageShape) -> nn.Module:
    """open_lth's cifar_resnet_N_W: `CifarResNet` with projection shortcuts; W is 16 where the name has none.

    With 10 classes 272,474 (20), 466,906 (32), 661,338 (44), 855,770 (56) and 1,730,714 (110) parameters.
    """
    model = CifarResNet(depth, num_classes, image_shape, _projection_block, width)
    open_lth_init(model)
    return model


def cifar_vgg(depth: int, num_classes: int, image_shape: ImageShape) -> nn.Module:
    """open_lth's cifar_vgg_N: VGG with BatchNorm that averages its last 2x2 maps; `CifarVGG` takes their maximum.

    The parameters are those of `CifarVGG`: 14,728,266 of VGG-16 with 10 classes.
    """
    model = CifarVGG(depth, True, num_classes, image_shape)
    model.features[-1] = nn.Identity()  # in place of the last max-pool: the forward pass averages what is left
    open_lth_init(model)
    return model
