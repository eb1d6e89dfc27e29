"""Sparse all-reduce: only the gradients of kept weights travel.

Masks are the same on every rank, so the ranks agree on which entries of a gradient bucket matter without saying a word
about it: the kept entries (and all of the unmasked parameters') are packed into one vector, reduced, and unpacked. What
crosses the wire is density x the dense bytes. The entries of pruned weights come out as zero; their weights are zero
whatever their gradients were.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from utils.conv_type import masked_params

# Above this density of a bucket packing costs more than it saves; tests/benchmarks/allreduce.py measures it.
PAYS_BELOW = 0.7


class KeptGradients:
    """A DDP communication hook (``ddp.register_comm_hook(None, hook)``) that averages kept gradients over the ranks.

    In float32 with two ranks the result is the dense all-reduce's to the last bit: the same halves are added.

    Attributes:
        sent: bytes handed to the all-reduce since the hook was made, for benchmarks and tests.
    """

    def __init__(
        self,
        model: nn.Module,
        world: int,
        all_reduce: Callable[[Tensor], torch.futures.Future],
        wire: torch.dtype = torch.float32,
        pays_below: float = PAYS_BELOW,
    ):
        """
        Args:
            model: the bare network.
            world: number of ranks.
            all_reduce: starts summing a flat tensor over the ranks in place; its future ends with the sum.
            wire: float32, or bfloat16 for half the bytes, rounded.
            pays_below: buckets with a larger share of kept entries are sent whole.
        """
        self.model, self.world, self.all_reduce = model, world, all_reduce
        self.wire, self.pays_below = wire, pays_below
        self.sent = 0
        self.__name__ = self.__qualname__ = type(self).__name__  # DDP logs the hook by its name
        self._masks: dict[int, Tensor] = {}
        self._kept: dict[int, tuple[tuple, Tensor | None]] = {}

    def __call__(self, state: Any, bucket: Any) -> torch.futures.Future[Tensor]:
        buffer, kept = bucket.buffer(), self._kept_entries(bucket)
        values = buffer if kept is None else buffer.index_select(0, kept)
        values = values.div_(self.world).to(self.wire)
        self.sent += values.numel() * values.element_size()

        def unpack(future: torch.futures.Future) -> Tensor:
            total = values.to(buffer.dtype)  # summed in place
            if kept is None:
                return total if total is buffer else buffer.copy_(total)
            return buffer.zero_().index_copy_(0, kept, total)

        return self.all_reduce(values).then(unpack)

    def _kept_entries(self, bucket: Any) -> Tensor | None:
        """int64 (kept,): positions in the bucket that travel; None for all. Worked out once a level."""
        params = bucket.parameters()
        if not self._masks or any(id(p) not in self._masks for p in params):
            self._masks = {id(p): torch.ones_like(p, dtype=torch.bool) for p in self.model.parameters()}
            self._masks |= {id(p): mask for _, p, mask in masked_params(self.model)}
        masks = [self._masks[id(p)] for p in params]
        # DDP makes its buckets anew after a process's first step, and pruning changes masks in place.
        made_of = tuple((id(p), mask._version) for p, mask in zip(params, masks))
        known = self._kept.get(bucket.index())
        if known is None or known[0] != made_of:
            known = self._kept[bucket.index()] = (made_of, self._find(params, masks, bucket.buffer()))
        return known[1]

    def _find(self, params: list[Tensor], masks: list[Tensor], buffer: Tensor) -> Tensor | None:
        # A bucket holds each gradient in its parameter's own memory order (channels_last: NHWC), one after another.
        flat = [
            torch.empty_like(p, dtype=torch.bool).copy_(m).as_strided((m.numel(),), (1,)) for p, m in zip(params, masks)
        ]
        kept = torch.cat(flat).to(buffer.device).nonzero().squeeze(1)
        if buffer.numel() != sum(m.numel() for m in masks):
            raise RuntimeError(f"a gradient bucket of {buffer.numel()} entries does not hold its parameters alone")
        return kept if kept.numel() < self.pays_below * buffer.numel() else None
