"""FLOPs of a training step, and the rate at which this machine multiplies matrices."""

import time

import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from harness_params import Config
from utils.data.loaders import Data
from utils.distributed import Context
from utils.models import create_model

REPEATS = 5  # products per turn


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
