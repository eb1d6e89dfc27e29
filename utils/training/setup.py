"""What training starts from: the network with its masks, the optimizer, and the timeline of its schedule."""

from typing import Any

import numpy as np
import torch
from torch import nn

from harness_params import Config
from utils.conv_type import insert_masks, keep_masked
from utils.data.epochs import check_shares
from utils.data.loaders import Data
from utils.distributed import Context
from utils.errors import ConfigError
from utils.models import create_model
from utils.optimizers import OPTIMIZERS
from utils.schedulers import Timeline


def build_model(cfg: Config, data: Data, ctx: Context) -> nn.Module:
    """The network with its masks, the same on every rank, on the rank's device.

    Raises:
        ConfigError: as `new_network`; a step has too few images for BatchNorm, which cannot train on one.
    """
    model = new_network(cfg, data, cfg.experiment_params.seed)
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules()):
        images, batch, drop_last = data.train.num_images, cfg.dataset.batch_size, cfg.dataset.drop_last
        check_shares(images, batch, drop_last, ctx.world, least=2, why=" (the network has BatchNorm)")
    if cfg.dist_params.sync_bn and ctx.world > 1:
        if ctx.device.type != "cuda":
            raise ConfigError("dist_params.sync_bn: true is not allowed here: torch has it for GPUs only")
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    memory_format = torch.channels_last if cfg.experiment_params.channels_last else torch.contiguous_format
    model = model.to(ctx.device).to(memory_format=memory_format)
    ctx.broadcast_tensors(list(model.state_dict().values()))
    return model


def new_network(cfg: Config, data: Data, seed: int) -> nn.Module:
    """The network with masks of ones, on the CPU, freshly initialized: drawn from torch's global generator by `seed`.

    Raises:
        ConfigError: no such network, images that it cannot take, or nothing to mask.
    """
    torch.manual_seed(seed)
    try:
        m = cfg.model_params
        model = create_model(
            m.model_name, data.num_classes, data.image_shape, m.blurpool, data.other_shapes, m.model_args
        )
        return insert_masks(model, cfg.prune_params.exclude)
    except ValueError as error:
        raise ConfigError([str(error)]) from error


def start_optimizer(
    cfg: Config, model: nn.Module, dtype: torch.dtype | None, state: dict[str, Any] | None = None
) -> tuple[torch.optim.Optimizer, torch.amp.GradScaler]:
    """A fresh optimizer and its loss scale, or those that go on from `state` (of `optimizer_state`)."""
    optimizer, device = make_optimizer(cfg, model), next(model.parameters()).device
    scaler = torch.amp.GradScaler(device.type, enabled=dtype is torch.float16)
    if state is not None:
        load_optimizer(optimizer, state["optimizer"] if "optimizer" in state else state["sgd"])  # sgd: of older code
        if state["scaler"]:  # empty where no scale was needed
            scaler.load_state_dict(state["scaler"])
    return optimizer, scaler


def optimizer_state(optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler) -> dict[str, Any]:
    """Momentum or moments, and loss scale: what `start_optimizer` needs to go on.

    The learning rate in it is the peak rate: that of a step is a function of the step.
    """
    state = optimizer.state_dict()
    for group in state["param_groups"]:
        group["lr"] = optimizer.defaults["lr"]
    return {"optimizer": state, "scaler": scaler.state_dict()}


def make_optimizer(cfg: Config, model: nn.Module) -> torch.optim.Optimizer:
    """``optimizer.optimizer_name``, fused, with the masks kept after every step (`keep_masked`)."""
    o, params = cfg.optimizer, list(model.parameters())
    groups: list[dict[str, Any]] = [{"params": params, "weight_decay": o.weight_decay}]
    if o.no_decay_bn:  # BatchNorm's and LayerNorm's parameters and all biases are vectors; layers' weights never are
        groups[0]["params"] = [p for p in params if p.ndim > 1]
        groups.append({"params": [p for p in params if p.ndim <= 1], "weight_decay": 0.0})
    entry = OPTIMIZERS[o.optimizer_name]
    if isinstance(entry.title, str):
        optimizer = getattr(torch.optim, entry.title)(groups, lr=o.lr, fused=True, **entry.arguments(o))
    else:
        optimizer = entry.title(groups, lr=o.lr, **entry.arguments(o))
    if cfg.experiment_params.precision == "fp16" and optimizer.defaults.get("momentum"):
        # Where the loss scale overflows in the first step, the fused kernel leaves a momentum that was never written,
        # and the next step goes on with it. From zeros the first step is the same: 0 * momentum + gradient. (Adam's
        # moments are zeros before its first step.)
        for param in params:
            optimizer.state[param]["momentum_buffer"] = torch.zeros_like(param)
    keep_masked(optimizer, model)
    return optimizer


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Goes on from a state_dict of another optimizer of the same kind and network; `state` stays as it is.

    Momentum and moments are laid out in their weight's memory order. The fused kernel walks both in memory order; a run
    resumed with another ``channels_last`` has another one.
    """
    optimizer.load_state_dict(state)
    for param, values in optimizer.state.items():
        for name, value in values.items():
            if isinstance(value, torch.Tensor):  # else None: SGD without momentum
                values[name] = torch.empty_like(param if value.shape == param.shape else value).copy_(value)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Sets the learning rate of the next step.

    On a GPU it is rounded to float32, the type in which a step captured as a CUDA graph reads it: the bits are the same
    with and without graphs.
    """
    if optimizer.param_groups[0]["params"][0].device.type == "cuda":
        rate = float(np.float32(rate))
    for group in optimizer.param_groups:
        group["lr"] = rate


def make_timeline(cfg: Config, data: Data) -> Timeline:
    """The steps of a level, of which the learning rate is a function."""
    o = cfg.optimizer
    return Timeline(
        epochs=cfg.experiment_params.epochs_per_level,
        steps_per_epoch=data.train.steps_per_epoch,
        warmup_epochs=o.warmup_epochs,
        milestones=tuple(o.milestones),
        gamma=o.gamma,
        floor=o.lr_min / o.lr,
        cooldown_epochs=o.cooldown_epochs,
        cycles=cfg.experiment_params.cycles,
    )
