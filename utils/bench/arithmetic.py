"""FLOPs and bytes of a training step, and the rates at which this machine multiplies matrices and copies memory."""

import time

import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from harness_params import Config
from utils.data.loaders import Data
from utils.distributed import Context
from utils.models import create_model
from utils.training.work import count_work

REPEATS = 5  # products or copies per turn
# Bytes per weight and step, all float32: the weight is read and written, and so are its gradient and its momentum.
OPTIMIZER_BYTES = 6 * 4


def step_flops(cfg: Config, data: Data) -> float:
    """FLOPs per image, forward and backward, of the dense network: pruned weights count too.

    Counted on the meta device, where nothing is computed.
    """
    m, images = cfg.model_params, 2
    model = create_model(
        m.model_name, data.num_classes, data.image_shape, blurpool=m.blurpool, arguments=m.model_args
    ).to("meta")
    batch = torch.empty((images, *data.image_shape), device="meta")
    with FlopCounterMode(display=False) as counter:
        F.cross_entropy(model(batch), torch.empty(images, dtype=torch.int64, device="meta")).backward()
    return counter.get_total_flops() / images


def step_bytes(cfg: Config, data: Data, dtype: torch.dtype | None) -> float:
    """Bytes per image that a training step moves at least: `Work.moved` in `dtype`, and its share of the optimizer's.

    A cache that holds activations from one operation to the next can save some of them.
    """
    m = cfg.model_params
    model = create_model(m.model_name, data.num_classes, data.image_shape, blurpool=m.blurpool, arguments=m.model_args)
    weights = sum(p.numel() for p in model.parameters())
    moved = count_work(model, data.image_shape).moved * (dtype or torch.float32).itemsize
    return moved + OPTIMIZER_BYTES * weights / data.train.batch_size


class Copy:
    """A copy of a large block of the device's memory, on all threads of the process."""

    def __init__(self, ctx: Context):
        self.ctx, self.threads = ctx, torch.get_num_threads()
        size = 2**30 if ctx.device.type == "cuda" else 2**27  # beyond any cache
        self.source, self.target = (torch.zeros(size, dtype=torch.uint8, device=ctx.device) for _ in range(2))

    def copy(self) -> tuple[int, float]:
        """Copy a few times; return (bytes read and written by all ranks, seconds)."""
        torch.set_num_threads(self.threads)
        start = time.perf_counter()
        for _ in range(REPEATS):
            self.target.copy_(self.source)
        if self.ctx.device.type == "cuda":
            torch.cuda.synchronize(self.ctx.device)
        return self.ctx.world * REPEATS * 2 * len(self.source), time.perf_counter() - start


class Matmul:
    """A large square matrix product, on all threads of the process.

    In float32 on a GPU cuDNN convolves in TF32 and this product does not, so a step may pass 100% of its rate there.
    """

    def __init__(self, ctx: Context, dtype: torch.dtype | None):
        self.ctx, self.threads = ctx, torch.get_num_threads()
        side = 8192 if ctx.device.type == "cuda" else 2048
        self.factor = torch.randn((side, side), device=ctx.device).to(dtype or torch.float32)

    def multiply(self) -> tuple[int, float]:
        """Multiply a few times; return (operations of all ranks, seconds)."""
        torch.set_num_threads(self.threads)
        start = time.perf_counter()
        for _ in range(REPEATS):
            self.factor @ self.factor
        if self.ctx.device.type == "cuda":
            torch.cuda.synchronize(self.ctx.device)
        return self.ctx.world * REPEATS * 2 * len(self.factor) ** 3, time.perf_counter() - start
