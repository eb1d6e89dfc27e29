"""Random small networks, and what scoring may not change: shared by the tests of pruning."""

from collections.abc import Callable

import torch
from hypothesis import strategies as st
from torch import nn

from utils.conv_type import insert_masks, kept_counts, masked_params


def masks_of(model):
    return [mask for _, _, mask in masked_params(model)]


def numbers(model):
    masks = masks_of(model)
    return sum(kept_counts(masks)), sum(mask.numel() for mask in masks)


def small(bias=False, seed=0):
    torch.manual_seed(seed)
    return insert_masks(
        nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1, bias=bias),
            nn.ReLU(),
            nn.Conv2d(4, 6, 3, bias=bias),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(24, 8, bias=bias),
            nn.ReLU(),
            nn.Linear(8, 3, bias=bias),
        )
    )


class Attention(nn.Module):
    """Self-attention over the pixels of an image, as a residual branch."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.attention = nn.MultiheadAttention(channels, 1, batch_first=True)

    def forward(self, x):
        tokens = self.norm(x.flatten(2).transpose(1, 2))
        tokens = tokens + self.attention(tokens, tokens, tokens, need_weights=False)[0]
        return tokens.transpose(1, 2).reshape(x.shape)


class Twice(nn.Module):
    """The same layer in two places: one weight, two names."""

    def __init__(self, channels: int):
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 1)
        self.second = self.first

    def forward(self, x):
        return self.second(torch.relu(self.first(x)))


class Tied(nn.Module):
    """Two layers with one weight and biases of their own."""

    def __init__(self, channels: int):
        super().__init__()
        self.one, self.two = nn.Conv2d(channels, channels, 1), nn.Conv2d(channels, channels, 1)
        self.two.weight = self.one.weight

    def forward(self, x):
        return self.two(torch.relu(self.one(x)))


@st.composite
def networks(draw) -> Callable[[], nn.Module]:
    """A recipe for a network of up to six masked layers and a few hundred weights: the same one at each call."""
    seed = draw(st.integers(0, 1000))
    choices = ["conv", "depthwise", "grouped", "attention", "twice", "tied", "one"]
    kinds = draw(st.lists(st.sampled_from(choices), min_size=1, max_size=4))
    widths = [draw(st.sampled_from([2, 4])) for _ in kinds]
    zeros = draw(st.sampled_from(["none", "none", "some", "a layer", "all equal", "all"]))

    def build() -> nn.Module:
        torch.manual_seed(seed)
        layers, channels = [], 2
        for kind, width in zip(kinds, widths):
            if kind == "one":  # a layer of a single weight, on the mean over channels
                layers += [MeanChannel(), nn.Conv2d(1, 1, 1), Widen(channels)]
            elif kind == "attention":
                layers.append(Attention(channels))
            elif kind in ("twice", "tied"):
                layers.append(Twice(channels) if kind == "twice" else Tied(channels))
            elif kind == "depthwise":
                layers += [nn.Conv2d(channels, channels, 3, padding=1, groups=channels), nn.ReLU()]
            elif kind == "grouped":
                layers += [nn.Conv2d(channels, 2 * width, 1, groups=2, bias=False), nn.BatchNorm2d(2 * width)]
                channels = 2 * width
            else:
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
                channels = width
        model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.5), nn.Linear(channels, 3))
        with torch.no_grad():
            weights = [param for param in model.parameters() if param.dim() > 1]
            if zeros == "some":
                for weight in weights:
                    weight.mul_(torch.rand_like(weight) < 0.5)
            elif zeros == "a layer":
                weights[seed % len(weights)].zero_()
            elif zeros != "none":
                for weight in weights:
                    weight.fill_(0.1 if zeros == "all equal" else 0.0)
        return insert_masks(model)

    return build


class MeanChannel(nn.Module):
    def forward(self, x):
        return x.mean(1, keepdim=True)


class Widen(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.channels = channels

    def forward(self, x):
        return x.expand(-1, self.channels, -1, -1)


def batches_for(model, count=2):
    draws = torch.Generator().manual_seed(5)
    dtype = next(model.parameters()).dtype
    return [
        (torch.randn(3, 2, 4, 4, generator=draws).to(dtype), torch.randint(3, (3,), generator=draws))
        for _ in range(count)
    ]


def snapshot(model):
    """Everything that scoring may not change, apart from pruned weights and masks."""
    return {
        "state": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "modes": [module.training for module in model.modules()],
        "grads": [None if param.grad is None else param.grad.clone() for param in model.parameters()],
        "tensors": [(id(param), param.data_ptr(), param.requires_grad) for param in model.parameters()],
        "rng": torch.get_rng_state(),
    }


def assert_untouched(model, before, pruned=True):
    after = snapshot(model)
    assert after["modes"] == before["modes"]
    assert after["tensors"] == before["tensors"]
    assert torch.equal(after["rng"], before["rng"])
    for now, then in zip(after["grads"], before["grads"]):
        assert (now is None) == (then is None)
        assert now is None or torch.equal(now, then)
    expected = dict(before["state"])
    if pruned:
        for name, _, mask in masked_params(model):
            expected[name] = expected[name] * mask
    for name, tensor in after["state"].items():
        shared = ".second." in name or ".two." in name  # a weight's second name is masked by the mask at its first
        if not (pruned and (shared or name.endswith("_mask"))):
            assert torch.equal(tensor, expected[name]), name
