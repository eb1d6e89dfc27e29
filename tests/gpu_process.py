"""What tests/test_gpu.py asks of a process of its own. It imports nothing of tests/conftest.py, which hides the GPU."""

import torch

from harness_params import load_config
from utils.conv_type import insert_masks, masked_params
from utils.dataset import load_data
from utils.distributed import join
from utils.models import create_model
from utils.pruning_utils import CRITERIA, prune
from utils.runs.snapshots import Snapshot
from utils.training.graphs import WARM_UP, CudaGraphs
from utils.training.setup import build_model
from utils.training.trainer import Trainer


def overlaps(device: str) -> dict[str, float]:
    """{method: share of the weights kept on the CPU to 10% that are kept on `device` too}."""
    draws = torch.Generator().manual_seed(0)
    images, labels = torch.randn(64, 3, 32, 32, generator=draws), torch.randint(10, (64,), generator=draws)

    def kept(where: str, method: str) -> torch.Tensor:
        torch.manual_seed(0)
        model = insert_masks(create_model("resnet20", 10, (3, 32, 32))).to(where, memory_format=torch.channels_last)
        batch = images.to(where, memory_format=torch.channels_last), labels.to(where)
        prune(model, method, 0.1, [batch], torch.Generator().manual_seed(1), rounds=10, dtype=torch.float64)
        return torch.cat([mask.cpu().flatten() for _, _, mask in masked_params(model)])

    found = {}
    for method in CRITERIA:
        here, there = kept("cpu", method), kept(device, method)
        assert here.sum() == there.sum()
        found[method] = (here & there).sum().item() / here.sum().item()
    return found


def steps_watched(device: str, *words: str) -> dict[str, int]:
    """Trains the fifth epoch of a pruned network with every wait for the device forbidden, and finishes it.

    By then all is compiled and captured. Returns the number of its steps, and of the waits of `finish_epoch`.
    """
    cfg = load_config(["--model_params.model_name=resnet20", *words])
    with join() as ctx:
        assert ctx.device.type == device
        data = load_data(cfg, ctx)
        trainer = Trainer(cfg, ctx, build_model(cfg, data, ctx), data)
        prune(trainer.model, "mag", 0.2)
        for epoch in range(WARM_UP + 1):
            tally = trainer.new_tally()
            trainer.train_epoch(0, epoch, tally, lambda steps: False)
            trainer.finish_epoch(0, epoch, tally, evaluate=True)
        tally = trainer.new_tally()

        def stop(steps: int) -> bool:  # from the first step's end: an epoch's order and draws come from the CPU
            if device == "cuda":
                torch.cuda.set_sync_debug_mode("error" if steps < trainer.timeline.steps_per_epoch else "default")
            return False

        trainer.train_epoch(0, WARM_UP + 1, tally, stop)
        with CudaGraphs(ctx.device, required=False).note_waits() as waits:
            trainer.finish_epoch(0, WARM_UP + 1, tally, evaluate=True)
        return {"steps": tally.step, "waits": len(waits)}


def snapshot_behind_work() -> bool:
    """A snapshot taken while the device is busy, of tensors that are overwritten before it has been copied."""
    weight, mask = torch.zeros(4096, 4096, device="cuda"), torch.ones(4096, device="cuda", dtype=torch.bool)
    factor = torch.eye(4096, device="cuda")
    for _ in range(50):
        weight = weight @ factor + 1
    snapshot = Snapshot({"weight": weight, "optimizer": [mask, torch.arange(3), 0.5]})
    weight.fill_(-1)
    mask.fill_(False)
    content = snapshot.content()
    copied, step, rate = content["optimizer"]
    same = bool((content["weight"] == 50).all() and copied.all()) and step.tolist() == [0, 1, 2] and rate == 0.5
    return same and content["weight"].is_pinned() and copied.is_pinned()
