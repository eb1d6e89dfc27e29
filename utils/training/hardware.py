"""Training on this hardware: precision, kernels, CPU threads."""

import contextlib
import os
from collections.abc import Callable

import torch
from torch import nn

from harness_params import Config
from utils.distributed import Context
from utils.errors import ConfigError

Autocast = Callable[[], contextlib.AbstractContextManager]  # context of a forward pass


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """What ``experiment_params.precision`` means on this device; None is plain float32.

    auto: bfloat16 where the hardware multiplies it (on a CPU: AVX512-BF16 or AMX), float32 elsewhere.

    Raises:
        ConfigError: fp16 on a CPU, where it would be slow and overflow unscaled.
    """
    if precision == "fp16" and device.type == "cpu":
        raise ConfigError(["experiment_params.precision: fp16 needs a GPU; allowed here: auto, fp32, bf16"])
    if precision == "auto":
        if device.type == "cuda":
            fast = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        return torch.bfloat16 if fast else None
    return {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def autocast(device: torch.device, dtype: torch.dtype | None) -> contextlib.AbstractContextManager:
    """Context of a forward pass; nothing in plain float32, where to enter autocast would only take time."""
    return contextlib.nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)


def configure_kernels(deterministic: bool) -> None:
    """``experiment_params.deterministic``: the same bits in every run on a GPU, or the fastest kernels."""
    if deterministic:
        # cuBLAS reads this when its first handle is made, which is later than here.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = not deterministic


def limit_threads(cfg: Config, ctx: Context, model: nn.Module) -> None:
    """Trains a small MLP with one CPU thread, unless ``dist_params.threads`` says how many."""
    if ctx.device.type == "cpu" and not cfg.dist_params.threads and is_small_mlp(model):
        torch.set_num_threads(1)


def is_small_mlp(model: nn.Module) -> bool:
    """Whether the network has weights in linear layers alone, and under a million of them.

    Its steps are too short for two threads, which wait for each other at every layer. A dense step of LeNet-300-100 at
    batch 128 on two idle cores, images/s: 33,000 to 35,000 with one thread, 34,000 to 61,000 with two; on busy
    cores: 22,000 with one, 2,400 with two.
    """
    kinds = {type(module) for module in model.modules() if getattr(module, "weight", None) is not None}
    return kinds <= {nn.Linear} and sum(p.numel() for p in model.parameters()) < 1e6
