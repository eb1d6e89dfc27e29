"""DDP's buckets of gradients, brought to the layout that they keep."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from utils.training.hardware import Autocast


def settle_buckets(net: nn.Module, images: Tensor, labels: Tensor, autocast: Autocast) -> None:
    """Runs a throw-away step so that DDP rebuilds its buckets of gradients, which it does after its first step.

    With three processes and more the layout of the buckets decides in which order gradients are summed, hence the
    last bits: without this, the first step after a resume would differ from the same step of an unbroken run.
    Weights, buffers and random state stay as they are; gradients are freed.

    Args:
        net: the network wrapped in DDP; all ranks call this together, each with a batch.
    """
    devices = [images.device] if images.is_cuda else []
    before = [buffer.clone() for buffer in net.buffers()]
    with torch.random.fork_rng(devices):
        with autocast():
            loss = F.cross_entropy(net(images), labels)
        loss.backward()
    for param in net.parameters():
        param.grad = None
    for buffer, value in zip(net.buffers(), before):
        buffer.copy_(value)
