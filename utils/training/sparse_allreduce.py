"""Sparse all-reduce: only the gradients of kept weights are sent.

Masks are the same on every rank, so the ranks need no message to agree on the entries of a gradient bucket that matter:
those of kept weights and of unmasked parameters are packed into one vector, summed, and unpacked. The bytes sent are
density x the dense bytes. The gradients of pruned weights become zero; those weights are zero with any gradient.
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

from harness_params import Config
from utils.conv_type import MASK_SUFFIX, masked_params
from utils.distributed import Context
from utils.errors import ConfigError

# Share of kept entries up to which packing a bucket costs less than it saves. Measured by tests/benchmarks/allreduce.py
# between two processes of one machine; a network makes it pay sooner. Not measured for nccl, where only "on" packs.
PAYS_BELOW = {"gloo": 0.3, "nccl": 0.0}
WIRES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def gradient_hook(cfg: Config, ctx: Context, model: nn.Module) -> "KeptGradients | None":
    """The hook for ``dist_params.sparse_allreduce`` and ``dist_params.wire``; None for DDP's own all-reduce.

    Raises:
        ConfigError: the backend cannot sum bfloat16.
    """
    d = cfg.dist_params
    if ctx.world == 1:
        return None
    pays_below = {"auto": PAYS_BELOW[ctx.backend], "on": 1.0, "off": 0.0}[d.sparse_allreduce]
    if not pays_below and d.wire == "fp32":
        return None
    if d.wire == "bf16":
        try:
            ctx.start_sum(torch.ones(1, dtype=torch.bfloat16, device=ctx.device)).wait()
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0]
            raise ConfigError([f"dist_params.wire: bf16 is not allowed: {ctx.backend} does not: {reason}"]) from error
    return KeptGradients(model, ctx.world, ctx.start_sum, WIRES[d.wire], pays_below)


class Bucket(Protocol):
    """What is used of DDP's ``GradBucket``: one flat tensor of the gradients of some parameters."""

    def index(self) -> int: ...
    def buffer(self) -> Tensor: ...
    def parameters(self) -> list[Tensor]: ...


class KeptGradients:
    """Average the kept gradients of a bucket over the ranks: a ``gradient_hook`` of `Context.wrap`.

    In float32 with two ranks the result equals the dense all-reduce bit for bit: the same halves are added. With more
    ranks the order of the additions depends on the position of a value in the message.

    Attributes:
        sent: bytes given to the all-reduce since the hook was made, for benchmarks and tests.
    """

    def __init__(
        self,
        model: nn.Module,
        world: int,
        start_sum: Callable[[Tensor], torch.futures.Future],
        wire: torch.dtype = torch.float32,
        pays_below: float = 1.0,
    ):
        """
        Args:
            model: the bare network.
            world: number of ranks.
            start_sum: starts summing a flat tensor over the ranks in place; returns its future.
            wire: float32, or bfloat16 for half the bytes, rounded.
            pays_below: buckets with this share of kept entries, or more, are sent whole.
        """
        self.world, self.start_sum, self.wire, self.pays_below = world, start_sum, wire, pays_below
        self.sent = 0
        # Owner and name of each mask, not the mask itself: `model.to` replaces it.
        self._owners: dict[int, tuple[nn.Module, str]] = {}
        for full, param, _ in masked_params(model):
            owner, _, name = full.rpartition(".")
            self._owners[id(param)] = (model.get_submodule(owner), name + MASK_SUFFIX)
        self._known: dict[int, tuple[list[tuple], Tensor | None]] = {}

    def __call__(self, bucket: Bucket) -> torch.futures.Future[Tensor]:
        buffer, kept = bucket.buffer(), self._kept_entries(bucket)
        values = buffer if kept is None else buffer.index_select(0, kept)
        values = values.mul_(1 / self.world).to(self.wire)  # as DDP does without a hook
        self.sent += values.numel() * values.element_size()

        def unpack(future: torch.futures.Future) -> Tensor:
            future.value()  # raises the error of the sum, if any
            if kept is None:
                return buffer if values is buffer else buffer.copy_(values)
            return buffer.zero_().scatter_(0, kept, values.to(buffer.dtype))

        return self.start_sum(values).then(unpack)

    def _kept_entries(self, bucket: Bucket) -> Tensor | None:
        """int64 (kept,): positions in the bucket that are sent; None for all. Computed once per level."""
        masks = [self._mask(param) for param in bucket.parameters()]
        # DDP rebuilds its buckets after the first step of a process.
        made_of = [(param, mask, mask._version if mask is not None else 0) for param, mask in masks]
        known = self._known.get(bucket.index())
        if known is None or not _same(known[0], made_of):
            known = self._known[bucket.index()] = (made_of, self._find(masks, bucket.buffer()))
        return known[1]

    def _mask(self, param: Tensor) -> tuple[Tensor, Tensor | None]:
        owner, name = self._owners.get(id(param), (None, ""))
        return param, owner._buffers[name] if owner is not None else None

    def _find(self, masks: list[tuple[Tensor, Tensor | None]], buffer: Tensor) -> Tensor | None:
        if buffer.numel() != sum(param.numel() for param, _ in masks):
            raise RuntimeError(f"a gradient bucket of {buffer.numel()} entries does not hold its parameters alone")
        # A bucket holds its gradients one by one, each in the memory order of its parameter (channels_last: NHWC).
        flags = []
        for param, mask in masks:
            ordered = torch.ones_like(param, dtype=torch.bool)
            if mask is not None:
                ordered.copy_(mask)
            flags.append(ordered.as_strided((param.numel(),), (1,)))
        kept = torch.cat(flags).nonzero().squeeze(1)
        return kept if kept.numel() < self.pays_below * buffer.numel() else None


def _same(one: list[tuple], other: list[tuple]) -> bool:
    return len(one) == len(other) and all(
        p is q and m is n and version == at for (p, m, version), (q, n, at) in zip(one, other)
    )
