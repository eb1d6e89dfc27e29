"""Anti-aliased downsampling (Zhang 2019): a blur before every strided convolution."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def add_blurpool(model: nn.Module) -> int:
    """Blur the input of every strided convolution with at least 16 input channels; return their number.

    The filter is the fixed binomial [1, 2, 1] x [1, 2, 1] / 16 of Zhang 2019, zero-padded, as in ffcv-imagenet: 1x1
    shortcut convolutions are blurred, max-pools and option-A shortcuts are not. It is a forward pre-hook with a
    non-persistent buffer, so layers keep class and name, and the state_dict is that of the plain model.
    """
    count = 0
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and max(module.stride) > 1 and module.in_channels >= 16:
            taps = torch.tensor([1.0, 2.0, 1.0], dtype=module.weight.dtype, device=module.weight.device)
            kernel = (taps.outer(taps) / 16).expand(module.in_channels, 1, 3, 3).contiguous()
            module.register_buffer("blur_kernel", kernel, persistent=False)
            module.register_forward_pre_hook(_blur_input)
            count += 1
    return count


def _blur_input(conv: nn.Conv2d, args: tuple[Tensor]) -> Tensor:
    kernel = conv.blur_kernel
    assert isinstance(kernel, Tensor)
    return F.conv2d(args[0], kernel, padding=1, groups=conv.in_channels)
