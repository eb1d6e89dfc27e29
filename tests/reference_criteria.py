"""SNIP, GraSP and SynFlow once more, straight from their papers' equations: slow, plain, sharing no code with utils/.

Weights are multiplied by explicit mask variables in every forward, as the papers write it; the Hessian-vector product
is forward-mode over reverse-mode differentiation; SynFlow is its algorithm 1, a loop of rounds on a copy of the network
whose parameters are made positive; and top-k is a full sort.

    python tests/reference_criteria.py [snip | grasp | synflow | density ...]

compares the harness's masks with these on ResNet-18 with the CIFAR stem, seed 0, float64 (some minutes).
"""

import copy
import math
import sys
import time

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from torch import nn


class MaskedConv(nn.Module):
    """A convolution that computes with c * w."""

    def __init__(self, conv):
        super().__init__()
        self.weight, self.bias = conv.weight, conv.bias
        self.options = (conv.stride, conv.padding, conv.dilation, conv.groups)
        self.c = nn.Parameter(torch.ones_like(conv.weight))

    def forward(self, x):
        return F.conv2d(x, self.c * self.weight, self.bias, *self.options)


class MaskedLinear(nn.Module):
    """A linear layer that computes with c * w."""

    def __init__(self, linear):
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.c = nn.Parameter(torch.ones_like(linear.weight))

    def forward(self, x):
        return F.linear(x, self.c * self.weight, self.bias)


def with_mask_variables(model):
    """A copy of `model`, in eval mode, whose convolutions and linear layers have mask variables; and these layers."""
    model = copy.deepcopy(model).eval()
    layers = []
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            masked = {nn.Conv2d: MaskedConv, nn.Linear: MaskedLinear}.get(type(child))
            if masked:
                setattr(parent, name, masked(child))
    for module in model.modules():
        if isinstance(module, MaskedConv | MaskedLinear):
            layers.append(module)
    return model, layers


def snip_saliency(model, batches):
    """|dL/dc| at c = 1, L summed over the batches (Lee et al. 2019, equations 5 and 6)."""
    model, layers = with_mask_variables(model)
    for images, labels in batches:
        F.cross_entropy(model(images), labels).backward()
    return [layer.c.grad.abs() for layer in layers]


def grasp_saliency(model, batches, temperature=200.0):
    """w * Hg (Wang et al. 2020, equation 8: S(-w) = -w * Hg; their pruning removes the largest of it)."""
    model, layers = with_mask_variables(model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    weights = {names[id(layer.weight)]: layer.weight.detach() for layer in layers}

    def loss(weights):
        total = 0.0
        for images, labels in batches:
            logits = torch.func.functional_call(model, weights, (images,)) / temperature
            total = total + F.cross_entropy(logits, labels)
        return total

    gradient = torch.func.grad(loss)
    _, hessian_gradient = torch.func.jvp(gradient, (weights,), (gradient(weights),))
    return [(weights[name] * hessian_gradient[name]).detach() for name in weights]


def synflow_masks(model, shape, density, rounds=100):
    """Tanaka et al. 2020, algorithm 1, on a copy whose state_dict is made positive throughout, as its authors do.

    The rule of their public code, in double precision: round i prunes the int((1 - density^(i / rounds)) * N) lowest
    of all N scores, and what ties with the highest of these.
    """
    model, layers = with_mask_variables(model.double())
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.abs_()
    total = sum(layer.c.numel() for layer in layers)
    ones = torch.ones((1, *shape), dtype=torch.float64)
    for i in range(1, rounds + 1):
        model.zero_grad()
        model(ones).sum().backward()  # R = 1' (prod |w|) 1
        # The gradient of w within c * w is c * dR/d(c w), so a pruned weight scores zero.
        scores = [(layer.weight.grad * layer.weight).detach().abs() for layer in layers]
        pruned = int((1 - density ** (i / rounds)) * total)
        if pruned >= 1:
            threshold = torch.cat([score.flatten() for score in scores]).kthvalue(pruned).values
            for layer, score in zip(layers, scores):
                layer.c.data.copy_(score > threshold)
    return [layer.c.data.bool() for layer in layers]


def top_k(scores, keep):
    """Ones at the `keep` largest of all scores, by a stable sort: of equal ones the first."""
    flat = np.concatenate([score.flatten().numpy() for score in scores])
    mask = np.zeros(len(flat), dtype=bool)
    mask[np.argsort(-flat, kind="stable")[:keep]] = True
    parts = torch.from_numpy(mask).split([score.numel() for score in scores])
    return [part.view(score.shape) for part, score in zip(parts, scores)]


def reference_masks(model, method, density, batches, rounds=100):
    """The masks of `method` ("snip", "grasp" or "synflow") in model order, with `density` of ones over all of them."""
    if method == "synflow":
        return synflow_masks(model, batches[0][0].shape[1:], density, rounds)
    total = sum(layer.c.numel() for layer in with_mask_variables(model)[1])
    keep = math.floor(density * total + 0.5)
    saliency = {"snip": snip_saliency, "grasp": grasp_saliency}[method]
    return top_k(saliency(model, batches), keep)


def resnet18_cifar(seed=0):
    """torchvision's ResNet-18 with the stem for 32x32 images, float64, and BN statistics unlike those of any batch."""
    torch.manual_seed(seed)
    model = torchvision.models.resnet18(num_classes=10)
    model.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=1, bias=False)
    model.maxpool = nn.Identity()
    model.double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.05)
            module.running_var.uniform_(0.5, 1.5)
    return model


def seeded_batches(count, size, seed=1):
    draws = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(size, 3, 32, 32, generator=draws, dtype=torch.float64),
            torch.randint(10, (size,), generator=draws),
        )
        for _ in range(count)
    ]


def iou(masks, others):
    """Ones in both over ones in either."""
    both = sum((mask & other).sum().item() for mask, other in zip(masks, others))
    either = sum((mask | other).sum().item() for mask, other in zip(masks, others))
    return both / either


def main(methods, densities):
    from utils.conv_type import insert_masks, masked_params
    from utils.pruning_utils import prune

    batches = seeded_batches(count=2, size=8)
    print("method   density   kept     IoU          weights that differ   seconds (harness, reference)")
    for method in methods:
        for density in densities:
            model = insert_masks(resnet18_cifar())
            started = time.perf_counter()
            prune(model, method, density, batches)
            middle = time.perf_counter()
            ours = [mask for _, _, mask in masked_params(model)]
            keep = sum(mask.sum().item() for mask in ours)
            wanted = reference_masks(resnet18_cifar(), method, density, batches)
            ended = time.perf_counter()
            differ = sum((a & ~b).sum().item() for a, b in zip(ours, wanted))
            times = f"{middle - started:.1f}, {ended - middle:.1f}"
            print(f"{method:8} {density:<9g} {keep:<8} {iou(ours, wanted):<12.8f} {differ:<21} {times}", flush=True)


if __name__ == "__main__":
    sys.path.insert(0, ".")
    known = ("snip", "grasp", "synflow")
    asked = [argument for argument in sys.argv[1:] if argument in known]
    main(asked or known, [float(argument) for argument in sys.argv[1:] if argument not in known] or [0.2, 0.05, 0.01])
