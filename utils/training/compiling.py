"""torch.compile: whether it pays, what of a run is compiled, and where the kernels are kept.

Compiling costs seconds before the first step, and saves time in every step after it. With ``compile: auto``, `pays`
weighs the two. It is a function of the config, the network and the data alone, never of a clock: compiled and plain
kernels round differently. For the same reason a run does not train uncompiled "until the compiled step is there": when
that is depends on the machine. A resumed run keeps to what was decided where it began (`decided_before`), also when it
has more levels now.
"""

import os
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from harness_params import Config
from utils.data.epochs import share
from utils.data.loaders import Data
from utils.distributed import Context
from utils.output import note
from utils.training.work import Work, count_work

# Compiled graphs of one network: whole and last batches, training and evaluation, each size of progressive resizing.
# Torch's own limit is 8; beyond a limit it goes on uncompiled.
MOST_GRAPHS = 64

# ResNet-18 on 32x32 images, batch 512, bfloat16, channels_last, on an H100 (torch 2.11): 52,700 images/s uncompiled and
# 69,600 compiled (medians of 3 epochs), that is 4.6 us per image, of 1,417,728 elementwise values. On a slower GPU the
# same values take longer.
SAVED_SECONDS_PER_VALUE = (1 / 52_700 - 1 / 69_600) / 1_417_728
# The same network and machine (16 cores), no cached kernels: 26.3 s for the training graphs of whole and of last
# batches, so 13.1 s for one of them, of 67 operations.
COMPILE_SECONDS_PER_OPERATION = 13.1 / 67
# What must be saved, in multiples of the cost: both are estimates.
MARGIN = 2.0

STEPS, LAST_BATCHES, EVALUATION = "training steps", "last batches", "evaluation"
PARTS = (STEPS, LAST_BATCHES, EVALUATION)


def compile_network(cfg: Config, ctx: Context, model: nn.Module, data: Data) -> Collection[str]:
    """Compiles the network in place, as ``experiment_params.compile`` asks: names stay the same.

    All ranks call it together; rank 0's machine decides what auto means.

    Returns:
        those of `PARTS` that run compiled. Each is a graph of its own, and with auto compiled only if it pays.
    """
    parts = _decide(cfg, ctx, model, data)
    if parts:
        compile_parts(ctx, model, data, parts)
    return parts


def _decide(cfg: Config, ctx: Context, model: nn.Module, data: Data) -> Collection[str]:
    e = cfg.experiment_params
    if e.compile == "off":
        return ()
    reason = ctx.broadcast_object(_not_on_a_gpu(cfg, ctx))
    if e.compile == "on":
        return PARTS
    if reason:
        if ctx.device.type == "cuda":
            _note(ctx, f"is off here: {reason}")
        return ()
    images, work = images_of(cfg, data), count_work(model, data.image_shape)
    shares = {part: number // ctx.world for part, number in images.items()}
    parts = parts_that_pay(work, shares, sizes=1 + len(data.other_shapes))
    _note(ctx, explain(work, shares[STEPS], parts))
    return parts


def decided_before(cfg: Config, ctx: Context, before: Mapping[str, Any]) -> Collection[str] | None:
    """Those of `PARTS` that auto compiled where a run began; None if it decided nothing, or cannot compile here.

    All ranks call it together.

    Args:
        before: `utils.runs.resume.surroundings` of the run.
    """
    if cfg.experiment_params.compile != "auto" or before.get("compile") != "auto" or "compiled" not in before:
        return None
    parts = tuple(part for part in PARTS if part in before["compiled"].split(", "))
    return None if parts and ctx.broadcast_object(_not_on_a_gpu(cfg, ctx)) else parts


# --- the rule --------------------------------------------------------------------------------------------------------


def images_of(cfg: Config, data: Data) -> dict[str, int]:
    """{part of `PARTS`: images that the whole run, from its first level, takes through it}."""
    p, e, train = cfg.prune_params, cfg.experiment_params, data.train
    rewound = (p.rewind_step // train.steps_per_epoch if p.rewind_step else p.rewind_epoch) * (e.training_type == "wr")
    epochs = e.epochs_per_level + (p.num_levels - 1) * (e.epochs_per_level - rewound)
    sizes = [train.global_batch(step) for step in (0, train.steps_per_epoch - 1)]
    last = sizes[1] if sizes[1] < sizes[0] else 0
    whole = (train.steps_per_epoch - bool(last)) * sizes[0]
    evaluated = sum(loader.num_images for loader in data.evaluated) * (2 if e.ema_decay else 1)  # the average, too
    tests = epochs // e.eval_every_epochs * evaluated + p.num_levels * data.test.num_images  # once right after pruning
    return {STEPS: epochs * whole, LAST_BATCHES: epochs * last, EVALUATION: tests}


def saved_seconds(work: Work, images: int) -> float:
    """What compiling saves on so many training images. Evaluation saves, and costs, a third of that: see `pays`."""
    return images * work.elementwise * SAVED_SECONDS_PER_VALUE


def compile_seconds(work: Work) -> float:
    """What compiling a training graph costs without cached kernels."""
    return work.operations * COMPILE_SECONDS_PER_OPERATION


def pays(work: Work, images: int, sizes: int = 1) -> bool:
    """Whether a graph saves more than `MARGIN` times what it costs.

    The same for training and evaluation: a forward pass alone is about a third of both.

    Args:
        images: that pass through it.
        sizes: of images; each has a graph of its own.
    """
    return saved_seconds(work, images) > MARGIN * compile_seconds(work) * sizes


def parts_that_pay(work: Work, images: dict[str, int], sizes: int = 1) -> tuple[str, ...]:
    """Those of `PARTS` that are worth compiling; nothing if the training steps are not."""
    if not pays(work, images[STEPS], sizes):
        return ()
    return tuple(part for part in PARTS if pays(work, images[part], sizes))


def explain(work: Work, images: int, parts: Collection[str]) -> str:
    """What auto decided, and why."""
    costs = f"on {images:,} images it saves about {saved_seconds(work, images):.0f} s, and costs about "
    costs += f"{compile_seconds(work):.0f} s"
    if not parts:
        return f"is off here: {costs}"
    rest = ", ".join(part for part in PARTS if part not in parts)
    return f"compiles {', '.join(parts)}{f' (not {rest}: too few images)' if rest else ''}: {costs}"


def _note(ctx: Context, text: str) -> None:
    if ctx.is_main:
        note(f"experiment_params.compile: auto {text}")


# --- torch.compile ---------------------------------------------------------------------------------------------------


def compile_parts(ctx: Context, model: nn.Module, data: Data, parts: Collection[str]) -> None:
    """Compiles the network's forward pass for `parts`, in place of those before; the others stay plain.

    Kernels are made when a part runs for the first time.
    """
    for name in ("forward", "_compiled_call_impl"):  # set below, and by Module.compile
        vars(model).pop(name, None)
    if not parts:
        return
    keep_kernels()
    import torch._dynamo  # takes a second; imported here alone

    torch._dynamo.config.recompile_limit = MOST_GRAPHS
    # dynamic=False: the last, smaller batch of an epoch gets a graph of its own and leaves the others as they are.
    if set(parts) == set(PARTS):
        model.compile(dynamic=False)
        return
    whole = share(data.train.batch_size, ctx.rank, ctx.world)
    plain, compiled = model.forward, torch.compile(model.forward, dynamic=False)

    def forward(images: Tensor) -> Tensor:
        part = EVALUATION if not model.training else STEPS if len(images) == whole.stop - whole.start else LAST_BATCHES
        return (compiled if part in parts else plain)(images)

    model.forward = forward


def keep_kernels() -> None:
    """Keeps compiled kernels in the user's cache folder, where a later run finds them, also after a reboot.

    Torch's default is a folder in /tmp. TORCHINDUCTOR_CACHE_DIR, if the user has set it, is obeyed; where the cache
    folder cannot be written, torch's default stays.
    """
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    # Importing torch._dynamo, as torchvision does, sets the variable to torch's default.
    if os.environ.get("TORCHINDUCTOR_CACHE_DIR", default_cache_dir()) != default_cache_dir():
        return
    given = os.environ.get("XDG_CACHE_HOME", "")
    try:
        home = Path(given) if os.path.isabs(given) else Path.home() / ".cache"
        folder = home / "torchinductor"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # RuntimeError: no home is known
        return
    if os.access(folder, os.W_OK | os.X_OK):
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)


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
