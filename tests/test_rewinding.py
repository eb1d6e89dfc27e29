"""What each training type takes up a level with: weights, BN statistics, momentum and the place in the schedule."""

import contextlib

import pytest
import torch

from harness import Harness
from harness_params import Config, make_config
from harness_utils import Run, open_run
from utils.conv_type import density, masked_params
from utils.dataset import load_data
from utils.distributed import Context
from utils.runs.pruning import prune_level
from utils.runs.stopping import StopRequest
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
        momentum = run.load_artifact("optimizer_rewind")["sgd"]["state"]
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
