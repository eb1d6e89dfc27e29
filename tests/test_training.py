"""Training steps against the formulas; what an optimizer goes on with; what several ranks evaluate."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.func import functional_call

from harness_params import make_config
from tests.processes import in_ranks
from utils.conv_type import apply_masks, insert_masks, masked_params
from utils.data.images import Normalizer
from utils.data.in_memory import MemoryTestLoader, MemoryTrainLoader
from utils.data.loaders import Data
from utils.dataset import load_data
from utils.distributed import Context
from utils.training.setup import build_model, make_optimizer
from utils.training.trainer import Trainer


def small_net(memory_format: torch.memory_format) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3, stride=2), nn.Flatten(), nn.LazyLinear(5))
    net(torch.zeros(1, 3, 8, 8))
    return insert_masks(net).to(memory_format=memory_format)


def trainer(channels_last: bool, **optimizer) -> Trainer:
    options = {"channels_last": channels_last, "precision": "fp32", "epochs_per_level": 2}
    cfg = make_config({"experiment_params": options, "optimizer": optimizer})
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


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
@pytest.mark.parametrize("before", [True, False])
def test_momentum_survives_a_change_of_memory_layout(before, name):
    options = {"optimizer_name": name, "lr": 0.1 if name == "sgd" else 0.01}
    first, second = trainer(before, **options), trainer(not before, **options)
    train(first, 0)
    second.model.load_state_dict(first.model.state_dict())
    second.restart(first.optimizer_state_dict())
    for param, values in second.optimizer.state.items():
        assert all(value.stride() == param.stride() for value in values.values() if value.ndim)
    train(first, 1)
    train(second, 1)
    for mine, theirs in zip(first.model.parameters(), second.model.parameters()):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_a_state_can_be_gone_on_from_twice(name):
    """Training changes no tensor of it, Adam's count of steps among them: levels rewind to one state."""
    one = trainer(False, optimizer_name=name)
    train(one, 0)
    state = copy.deepcopy({**one.state_dict()})
    before, ends = str(state["optimizer"]), []
    for _ in range(2):
        one.load_state_dict(state)
        train(one, 1)
        ends.append(copy.deepcopy(one.model.state_dict()))
        assert str(state["optimizer"]) == before
    assert all(torch.equal(value, ends[1][key]) for key, value in ends[0].items())


# One test of each option against the formulas; each option on its own, and all together.
SGD = {"lr": 0.2, "momentum": 0.0, "weight_decay": 0.0, "scheduler_type": "Constant", "warmup_epochs": 1}
OPTIONS = {
    "plain": {},
    "momentum": {"momentum": 0.7},
    "nesterov": {"momentum": 0.7, "nesterov": True},
    "decay": {"weight_decay": 0.1},
    "decay of weights alone": {"weight_decay": 0.1, "no_decay_bn": True},
    "smoothing": {"label_smoothing": 0.3},
    "clipping": {"grad_clip": 0.05},
}
OPTIONS["all"] = {key: value for options in OPTIONS.values() for key, value in options.items()}
for name in ("adam", "adamw"):
    OPTIONS[name] = {"optimizer_name": name, "lr": 0.02}
    OPTIONS[f"{name}, all"] = {**OPTIONS["all"], **OPTIONS[name], "beta1": 0.6, "beta2": 0.9}


def by_the_formulas(net: nn.Module, batches: list, rates: list[float], o: dict) -> dict[str, torch.Tensor]:
    """The weights after one step per batch, in float64, with nothing of torch.optim."""
    weights = {name: param.detach().double() for name, param in net.named_parameters()}
    masks = {name: mask for name, _, mask in masked_params(net)}
    velocity = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    squares = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    by_adam, decoupled = "adam" in o.get("optimizer_name", "sgd"), o.get("optimizer_name") == "adamw"
    beta1, beta2 = o.get("beta1", 0.9), o.get("beta2", 0.999)
    for t, ((images, labels), rate) in enumerate(zip(batches, rates, strict=True), start=1):
        leaves = {name: weight.clone().requires_grad_() for name, weight in weights.items()}
        log_p = functional_call(net.double(), leaves, (images.double(),)).log_softmax(1)
        smoothing = o.get("label_smoothing", 0)
        target = nn.functional.one_hot(labels, 5) * (1 - smoothing) + smoothing / 5
        loss = -(target * log_p).sum(1).mean()
        gradients = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values()))))
        gradients = {name: g * masks[name] if name in masks else g for name, g in gradients.items()}
        norm = sum(g.square().sum() for g in gradients.values()) ** 0.5
        clip = o.get("grad_clip", 0)
        scale = min(1.0, clip / norm) if clip else 1.0
        assert scale < 1 or not clip
        for name, weight in weights.items():
            decay = 0 if o.get("no_decay_bn") and weight.ndim == 1 else o["weight_decay"]
            step = gradients[name] * scale + (0 if decoupled else decay) * weight
            if by_adam:  # Kingma & Ba 2015, algorithm 1; Loshchilov & Hutter 2019, algorithm 2
                velocity[name] = beta1 * velocity[name] + (1 - beta1) * step
                squares[name] = beta2 * squares[name] + (1 - beta2) * step**2
                step = velocity[name] / (1 - beta1**t) / ((squares[name] / (1 - beta2**t)).sqrt() + 1e-8)
                step = step + decay * weight if decoupled else step
            else:
                velocity[name] = o["momentum"] * velocity[name] + step
                step = step + o["momentum"] * velocity[name] if o.get("nesterov") else velocity[name]
            weights[name] = (weight - rate * step) * masks.get(name, 1)
    return weights


@pytest.mark.parametrize("name", OPTIONS)
def test_two_epochs_are_those_of_the_formulas(name):
    """Half of the weights pruned; a warm-up over the first epoch's four steps, whose rates are 1/4 ... 4/4."""
    options = {**SGD, **OPTIONS[name]}
    one = trainer(False, **options)
    for number, (_, _, mask) in enumerate(masked_params(one.model)):
        mask.copy_(torch.rand(mask.shape, generator=torch.Generator().manual_seed(number)) < 0.5)
    apply_masks(one.model)
    batches = [batch for epoch in range(2) for batch in one.data.train.batches(0, epoch)]
    rates = [options["lr"] * factor for factor in (0.25, 0.5, 0.75, 1, 1, 1, 1, 1)]
    expected = by_the_formulas(copy.deepcopy(one.model), batches, rates, options)
    for epoch in range(2):
        train(one, epoch)
    found = {name: param.detach().double() for name, param in one.model.named_parameters()}
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_draws_of_an_epoch_are_its_own():
    """Dropout's, say: others in each level, epoch and rank, the same when an epoch is trained again."""
    one, draws = trainer(False), []
    for level, epoch, rank in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 0)):
        one.ctx = Context(rank=rank, world=2)
        one.seed_draws(level, epoch)
        draws.append(torch.rand(4).tolist())
    assert draws[-1] == draws[0] and len({tuple(draw) for draw in draws}) == 4


def evaluate_with_other_statistics(ctx: Context, folder: Path) -> None:
    """Each rank's running means are its own, as after an epoch on its own images."""
    cfg = make_config({"model_params": {"model_name": "resnet20"}, "experiment_params": {"precision": "fp32"}})
    data = load_data(cfg, ctx)
    one = Trainer(cfg, ctx, build_model(cfg, data, ctx), data)
    for name, buffer in one.model.named_buffers():
        if name.endswith("running_mean"):
            buffer.add_(ctx.rank)
    result = one.evaluate()
    torch.save(
        (result, {name: buffer.clone() for name, buffer in one.model.named_buffers()}), folder / f"{ctx.rank}.pt"
    )


def test_all_ranks_evaluate_rank_0s_network(tmp_path):
    """The one that is saved; each test image counts once."""
    in_ranks(2, evaluate_with_other_statistics, tmp_path)
    (found, statistics), (others, of_others) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert found == others
    assert all(torch.equal(value, of_others[name]) for name, value in statistics.items())
    (tmp_path / "alone").mkdir()
    in_ranks(1, evaluate_with_other_statistics, tmp_path / "alone")
    alone, _ = torch.load(tmp_path / "alone" / "0.pt")
    assert found == pytest.approx(alone, rel=1e-5)


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_a_first_step_that_overflows_leaves_no_trace_in_fp16(name):
    """SGD's kernel would leave a momentum buffer that was never written to: not-a-number, in this mode.

    Adam's count of steps goes on with the next step that counts.
    """
    cfg = make_config({"experiment_params": {"precision": "fp16"}, "optimizer": {"optimizer_name": name}})

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
