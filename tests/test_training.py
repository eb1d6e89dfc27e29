"""The optimizer of a level: what it goes on with after a resume, and after a step that the loss scale left out."""

import pytest
import torch
from torch import nn

from harness_params import make_config
from utils.conv_type import insert_masks
from utils.data.images import Normalizer
from utils.data.in_memory import MemoryTestLoader, MemoryTrainLoader
from utils.data.loaders import Data
from utils.distributed import Context
from utils.training.setup import make_optimizer
from utils.training.trainer import Trainer


def small_net(memory_format: torch.memory_format) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3, stride=2), nn.Flatten(), nn.LazyLinear(5))
    net(torch.zeros(1, 3, 8, 8))
    return insert_masks(net).to(memory_format=memory_format)


def trainer(channels_last: bool) -> Trainer:
    cfg = make_config({"experiment_params": {"channels_last": channels_last, "precision": "fp32"}})
    draws = torch.Generator().manual_seed(1)
    images = torch.randint(256, (64, 8, 8, 3), generator=draws, dtype=torch.uint8).numpy()
    labels = torch.randint(5, (64,), generator=draws).numpy()
    normalize = Normalizer((0.5,) * 3, (0.25,) * 3, (3, 8, 8), torch.device("cpu"), channels_last=channels_last)
    plan = {"batch_size": 16, "drop_last": False, "seed": 0, "rank": 0, "world": 1}
    train = MemoryTrainLoader(images, labels, normalize, crop=False, flip=False, **plan)
    data = Data(train, MemoryTestLoader(images, labels, normalize), 5, (3, 8, 8))
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return Trainer(cfg, Context(), small_net(layout), data)


def train(one: Trainer, epoch: int) -> None:
    one.train_epoch(0, epoch, one.new_tally(), lambda steps: False)


@pytest.mark.parametrize("before", [True, False])
def test_momentum_survives_a_change_of_memory_layout(before):
    first, second = trainer(before), trainer(not before)
    train(first, 0)
    second.model.load_state_dict(first.model.state_dict())
    second.restart(first.optimizer_state_dict())
    train(first, 1)
    train(second, 1)
    for mine, theirs in zip(first.model.parameters(), second.model.parameters()):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


def test_a_first_step_that_overflows_leaves_no_trace_in_fp16():
    """The fused kernel would leave a momentum buffer that was never written to: not-a-number, in this mode."""
    cfg = make_config({"experiment_params": {"precision": "fp16"}})

    def weights(overflows: bool) -> list[torch.Tensor]:
        net = small_net(torch.contiguous_format)
        optimizer = make_optimizer(cfg, net)
        scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
        scaler.scale(torch.zeros(()))  # it is made ready by the first loss
        for gradient in [float("inf")] * overflows + [0.5, 0.25]:
            for param in net.parameters():
                param.grad = torch.full_like(param, gradient)
            scaler.step(optimizer)
            scaler.update(1.0)
        return [param.detach() for param in net.parameters()]

    torch.use_deterministic_algorithms(True)
    try:
        assert all(torch.equal(a, b) for a, b in zip(weights(True), weights(False)))
    finally:
        torch.use_deterministic_algorithms(False)
