"""What each training type takes up a level with: weights, BN statistics, momentum and the place in the schedule."""

import contextlib
import copy

import pytest
import torch
from torch.nn import functional as F

from harness import Harness
from harness_params import Config, make_config
from harness_utils import Run, open_run
from utils.conv_type import density, masked_params
from utils.dataset import load_data
from utils.distributed import Context
from utils.runs.points import read_point
from utils.runs.pruning import prune_level
from utils.runs.stopping import StopRequest
from utils.runs.tables import epoch_table
from utils.schedulers import learning_rate
from utils.training.setup import build_model
from utils.training.trainer import Trainer

K = 1


def config(tmp_path, kind: str, **prune_params) -> Config:
    return make_config(
        {
            "model_params": {"model_name": "resnet20"},
            "dataset": {"batch_size": 512},
            "prune_params": {"prune_rate": 0.5, "rewind_epoch": K, "num_levels": 3, **prune_params},
            "experiment_params": {
                "training_type": kind, "epochs_per_level": 2, "base_dir": str(tmp_path), "precision": "fp32",
            },
            "optimizer": {"warmup_epochs": 0.5},
        }
    )  # fmt: skip


@pytest.fixture
def ctx():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield Context()
    torch.set_num_threads(threads)


@pytest.fixture
def begin(tmp_path, ctx):
    """begin(kind, **options) -> (harness of a new run at the start of its level 0, the run)."""
    with contextlib.ExitStack() as stack:

        def make(kind: str, **options) -> tuple[Harness, Run]:
            cfg = config(tmp_path, kind, **options)
            data = stack.enter_context(contextlib.closing(load_data(cfg, ctx)))
            run = stack.enter_context(open_run(cfg))
            trainer = Trainer(cfg, ctx, build_model(cfg, data, ctx), data)
            harness = Harness(cfg, ctx, trainer, run, StopRequest(ctx))
            harness.prune()
            harness.rewind()
            return harness, run

        yield make


def snapshot(harness: Harness) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in harness.model.state_dict().items()}


@pytest.mark.parametrize("kind", ["imp", "wr", "lrr"])
def test_start_of_the_next_level(kind, begin):
    harness, run = begin(kind)
    start = snapshot(harness)
    assert harness.position.epoch == 0
    harness.train_level()
    end = snapshot(harness)
    harness.finish_level()
    harness.prune()
    pruned = snapshot(harness)
    harness.rewind()
    now = snapshot(harness)
    source = {"imp": start, "wr": None, "lrr": end}[kind]
    own = harness.trainer.optimizer.state_dict()["state"]
    if kind == "wr":
        source = run.load_checkpoint("rewind")
        momentum = run.load_artifact("optimizer_rewind")["optimizer"]["state"]
        assert momentum.keys() == own.keys() and len(own) > 0
        for i in own:
            assert torch.equal(own[i]["momentum_buffer"], momentum[i]["momentum_buffer"])
    else:
        assert not own
    assert harness.position.epoch == (K if kind == "wr" else 0)

    masks = {f"{name}_mask" for name, _, _ in masked_params(harness.model)}
    for name, tensor in now.items():
        if name in masks:
            assert torch.equal(tensor, pruned[name]), name
        elif f"{name}_mask" in masks:
            assert torch.equal(tensor, source[name] * now[f"{name}_mask"]), name
        else:  # biases, BN weights and statistics
            assert torch.equal(tensor, source[name]), name
    assert density(harness.model) == pytest.approx(0.5, abs=1e-4)
    assert not torch.equal(end["bn1.running_mean"], start["bn1.running_mean"])


def test_epoch_k_is_the_state_after_k_epochs(begin, ctx):
    """model_rewind.pt is what a run of k epochs ends with, up to the schedule, which is the same over those epochs."""
    harness, run = begin("wr", num_levels=1)
    harness.train_level()
    saved = run.load_checkpoint("rewind")
    again = Trainer(harness.cfg, ctx, build_model(harness.cfg, harness.data, ctx), harness.data)
    for epoch in range(K):
        again.train_epoch(0, epoch, again.new_tally(), lambda steps: False)
    for name, tensor in again.model.state_dict().items():
        assert torch.equal(tensor, saved[name]), name


def test_level_1_goes_on_from_step_k_as_a_bare_loop_does(begin):
    """Step 4 is step 1 of epoch 1: rate, order, momentum and BatchNorm go on there; the row is of steps 1 and 2."""
    harness, run = begin("wr", num_levels=2, rewind_step=4)
    data, o, line = harness.data, harness.cfg.optimizer, harness.trainer.timeline
    assert line.steps_per_epoch == 3
    harness.train_level()
    harness.finish_level()
    harness.prune()
    masks = {name: mask.clone() for name, _, mask in masked_params(harness.model)}
    harness.rewind()
    assert (harness.position.epoch, harness.position.step) == (1, 1)

    model = copy.deepcopy(harness.model)
    model.load_state_dict({**run.load_checkpoint("rewind"), **{f"{name}_mask": mask for name, mask in masks.items()}})
    momentum = run.load_artifact("optimizer_rewind")["optimizer"]["state"]
    velocity = [momentum[i]["momentum_buffer"].clone() for i in range(len(momentum))]
    loss_sum, right, images = 0.0, 0, 0
    with torch.no_grad():
        for name, param in model.named_parameters():
            param *= masks.get(name, 1)
    model.train()
    for step, (x, y) in list(enumerate(data.train.batches(1, 1)))[1:]:
        logits = model(x)
        loss = F.cross_entropy(logits, y)
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        rate = learning_rate(o.scheduler_type, o.lr, 3 + step, line)
        with torch.no_grad():
            for (name, param), v, gradient in zip(model.named_parameters(), velocity, gradients):
                v.mul_(o.momentum).add_(gradient + o.weight_decay * param)
                param -= rate * v
                param *= masks.get(name, 1)
        loss_sum += loss.item() * len(y)
        right += int((logits.argmax(1) == y).sum())
        images += len(y)

    harness.train_level()
    (row,) = run.tables[epoch_table(1)]
    assert images == data.train.num_images - data.train.global_batch(0)
    assert row["train_loss"] == pytest.approx(loss_sum / images, rel=1e-4)
    assert row["train_acc"] == pytest.approx(100 * right / images, abs=0.3)
    assert row["lr"] == learning_rate(o.scheduler_type, o.lr, 4, line)
    for name, tensor in harness.model.state_dict().items():
        torch.testing.assert_close(tensor, model.state_dict()[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("step", [0, 3, 4, 5])
def test_level_0_goes_on_from_a_point_to_the_same_bits(begin, step):
    """A point is all that a branch needs: weights, BatchNorm, momentum, the place in the schedule."""
    harness, run = begin("imp", num_levels=1, save_steps=[0, 3, 4, 5, 6])
    harness.train_level()
    end = snapshot(harness)
    run.writer.flush()
    last, point = read_point(run.path, 6), read_point(run.path, step)
    assert (last.step, point.step) == (6, step)
    assert all(torch.equal(last.weights[name], tensor) for name, tensor in end.items())

    harness.model.load_state_dict(point.weights)
    harness.begin_level(point.step, point.optimizer)
    assert (harness.position.epoch, harness.position.step) == divmod(step, 3)
    harness.train_level()
    for name, tensor in harness.model.state_dict().items():
        assert torch.equal(tensor, end[name]), name


def test_densities_start_from_what_initialization_left(tmp_path, ctx):
    cfg = config(tmp_path, "imp", er_method="er_erk", er_init=0.4, prune_rate=0.2)
    data = load_data(cfg, ctx)
    model = build_model(cfg, data, ctx)
    prune_level(cfg, model, data, 0, 1.0)
    left = density(model)
    assert left == pytest.approx(0.4, abs=1e-4)
    for level in (1, 2, 3):
        prune_level(cfg, model, data, level, left)
        assert density(model) == pytest.approx(left * 0.8**level, abs=1e-5)
    data.close()
