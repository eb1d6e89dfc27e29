"""An independent contender for accuracy.py: one network trained dense, pruned once and retrained, in plain PyTorch.

    python tests/benchmarks/plain_recipe.py --network resnet20 --data ImageFolder --root DIR --epochs 15 \
        --batch_size 128 --lr 0.1 --weight_decay 5e-4 --seed 0 --precision bf16 --threads 1

It imports nothing of the harness: data sets, transforms, loader, optimizer, schedule and pruning are torch's and
torchvision's own, so that an error of the harness is not made here too. The last line printed is JSON: test accuracy in
percent and density (kept share of convolution and linear weights) of both levels.
"""

import argparse
import functools
import json
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.optim.lr_scheduler import MultiStepLR
from torch.utils.data import DataLoader, Dataset
from torchvision import models
from torchvision.datasets import FashionMNIST, ImageFolder
from torchvision.datasets.folder import default_loader
from torchvision.models.vgg import cfgs, make_layers
from torchvision.transforms import v2

TEST_BATCH = 500  # images

# --- networks: (classes, (channels, height, width)) -> module from float (N, C, H, W) to logits (N, classes) ----------


def he_convolutions(model: nn.Module) -> nn.Module:
    """Convolutions ~ N(0, 2 / fan_out) (He et al. 2015, as torchvision's ResNets); the rest stays as torch draws it."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return model


def glorot(model: nn.Module) -> nn.Module:
    """Weights ~ N(0, 2 / (fan_in + fan_out)), biases 0 (Frankle & Carbin 2019)."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.xavier_normal_(module.weight)
            nn.init.zeros_(module.bias)
    return model


def lenet(classes: int, shape: tuple[int, int, int]) -> nn.Module:
    """LeNet-300-100."""
    pixels = shape[0] * shape[1] * shape[2]
    layers = [nn.Linear(pixels, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, classes)]
    return glorot(nn.Sequential(nn.Flatten(), *layers))


def conv4(classes: int, shape: tuple[int, int, int]) -> nn.Module:
    """Conv-4 of Frankle & Carbin 2019, figure 2: 2 x 64 and 2 x 128 channels, max-pools, Linear 256, 256, classes."""
    channels, height, width = shape
    return glorot(
        nn.Sequential(
            *(nn.Conv2d(channels, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1), nn.ReLU()),
            nn.MaxPool2d(2),
            *(nn.Conv2d(64, 128, 3, padding=1), nn.ReLU(), nn.Conv2d(128, 128, 3, padding=1), nn.ReLU()),
            nn.MaxPool2d(2),
            nn.Flatten(),
            *(nn.Linear(128 * (height // 4) * (width // 4), 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU()),
            nn.Linear(256, classes),
        )
    )


class BasicBlockA(nn.Module):
    """He et al. 2016, section 4.2: two 3x3 convolutions; shortcut A, subsampled and padded with zero channels."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride, self.padding = stride, outputs - inputs

    def forward(self, x: Tensor) -> Tensor:
        shortcut = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.padding))
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + shortcut)


def resnet20(classes: int, shape: tuple[int, int, int]) -> nn.Module:
    """CIFAR ResNet-20: three stages of three blocks, 16, 32 and 64 channels."""
    layers = [nn.Conv2d(shape[0], 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    for inputs, outputs, stride in ((16, 16, 1), (16, 32, 2), (32, 64, 2)):
        layers += [BasicBlockA(inputs, outputs, stride), *(BasicBlockA(outputs, outputs, 1) for _ in range(2))]
    return he_convolutions(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, classes)))


def resnet18(classes: int, shape: tuple[int, int, int]) -> nn.Module:
    """torchvision's ResNet-18 with the CIFAR stem: a 3x3 convolution of stride 1, no max-pool."""
    model = models.resnet18(num_classes=classes)
    model.conv1 = nn.Conv2d(shape[0], 64, 3, padding=1, bias=False)
    model.maxpool = nn.Identity()
    return he_convolutions(model)


class PreActivationBlock(nn.Module):
    """He et al. 2016b. The shortcut splits off before the first BatchNorm, or after it where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int, first: bool):
        super().__init__()
        self.pre = nn.Identity() if first else nn.Sequential(nn.BatchNorm2d(inputs), nn.ReLU())
        self.residual = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
        )
        self.project = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        active = self.pre(x)
        return self.residual(active) + (x if self.project is None else self.project(active))


def preresnet(classes: int, shape: tuple[int, int, int]) -> nn.Module:
    """Pre-activation ResNet-18, CIFAR stem. The stem's activation serves the first block too (the paper's appendix)."""
    layers = [nn.Conv2d(shape[0], 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    for inputs, outputs in ((64, 64), (64, 128), (128, 256), (256, 512)):
        layers.append(PreActivationBlock(inputs, outputs, 1 if inputs == outputs else 2, first=inputs == outputs))
        layers.append(PreActivationBlock(outputs, outputs, 1, first=False))
    layers += [nn.BatchNorm2d(512), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, classes)]
    return he_convolutions(nn.Sequential(*layers))


def vgg16_bn(classes: int, shape: tuple[int, int, int]) -> nn.Module:
    """torchvision's VGG-16-bn features, drawn as torchvision draws them; average pool to 1x1, one linear layer."""
    assert shape[0] == 3, shape
    features = he_convolutions(make_layers(cfgs["D"], batch_norm=True))
    classifier = nn.Linear(512, classes)
    nn.init.normal_(classifier.weight, std=0.01)
    for module in [*features, classifier]:
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.zeros_(module.bias)
    return nn.Sequential(features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), classifier)


NETWORKS: dict[str, Callable[[int, tuple[int, int, int]], nn.Module]] = {
    "lenet_300_100": lenet,
    "conv4": conv4,
    "resnet20": resnet20,
    "resnet18": resnet18,
    "preresnet": preresnet,
    "vgg16_bn": vgg16_bn,
}

# --- data -------------------------------------------------------------------------------------------------------------


def channel_statistics(images: Iterable[Any]) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel over all pixels of PIL images of one size, scaled to 0..1."""
    means, squares = [], []
    for image in images:
        pixels = np.atleast_3d(np.asarray(image)) / 255
        means.append(pixels.mean((0, 1)))
        squares.append((pixels**2).mean((0, 1)))
    mean = np.mean(means, axis=0)
    return mean.tolist(), np.sqrt(np.mean(squares, axis=0) - mean**2).tolist()


def load(data: str, root: str) -> tuple[Dataset, Dataset]:
    """Training and test set with their transforms; a tree's images are decoded once and cropped and flipped (+-4)."""
    if data == "FashionMNIST":
        train, test = FashionMNIST(root, train=True), FashionMNIST(root, train=False)
        augment = []
    else:
        decode = functools.cache(default_loader)
        train, test = ImageFolder(f"{root}/train", loader=decode), ImageFolder(f"{root}/test", loader=decode)
        assert train.class_to_idx == test.class_to_idx
        size = train[0][0].size[::-1]
        augment = [v2.RandomCrop(size, padding=4), v2.RandomHorizontalFlip()]
    mean, std = channel_statistics(train[index][0] for index in range(len(train)))
    to_tensor = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)]
    train.transform = v2.Compose([*augment, *to_tensor])
    test.transform = v2.Compose(to_tensor)
    return train, test


# --- a level ----------------------------------------------------------------------------------------------------------


def autocast(args: argparse.Namespace) -> torch.autocast:
    return torch.autocast(args.device.type, dtype=torch.bfloat16, enabled=args.precision == "bf16")


def train_level(model: nn.Module, data: Dataset, args: argparse.Namespace) -> None:
    """SGD from a fresh optimizer; rate x 0.1 after 1/2 and 3/4 of the steps, as He et al. 2016 count (in steps)."""
    loader = DataLoader(data, args.batch_size, shuffle=True)
    optimizer = torch.optim.SGD(model.parameters(), args.lr, momentum=0.9, weight_decay=args.weight_decay)
    steps = args.epochs * len(loader)
    schedule = MultiStepLR(optimizer, [-(-steps // 2), -(-3 * steps // 4)], gamma=0.1)
    model.train()
    for _ in range(args.epochs):
        for images, labels in loader:
            images, labels = images.to(args.device), labels.to(args.device)
            with autocast(args):
                loss = F.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()


@torch.no_grad()
def accuracy(model: nn.Module, data: Dataset, args: argparse.Namespace) -> float:
    """Percent of the images whose largest logit is their label's."""
    model.eval()
    correct = 0
    for images, labels in DataLoader(data, TEST_BATCH):
        with autocast(args):
            logits = model(images.to(args.device))
        correct += (logits.argmax(1).cpu() == labels).sum().item()
    return 100 * correct / len(data)


def run(args: argparse.Namespace) -> dict[str, float]:
    """Trains, prunes the smallest weights of all layers together, and trains again from the weights that are left."""
    torch.manual_seed(args.seed)
    train, test = load(args.data, args.root)
    model = NETWORKS[args.network](len(train.classes), tuple(train[0][0].shape)).to(args.device)
    train_level(model, train, args)
    dense = accuracy(model, test, args)
    layers = [(m, "weight") for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    prune.global_unstructured(layers, pruning_method=prune.L1Unstructured, amount=args.prune_rate)
    train_level(model, train, args)
    masks = [layer.weight_mask for layer, _ in layers]
    density = sum(mask.sum().item() for mask in masks) / sum(mask.numel() for mask in masks)
    return {"dense": dense, "pruned": accuracy(model, test, args), "density": density}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--network", choices=list(NETWORKS), required=True)
    parser.add_argument("--data", choices=["ImageFolder", "FashionMNIST"], required=True)
    parser.add_argument("--root", required=True, help="ImageFolder: has train/CLASS/ and test/CLASS/")
    parser.add_argument("--epochs", type=int, required=True, help="of each of the two levels")
    parser.add_argument("--batch_size", type=int, required=True, help="images")
    parser.add_argument("--lr", type=float, required=True, help="first learning rate")
    parser.add_argument("--weight_decay", type=float, required=True)
    parser.add_argument("--prune_rate", type=float, default=0.8, help="share of the weights pruned")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--precision", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(json.dumps(run(args)))


if __name__ == "__main__":
    main()
