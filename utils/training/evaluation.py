"""Evaluating a network on the test set, and on the validation images where there are any."""

import contextlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from utils.conv_type import MASK_SUFFIX
from utils.data.loaders import Data
from utils.distributed import Context
from utils.training.graphs import Captured, CudaGraphs
from utils.training.hardware import Autocast

# Names in the columns of the CSVs: of the sets in ``Data.evaluated``, and of the networks that are evaluated on them,
# the trained one and the average of its weights.
SETS = ("test", "val")
NETWORKS = ("", "ema_")


class Evaluation:
    """Counts on the device what a network comes to on each of ``data.evaluated``; nothing waits for the device.

    Args:
        autocast: context of a forward pass, of the precision at the time of the call.
        graphs: what captures the evaluation as a CUDA graph; None where each kernel is launched by itself.

    Attributes:
        graph: the captured evaluation; None without `graphs`.
    """

    def __init__(
        self, ctx: Context, model: nn.Module, data: Data, autocast: Autocast, graphs: CudaGraphs | None = None
    ):
        self.ctx, self.model, self.loaders, self.autocast = ctx, model, data.evaluated, autocast
        self.sums = torch.zeros((len(self.loaders), 2), dtype=torch.float64, device=ctx.device)  # of the last count
        self.graph = Captured(graphs, self._count, graphs.new_pool()) if graphs else None
        self.own_stream = graphs.own_stream if graphs else contextlib.nullcontext

    def count(self) -> Tensor:
        """float64 (sets, 2): cross entropy summed over this rank's images, and how many of them are classified right.

        BN running statistics are taken from rank 0 first, so that all ranks evaluate, and rank 0 saves, one network.
        """
        sync_statistics(self.ctx, self.model)
        self.model.eval()
        with self.own_stream():
            (self.graph or self._count)()
        return self.sums.clone()  # which the next count overwrites

    def not_counted(self) -> Tensor:
        """NaN in the shape of `count`."""
        return torch.full_like(self.sums, math.nan)

    @torch.no_grad()
    def _count(self) -> None:
        self.sums.zero_()
        for loader, (loss, right) in zip(self.loaders, map(Tensor.unbind, self.sums)):
            for images, labels in loader.batches():
                with self.autocast():
                    logits = self.model(images)
                    loss += F.cross_entropy(logits, labels, reduction="sum")
                right += (logits.argmax(1) == labels).sum()

    def figures(self, sums: Sequence[float]) -> dict[str, float]:
        """What the counts come to, by the columns of the CSVs.

        Args:
            sums: of `count`, summed over the ranks and flattened; those of the average follow the network's own.

        Returns:
            mean cross entropy ``test_loss`` and accuracy in percent ``test_acc``; with validation images ``val_loss``
            and ``val_acc``; of an average the same with ``ema_`` before it. NaN of sums that are NaN.
        """
        sets = [(name, loader.num_images) for name, loader in zip(SETS, self.loaders)]
        counted = [(f"{network}{name}", images) for network in NETWORKS for name, images in sets]
        found: dict[str, float] = {}
        for (name, images), loss, right in zip(counted, sums[::2], sums[1::2]):
            found |= {f"{name}_loss": loss / images, f"{name}_acc": 100 * right / images}
        return found

    def read(self, counted: Tensor) -> dict[str, float]:
        """`figures` of what all ranks have counted, of `count`; waits for the device."""
        return self.figures(self.ctx.sum(counted).flatten().tolist())


def sync_statistics(ctx: Context, model: nn.Module) -> None:
    """Overwrites every rank's BN running statistics with rank 0's."""
    ctx.broadcast_tensors([buffer for name, buffer in model.named_buffers() if not name.endswith(MASK_SUFFIX)])
