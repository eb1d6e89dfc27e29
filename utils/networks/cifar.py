"""Networks for small images, with the sizes and initialisations of their papers.

Every network here is built by ``(num_classes, image_shape)`` (other arguments are bound in `utils.models.MODELS`),
takes float images (N, C, H, W) and returns logits (N, num_classes). Layers are named as in torchvision where it has a
similar network.
"""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from utils.data.specs import SMALL_PIXELS

ImageShape = tuple[int, int, int]
Block = Callable[[int, int, int], nn.Module]  # (channels in, channels out, stride) -> a residual block


class UnsuitableImages(ValueError):
    """A model cannot take images of some shape: the reason. `utils.models` adds the model's name and the size."""


def is_small(image_shape: ImageShape) -> bool:
    """True for (C, H, W) images that get the CIFAR stem; torchvision's would first shrink them 4 to 16 times."""
    return max(image_shape[1:]) <= SMALL_PIXELS


def glorot_init(model: nn.Module) -> None:
    """Weights ~ N(0, 2 / (fan_in + fan_out)), biases 0: the "Gaussian Glorot" of Frankle & Carbin 2019."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.xavier_normal_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def he_init_convolutions(model: nn.Module) -> None:
    """Convolutions ~ N(0, 2 / fan_out), their biases 0 (He et al. 2015; fan_out as in torchvision). Nothing else.

    The classifier keeps torch's default, U(-b, b) with b = 1 / sqrt(fan_in), as in torchvision's ResNets: no ReLU
    follows it, so He's factor of 2 would only make the first logits 2.45 times as large, and a short training would
    first have to shrink them. BatchNorm starts at (1, 0), torch's default.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


class LeNet300100(nn.Module):
    """LeNet-300-100 (LeCun et al. 1998, as in Frankle & Carbin 2019): 266,610 parameters at 1x28x28 and 10 classes."""

    def __init__(self, num_classes: int, image_shape: ImageShape):
        super().__init__()
        channels, height, width = image_shape
        self.fc1 = nn.Linear(channels * height * width, 300)
        self.fc2 = nn.Linear(300, 100)
        self.fc3 = nn.Linear(100, num_classes)
        glorot_init(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x.flatten(1)).relu_()
        x = self.fc2(x).relu_()
        return self.fc3(x)


class ConvNet(nn.Module):
    """Conv-2, Conv-4 and Conv-6 (Frankle & Carbin 2019, figure 2): pairs of 3x3 convolutions (64, 128, 256 channels),
    a 2x2 max-pool after each pair, then Linear 256, 256 and num_classes.

    At 3x32x32 and 10 classes 4,301,642, 2,425,930 and 2,262,602 parameters, of which 38 K, 260 K and 1.1 M in
    convolutions: the paper's own numbers except for the total of Conv-6, which it gives as 1.7 M.

    Raises:
        UnsuitableImages: no pixel is left after the pools.
    """

    def __init__(self, depth: int, num_classes: int, image_shape: ImageShape):
        super().__init__()
        channels, height, width = image_shape
        shrink = 2 ** (depth // 2)
        if min(height, width) < shrink:
            raise UnsuitableImages(f"its {depth // 2} max-pools need images of at least {shrink}x{shrink} pixels")
        layers: list[nn.Module] = []
        for out in (64, 128, 256)[: depth // 2]:
            layers += [nn.Conv2d(channels, out, 3, padding=1), nn.ReLU(inplace=True)]
            layers += [nn.Conv2d(out, out, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2)]
            channels = out
        self.features = nn.Sequential(*layers)
        self.fc1 = nn.Linear(channels * (height // shrink) * (width // shrink), 256)
        self.fc2 = nn.Linear(256, 256)
        self.fc3 = nn.Linear(256, num_classes)
        glorot_init(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(self.features(x).flatten(1)).relu_()
        x = self.fc2(x).relu_()
        return self.fc3(x)


class _BlockA(nn.Module):
    """Two 3x3 convolutions and a parameter-free shortcut (option A): every stride-th pixel, new channels zero."""

    def __init__(self, channels: int, out: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.stride = stride
        self.new_channels = out - channels

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = self.bn2(self.conv2(out))
        if self.new_channels:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.new_channels))
        out += x
        return F.relu(out, inplace=True)


class CifarResNet(nn.Module):
    """The CIFAR ResNets of He et al. 2016, section 4.2: 6n + 2 layers, stages of 16, 32 and 64 channels, option A.

    With 10 classes 269,722 (20), 464,154 (32), 658,586 (44), 853,018 (56) and 1,727,962 (110) parameters.
    Initialisation: He-normal convolutions, torch's default for the classifier (`he_init_convolutions`).

    Args:
        block: (channels in, channels out, stride) -> a block with another shortcut.
        width: channels of the first stage; the others have 2 and 4 times as many.
    """

    def __init__(self, depth: int, num_classes: int, image_shape: ImageShape, block: Block = _BlockA, width: int = 16):
        super().__init__()
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(image_shape[0], width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = self._stage(block, width, width, 1, blocks)
        self.layer2 = self._stage(block, width, 2 * width, 2, blocks)
        self.layer3 = self._stage(block, 2 * width, 4 * width, 2, blocks)
        self.fc = nn.Linear(4 * width, num_classes)
        he_init_convolutions(self)

    @staticmethod
    def _stage(block: Block, channels: int, out: int, stride: int, blocks: int) -> nn.Sequential:
        return nn.Sequential(block(channels, out, stride), *(block(out, out, 1) for _ in range(1, blocks)))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(x.mean((2, 3)))


class _PreActBlock(nn.Module):
    """BN-ReLU-conv twice beside an identity shortcut; if the shape changes, a 1x1 convolution of the pre-activation."""

    def __init__(self, channels: int, out: int, stride: int, preact: bool):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels) if preact else None
        self.conv1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        changes = stride != 1 or channels != out
        self.downsample = nn.Conv2d(channels, out, 1, stride, bias=False) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        out = x if self.bn1 is None else F.relu(self.bn1(x), inplace=True)
        shortcut = x if self.downsample is None else self.downsample(out)
        out = F.relu(self.bn2(self.conv1(out)), inplace=True)
        return self.conv2(out) + shortcut


class PreResNet(nn.Module):
    """Pre-activation ResNet-18 (He et al. 2016b): 11,172,170 parameters with the CIFAR stem and 10 classes.

    As in the paper's appendix, the stem's BN and ReLU serve as the first block's pre-activation, before its split
    into two paths, and a last BN and ReLU follow the last block. Images above 64 pixels get the 7x7 stem and max-pool.
    Initialisation: He-normal convolutions, torch's default for the classifier (`he_init_convolutions`).
    """

    def __init__(self, num_classes: int, image_shape: ImageShape):
        super().__init__()
        small = is_small(image_shape)
        kernel, stride, padding = (3, 1, 1) if small else (7, 2, 3)
        self.conv1 = nn.Conv2d(image_shape[0], 64, kernel, stride, padding, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.maxpool = nn.Identity() if small else nn.MaxPool2d(3, 2, 1)
        self.layer1 = nn.Sequential(_PreActBlock(64, 64, 1, preact=False), _PreActBlock(64, 64, 1, preact=True))
        self.layer2 = self._stage(64, 128)
        self.layer3 = self._stage(128, 256)
        self.layer4 = self._stage(256, 512)
        self.bn2 = nn.BatchNorm2d(512)
        self.fc = nn.Linear(512, num_classes)
        he_init_convolutions(self)

    @staticmethod
    def _stage(channels: int, out: int) -> nn.Sequential:
        return nn.Sequential(_PreActBlock(channels, out, 2, preact=True), _PreActBlock(out, out, 1, preact=True))

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(F.relu(self.bn1(self.conv1(x)), inplace=True))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        x = F.relu(self.bn2(x), inplace=True)
        return self.fc(x.mean((2, 3)))


# Widths of Simonyan & Zisserman 2015, table 1 (configurations A, B, D, E); "M" is a 2x2 max-pool.
_VGG_LAYERS = {
    11: (64, "M", 128, "M", 256, 256, "M", 512, 512, "M", 512, 512, "M"),
    13: (64, 64, "M", 128, 128, "M", 256, 256, "M", 512, 512, "M", 512, 512, "M"),
    16: (64, 64, "M", 128, 128, "M", *(256,) * 3, "M", *(512,) * 3, "M", *(512,) * 3, "M"),
    19: (64, 64, "M", 128, 128, "M", *(256,) * 4, "M", *(512,) * 4, "M", *(512,) * 4, "M"),
}


class CifarVGG(nn.Module):
    """VGG for small images: torchvision's `features` (names and init), global average pool, one Linear classifier.

    VGG-16-bn has 14,728,266 parameters with 10 classes. Images below 32 pixels are too small for all max-pools: a pool
    that would leave no pixel is left out, which changes no parameter and no name.
    """

    def __init__(self, depth: int, batch_norm: bool, num_classes: int, image_shape: ImageShape):
        super().__init__()
        channels, *size = image_shape
        layers: list[nn.Module] = []
        left = min(size)
        for width in _VGG_LAYERS[depth]:
            if isinstance(width, str):
                layers.append(nn.MaxPool2d(2) if left > 1 else nn.Identity())
                left = max(left // 2, 1)
                continue
            layers.append(nn.Conv2d(channels, width, 3, padding=1))
            layers += [nn.BatchNorm2d(width)] if batch_norm else []
            layers.append(nn.ReLU(inplace=True))
            channels = width
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(512, num_classes)
        he_init_convolutions(self)
        nn.init.normal_(self.classifier.weight, std=0.01)  # as torchvision's
        nn.init.zeros_(self.classifier.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).mean((2, 3)))
