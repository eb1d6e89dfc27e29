"""Augmentation of whole batches on the device: images mixed by pairs (mixup, CutMix), rectangles erased.

The definitions are those of torchvision.transforms.v2: ``MixUp``, ``CutMix``, of both ``RandomChoice`` with equal
chances, and ``RandomErasing``. The partner of an image is the one before it in the global batch, of the first one the
last. Numbers that are drawn depend on (data seed, level, epoch, step) alone, or on the image's place in the epoch, so
that a global batch is the same however it is split among processes, and whether or not the run was resumed.

Nothing here reads a value on the device: a step with it can be captured as a CUDA graph.
"""

import math
from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor

from harness_params import Config
from utils.seeds import stable_seed

# Takes a further place in the seeds of an epoch's steps, of the draws of its rectangles.
MIX_DRAWS, ERASE_DRAWS = -3, -4
# Of torchvision's RandomErasing: area over that of the image, height over width, tries until one fits.
ERASE_AREA, ERASE_RATIO, ERASE_TRIES = (0.02, 0.33), (0.3, 3.3), 10


@dataclass(frozen=True)
class Mixing:
    """How the images of a batch are mixed by pairs; nothing where both alphas are 0.

    Attributes:
        mixup, cutmix: alpha of Beta(alpha, alpha), of which lambda is drawn; 0 = off. Of both, each step takes one.
        num_classes: classes of the labels.
    """

    mixup: float
    cutmix: float
    num_classes: int

    def __bool__(self) -> bool:
        return self.mixup > 0 or self.cutmix > 0

    def draw(self, seed: int, level: int, epoch: int, step: int, height: int, width: int) -> Tensor:
        """int64 (8,) on the CPU, what is drawn for a step: top, bottom, left and right of the box that the partner
        fills; then as the bits of float64 the weights of image and partner outside it, and of their labels.

        lambda of CutMix is corrected to the share of the box that lies within the image (Yun et al. 2019).
        """
        rng = Random(stable_seed(seed, level, epoch, step, MIX_DRAWS))
        cut = self.cutmix > 0 and (self.mixup == 0 or rng.random() < 0.5)
        alpha = self.cutmix if cut else self.mixup
        share, box, pixels = rng.betavariate(alpha, alpha), (0, 0, 0, 0), (1.0, 0.0)
        if cut:
            x, y, half = rng.randrange(width), rng.randrange(height), 0.5 * math.sqrt(1 - share)
            half_width, half_height = int(half * width), int(half * height)
            top, bottom = max(0, y - half_height), min(height, y + half_height)
            left, right = max(0, x - half_width), min(width, x + half_width)
            box, share = (top, bottom, left, right), 1 - (right - left) * (bottom - top) / (width * height)
        else:
            pixels = (share, 1 - share)
        weights = torch.tensor([*pixels, share, 1 - share], dtype=torch.float64)
        return torch.cat([torch.tensor(box), weights.view(torch.int64)])

    def mix(self, images: Tensor, labels: Tensor, partners: Tensor, their_labels: Tensor, drawn: Tensor) -> tuple:
        """Mixed images (N, C, H, W), and labels as float32 (N, classes), the share of each class.

        Args:
            images, labels: of the batch; `partners`, `their_labels`: of the image before each.
            drawn: of `draw`, on the device of the images.
        """
        own, other, own_label, other_label = drawn[4:].view(torch.float64).float().unbind()
        inside = boxes(drawn[:4].unsqueeze(1), images.shape[2], images.shape[3]).float()
        outside = 1 - inside
        mixed = (partners * (outside * other + inside)).add_(images * (outside * own))
        classes = torch.arange(self.num_classes, device=labels.device)
        ours, theirs = labels.unsqueeze(1) == classes, their_labels.unsqueeze(1) == classes
        return mixed, theirs * other_label + ours * own_label


def boxes(edges: Tensor, height: int, width: int) -> Tensor:
    """bool (N, 1, height, width): where the boxes are. Args: edges: int64 (4, N), top, bottom, left, right."""
    top, bottom, left, right = edges.view(4, -1, 1, 1, 1).unbind()
    y = torch.arange(height, device=edges.device).view(-1, 1)
    x = torch.arange(width, device=edges.device)
    return (y >= top) & (y < bottom) & (x >= left) & (x < right)


def draw_rectangle(probability: float, height: int, width: int, rng: Random) -> tuple[int, int, int, int]:
    """Top, bottom, left and right of the rectangle that is erased in an image; zeros for none."""
    if rng.random() >= probability:
        return 0, 0, 0, 0
    for _ in range(ERASE_TRIES):
        area = height * width * rng.uniform(*ERASE_AREA)
        ratio = math.exp(rng.uniform(math.log(ERASE_RATIO[0]), math.log(ERASE_RATIO[1])))
        high, wide = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if high < height and wide < width:
            top, left = rng.randint(0, height - high), rng.randint(0, width - wide)
            return top, top + high, left, left + wide
    return 0, 0, 0, 0


def draw_rectangles(
    probability: float, num_images: int, seed: int, level: int, epoch: int, height: int, width: int
) -> Tensor:
    """int64 (4, num_images) by place in the epoch: as `draw_rectangle`, drawn for all images at once."""
    generator = torch.Generator().manual_seed(stable_seed(seed, level, epoch, ERASE_DRAWS))

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(*shape, num_images, generator=generator, dtype=torch.float64)

    erased = uniform(0, 1) < probability
    area = height * width * uniform(*ERASE_AREA, ERASE_TRIES)
    ratio = uniform(math.log(ERASE_RATIO[0]), math.log(ERASE_RATIO[1]), ERASE_TRIES).exp()
    high, wide = (area * ratio).sqrt().round().long(), (area / ratio).sqrt().round().long()
    fits = (high < height) & (wide < width)
    first = fits.int().argmax(0, keepdim=True)  # of equals, the first
    high, wide = high.gather(0, first)[0], wide.gather(0, first)[0]
    top = (uniform(0, 1) * (height - high + 1)).long()
    left = (uniform(0, 1) * (width - wide + 1)).long()
    return torch.stack([top, top + high, left, left + wide]) * (erased & fits.any(0))


def erase(images: Tensor, edges: Tensor) -> Tensor:
    """The normalised images (N, C, H, W) with zeros in their rectangles, int64 (4, N), in place."""
    return images.masked_fill_(boxes(edges, images.shape[2], images.shape[3]), 0.0)


def hard_labels(labels: Tensor) -> Tensor:
    """The class of each image (N,): of mixed labels (N, classes) that of the larger share, of equals the first."""
    return labels.argmax(1) if labels.ndim == 2 else labels


def mixing_of(cfg: Config, num_classes: int) -> Mixing:
    """The mixing that a config asks for."""
    return Mixing(cfg.dataset.mixup, cfg.dataset.cutmix, num_classes)
