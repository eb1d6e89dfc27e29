"""Training on this hardware: precision, kernels, torch.compile, CPU threads."""

import os
import shutil
import sys

import torch
from torch import nn

from harness_params import Config
from utils.distributed import Context
from utils.errors import ConfigError

# Compiled graphs of one network: whole and last batches, training and evaluation, each size of progressive resizing.
# Torch's own limit is 8; beyond a limit it goes on uncompiled.
MOST_GRAPHS = 64


def compile_network(cfg: Config, ctx: Context, model: nn.Module) -> None:
    """Compiles the network in place, as ``experiment_params.compile`` asks: names stay the same.

    All ranks call it together; rank 0's machine decides what auto means.
    """
    e = cfg.experiment_params
    if e.compile == "off":
        return
    reason = ctx.broadcast_object(_not_on_a_gpu(cfg, ctx))
    if e.compile == "auto" and reason:
        if ctx.device.type == "cuda" and ctx.is_main:
            print(f"harness: note: experiment_params.compile: auto is off here: {reason}", file=sys.stderr)
        return
    import torch._dynamo  # takes a second

    torch._dynamo.config.recompile_limit = MOST_GRAPHS
    # dynamic=False: the last, smaller batch of an epoch gets graphs of its own and leaves the others as they are.
    model.compile(dynamic=False)


def _not_on_a_gpu(cfg: Config, ctx: Context) -> str:
    """Why the network is not compiled for a GPU; empty if it is."""
    if ctx.device.type != "cuda":
        return "there is no GPU"
    if cfg.dist_params.sync_bn and ctx.world > 1:
        # A graph would end at every layer of it, and each piece be compiled and launched by itself.
        return "dist_params.sync_bn waits for the GPU in every layer"
    return missing_tools()


def missing_tools() -> str:
    """What Triton, which makes torch.compile's kernels on GPUs, lacks on this machine; empty if nothing."""
    from torch.utils._triton import has_triton

    if not any(shutil.which(name) for name in (os.environ.get("CC", ""), "gcc", "clang") if name):
        return "Triton needs a C compiler (gcc, clang, or what CC names)"
    return "" if has_triton() else "Triton is not installed, or the GPU is too old for it"


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
