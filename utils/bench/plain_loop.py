"""The yardstick: the same network in a plain, well-written dense PyTorch loop, without masks and without a harness."""

import time
from typing import Any

import torch
from torch.nn import functional as F

from harness_params import Config
from utils.data.loaders import Data
from utils.distributed import Context
from utils.models import create_model
from utils.training.hardware import autocast_dtype, compile_network


class PlainLoop:
    """Images already on the device, channels_last, autocast, fused SGD, no wait for the device within an epoch; in
    the precision and compiled as the config says.
    """

    def __init__(self, cfg: Config, ctx: Context, data: Data):
        torch.manual_seed(cfg.experiment_params.seed)
        self.dtype = autocast_dtype(cfg.experiment_params.precision, ctx.device)
        self.device, self.world = ctx.device, ctx.world
        self.smoothing, self.threads = cfg.optimizer.label_smoothing, torch.get_num_threads()
        layout = torch.channels_last if cfg.experiment_params.channels_last else torch.contiguous_format
        m = cfg.model_params
        model = create_model(m.model_name, data.num_classes, data.image_shape, blurpool=m.blurpool)
        self.model = model.to(ctx.device, memory_format=layout)
        compile_network(cfg, ctx, self.model)
        self.net = ctx.wrap(self.model)
        o = cfg.optimizer
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), o.lr, o.momentum, weight_decay=o.weight_decay, nesterov=o.nesterov, fused=True
        )
        self.scaler = torch.amp.GradScaler(ctx.device.type, enabled=self.dtype is torch.float16)

    def train(self, batches: Any, steps: int) -> tuple[int, float]:
        """Trains on the first `steps` of `batches`; returns (images of all ranks, seconds)."""
        torch.set_num_threads(self.threads)
        start, seen = time.perf_counter(), 0
        total, correct = torch.zeros((), device=self.device), torch.zeros((), dtype=torch.int64, device=self.device)
        self.net.train()
        for step, (images, labels) in enumerate(batches, start=1):
            with torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype is not None):
                logits = self.net(images)
                loss = F.cross_entropy(logits, labels, label_smoothing=self.smoothing)
            self.scaler.scale(loss).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.optimizer.zero_grad(set_to_none=True)
            total += loss.detach()
            correct += (logits.detach().argmax(1) == labels).sum()
            seen += len(labels)
            if step == steps:
                break
        total.item(), correct.item()  # the epoch's one wait for the device
        return seen * self.world, time.perf_counter() - start
