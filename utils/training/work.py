"""What one training image costs on a network, counted on the meta device: operations, and values through memory."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

IMAGES = 2  # of the batch that is counted: BatchNorm cannot train on one

# Convolutions and matrix products by the name of their aten packet, and which argument holds the activations. All other
# operations but `NORMS` are elementwise, or as good as that.
PRODUCTS = {"convolution": 0, "addmm": 1, "mm": 0, "bmm": 0, "baddbmm": 1, "linear": 0}
ATTENTION = "_scaled_dot_product"  # and the name of a backend
NORMS = {"native_batch_norm", "_native_batch_norm_legit", "native_layer_norm", "native_group_norm"}


class Work(NamedTuple):
    """Counts of a network's forward pass.

    Attributes:
        operations: kernels that plain PyTorch launches for it.
        elementwise: values per image that all operations but convolutions and matrix products write.
        moved: values per image that a training step reads or writes at least, forward and backward, where every
            elementwise operation is fused into its neighbour. A convolution or product: input read and output written;
            backward, output's gradient and input read for the weights, output's gradient and weights read and input's
            gradient written: 3 inputs and 3 outputs. A normalization, which needs its statistics first: 2 reads and
            1 write, backward 4 reads and 1 write: 8 outputs.
    """

    operations: int
    elementwise: int
    moved: int


def count_work(model: nn.Module, image_shape: tuple[int, int, int]) -> Work:
    """Counts a forward pass in training mode on images (C, H, W). Values and random state are left alone.

    The network is left in training mode.
    """
    tensors = [*model.named_parameters(), *model.named_buffers()]
    on_meta = {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors}
    model.train()
    with torch.no_grad(), _Count() as count:
        functional_call(model, on_meta, (torch.empty((IMAGES, *image_shape), device="meta"),))
    return Work(count.operations, count.elementwise // IMAGES, count.moved // IMAGES)


class _Count(TorchDispatchMode):
    """Counts the operations below it; see `Work`."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.elementwise = self.moved = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        first = out[0] if isinstance(out, tuple | list) else out
        if func.is_view or name.startswith(("empty", "detach")) or not _holds_activations(first):
            return out
        self.operations += 1
        written = first.numel()
        if name in PRODUCTS or name.startswith(ATTENTION):
            self.moved += 3 * (args[PRODUCTS.get(name, 0)].numel() + written)
        else:
            self.elementwise += written
            self.moved += 8 * written if name in NORMS else 0
        return out


def _holds_activations(value: Any) -> bool:
    """Whether it is a tensor of floats with a value per image at least."""
    return isinstance(value, Tensor) and value.is_floating_point() and value.ndim > 1
