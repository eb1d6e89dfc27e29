"""The usual pruning harness: what is common practice, written as a contender of the benchmark.

- Masks are float buffers of layer subclasses, multiplied in every forward.
- float32, contiguous (NCHW) images and weights.
- A torchvision-style data set of uint8 arrays: PIL image, transforms, ToTensor, Normalize, one image at a time in the
  workers of a DataLoader, which start anew each epoch.
- `.item()` on the loss and on the number of correct images in every step.
- With several processes, DDP as it comes, which broadcasts all buffers, masks among them, in each forward.
- Each level is a process of its own, with its imports, data, model and optimizer. Run as a program, this file is one;
  so it imports nothing else of the benchmark.

    python -m utils.bench.usual_harness FOLDER     # FOLDER as `lay_out` writes it
"""

import json
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TypedDict

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from torchvision import transforms

from utils.models import create_model


class Settings(TypedDict):
    """What the usual harness needs to know; plain values, which a process of a level reads from JSON."""

    model: str
    arguments: Sequence[str]
    blurpool: bool
    classes: int
    shape: tuple[int, int, int]  # (C, H, W); a list from JSON
    mean: Sequence[float]
    std: Sequence[float]
    crop: bool
    flip: bool
    batch: int  # of all ranks together
    workers: int
    lr: float
    momentum: float
    weight_decay: float
    threads: int


class MaskedConv2d(nn.Conv2d):
    """A convolution that multiplies its weight by its mask in each forward."""

    mask: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight * self.mask, self.bias)


class MaskedLinear(nn.Linear):
    """A linear layer that multiplies its weight by its mask in each forward."""

    mask: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.mask, self.bias)


MASKED: dict[type[nn.Module], type[MaskedConv2d] | type[MaskedLinear]] = {
    nn.Conv2d: MaskedConv2d,
    nn.Linear: MaskedLinear,
}


def make_model(settings: Settings, device: torch.device) -> nn.Module:
    """The network, its layers replaced by masked ones."""
    model = create_model(
        settings["model"], settings["classes"], settings["shape"], settings["blurpool"], arguments=settings["arguments"]
    )
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear) and type(module) in MASKED:
            module.register_buffer("mask", torch.ones_like(module.weight))
            module.__class__ = MASKED[type(module)]
    return model.to(device)


def prune(model: nn.Module, density: float) -> None:
    """Keeps the `density` largest weights, over all layers."""
    layers = [module for module in model.modules() if isinstance(module, MaskedConv2d | MaskedLinear)]
    scores = torch.cat([(layer.weight.detach() * layer.mask).abs().flatten() for layer in layers])
    threshold = torch.kthvalue(scores, max(1, round((1 - density) * scores.numel()))).values
    for layer in layers:
        layer.mask.copy_(((layer.weight.detach() * layer.mask).abs() > threshold).float())


class Images(Dataset):
    """uint8 (N, H, W, C) and labels (N,), as torchvision's data sets hold and return them."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, transform: Callable[[Image.Image], Tensor]):
        self.images, self.labels, self.transform = images, labels, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = self.images[index]
        pixels = Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image)
        return self.transform(pixels), int(self.labels[index])


def make_loader(images: np.ndarray, labels: np.ndarray, s: Settings, rank: int = 0, world: int = 1) -> DataLoader:
    """Shuffled batches of s["batch"] images (over all ranks) by s["workers"] processes."""
    steps = [transforms.RandomCrop(s["shape"][1:], padding=4)] if s["crop"] else []
    steps += [transforms.RandomHorizontalFlip()] if s["flip"] else []
    steps += [transforms.ToTensor(), transforms.Normalize(s["mean"], s["std"])]
    dataset = Images(images, labels, transforms.Compose(steps))
    sampler: DistributedSampler | None = DistributedSampler(dataset, world, rank) if world > 1 else None
    return DataLoader(
        dataset, s["batch"] // world, shuffle=sampler is None, sampler=sampler, num_workers=s["workers"],
        pin_memory=torch.cuda.is_available(),
    )  # fmt: skip


class UsualHarness:
    """Network, optimizer and training loop of one level."""

    def __init__(self, settings: Settings, device: torch.device, world: int = 1):
        self.device, self.world, self.threads = device, world, torch.get_num_threads()
        self.model = make_model(settings, device)
        self.net = nn.parallel.DistributedDataParallel(self.model) if world > 1 else self.model
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), settings["lr"], settings["momentum"], weight_decay=settings["weight_decay"]
        )
        self.criterion = nn.CrossEntropyLoss()

    def train(self, batches: Iterable[tuple[Tensor, Tensor]], steps: int) -> tuple[int, float]:
        """Trains on the first `steps` of `batches`; returns (images of all ranks, seconds)."""
        torch.set_num_threads(self.threads)
        start, seen, total, correct = time.perf_counter(), 0, 0.0, 0
        self.net.train()
        for step, (images, labels) in enumerate(batches, start=1):
            images, labels = images.to(self.device), labels.to(self.device)
            self.optimizer.zero_grad()
            outputs = self.net(images)
            loss = self.criterion(outputs, labels)
            loss.backward()
            self.optimizer.step()
            total += loss.item()
            correct += outputs.argmax(1).eq(labels).sum().item()
            seen += len(labels)
            if step == steps:  # the clock stops before the loader ends its workers
                return seen * self.world, time.perf_counter() - start
        return seen * self.world, time.perf_counter() - start


def lay_out(folder: Path, settings: Settings, images: np.ndarray, labels: np.ndarray) -> None:
    """Write what the process of a level reads: settings, data, the initial weights, those of the level before."""
    (folder / "settings.json").write_text(json.dumps(settings))
    np.save(folder / "images.npy", images)
    np.save(folder / "labels.npy", labels)
    state = make_model(settings, torch.device("cpu")).state_dict()
    torch.save(state, folder / "init.pt")
    torch.save(state, folder / "level_0.pt")


def main() -> None:
    """Run one level up to its first step; print when that step ended, and the seconds of the second step."""
    folder = Path(sys.argv[1])
    settings = json.loads((folder / "settings.json").read_text())
    torch.set_num_threads(settings["threads"])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loader = make_loader(np.load(folder / "images.npy"), np.load(folder / "labels.npy"), settings)
    level = UsualHarness(settings, device)
    level.model.load_state_dict(torch.load(folder / "level_0.pt", weights_only=True))
    prune(level.model, 0.8)
    masks = {name: mask for name, mask in level.model.state_dict().items() if name.endswith("mask")}
    level.model.load_state_dict(torch.load(folder / "init.pt", weights_only=True) | masks)
    torch.save(level.model.state_dict(), folder / "level_1.pt")
    batches = iter(loader)
    level.train([next(batches)], 1)
    ended = time.monotonic()  # the machine's clock: the same for the process that started this one
    _, seconds = level.train([next(batches)], 1)
    print(json.dumps({"ended": ended, "step": seconds}))


if __name__ == "__main__":
    main()
