"""``experiment_params.ema_decay``: an average of the weights, evaluated beside them."""

import subprocess
import sys

import pytest
import torch

from tests.conftest import ROOT, SMALL
from tests.recorded_graph import RecordedGraphs
from tests.test_graphs import make_trainer, train_epoch
from tests.traps import KINDS, SHORT, StateEachStep, StopAt
from utils.conv_type import masked_params
from utils.pruning_utils import prune

AVERAGED = {"experiment_params.ema_decay": 0.9, **SHORT}
OPTIONS = {"experiment_params": {"ema_decay": 0.75}}


def test_it_is_the_average_by_hand():
    one = make_trainer(None, OPTIONS)
    expected = {name: tensor.clone() for name, tensor in one.model.state_dict().items()}

    def after_step(steps: int) -> bool:
        for name, tensor in one.model.state_dict().items():
            if tensor.is_floating_point():
                expected[name] += 0.25 * (tensor - expected[name])
        return False

    train_epoch(one, 0, 0, after_step)
    for name, tensor in one.average.state_dict().items():
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-7)
        else:
            assert torch.equal(tensor, one.model.state_dict()[name])
    assert not torch.equal(one.average.values["fc.weight"], one.model.fc.weight)
    assert not torch.equal(one.average.values["bn1.running_mean"], one.model.bn1.running_mean)


def test_it_is_masked_and_starts_anew_with_a_level():
    one = make_trainer(None, OPTIONS)
    train_epoch(one, 0, 0)
    prune(one.model, "mag", 0.3)
    one.restart()
    for name, param in one.model.named_parameters():
        assert torch.equal(one.average.values[name], param), name
    train_epoch(one, 1, 0)
    for name, _, mask in masked_params(one.model):
        assert not one.average.values[name][~mask].any() and one.average.values[name][mask].any()


def test_evaluating_it_leaves_the_network_as_it_is_and_gives_its_own_figures():
    one = make_trainer(None, OPTIONS)
    train_epoch(one, 0, 0)
    before = {name: tensor.clone() for name, tensor in one.model.state_dict().items()}
    one.seed_draws(0, 1)
    tally = one.new_tally()
    one.train_epoch(0, 1, tally, lambda steps: False)
    result = one.finish_epoch(0, 1, tally, evaluate=True)
    after = {name: tensor.clone() for name, tensor in one.model.state_dict().items()}
    assert one.evaluate() == (result.test_loss, result.test_acc)
    one.model.load_state_dict(one.average.state_dict())
    assert one.evaluate() == (result.of_average["ema_test_loss"], result.of_average["ema_test_acc"])
    assert result.of_average["ema_test_loss"] != result.test_loss
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_training_and_its_figures_are_those_without_an_average():
    one, plain = make_trainer(None, OPTIONS), make_trainer(None, {})
    assert [train_epoch(one, 0, epoch) for epoch in range(2)] == [train_epoch(plain, 0, epoch) for epoch in range(2)]
    for name, tensor in plain.model.state_dict().items():
        assert torch.equal(one.model.state_dict()[name], tensor), name


def test_graphs_have_the_same_bits():
    graphs, plain = make_trainer(RecordedGraphs, OPTIONS), make_trainer(None, OPTIONS)
    for epoch in range(4):
        found = []
        for one in (graphs, plain):
            one.seed_draws(0, epoch)
            tally = one.new_tally()
            one.train_epoch(0, epoch, tally, lambda steps: False)
            result = one.finish_epoch(0, epoch, tally, evaluate=True)
            found.append((result[:4], result.of_average))
        assert found[0] == found[1]
    assert graphs.graphs.graphs.replays > 8
    for name, tensor in plain.average.values.items():
        assert torch.equal(graphs.average.values[name], tensor), name


@pytest.fixture(scope="module")
def undisturbed(forks):
    return forks("wr", **AVERAGED, **KINDS["wr"])


def test_what_a_run_leaves(undisturbed):
    epochs = undisturbed.csv("epochwise_metrics/level_1_metrics")
    assert list(epochs.columns[-2:]) == ["ema_test_acc", "ema_test_loss"]
    summary = undisturbed.csv("summary")
    assert summary.columns[-1] == "ema_test_acc"
    assert summary["ema_test_acc"][1] == epochs["ema_test_acc"].iloc[-1]
    average, last = undisturbed.checkpoint("level_1_ema"), undisturbed.checkpoint("level_1")
    assert average.keys() == last.keys()
    masks = [name for name in last if name.endswith("_mask")]
    assert masks
    for name in masks:
        assert torch.equal(average[name], last[name])
        assert not average[name.removesuffix("_mask")][~last[name]].any()
    assert any(not torch.equal(average[name], last[name]) for name in last)


def test_a_run_stopped_within_an_epoch_goes_on_bit_for_bit(undisturbed, fork):
    options = {**AVERAGED, **KINDS["wr"]}
    fork("wr", status=143, trap=StopAt(4), **options)
    fork("wr", resume=True, trap=StateEachStep(), **options).assert_same_figures(undisturbed)


def test_a_level_started_again_has_the_same_figures(undisturbed, fork):
    options = {**AVERAGED, **KINDS["wr"]}
    fork("wr", **options)
    again = fork("wr", resume=True, **options, **{"experiment_params.resume_level": 1})
    again.assert_same_figures(undisturbed)


def test_runs_without_it_have_no_such_columns(fork):
    plain = fork("plain", **SHORT, **KINDS["lrr"])
    assert not [c for c in plain.csv("summary").columns if "ema" in c]
    assert not list(plain.path.rglob("*_ema.pt"))


def test_the_single_harness_refuses_it(tmp_path):
    words = [f"--{key}={value}" for key, value in {**SMALL, "experiment_params.base_dir": tmp_path}.items()]
    command = [sys.executable, "-m", "utils.single_gpu_harness", *words, "--experiment_params.ema_decay=0.9"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "experiment_params.ema_decay: only harness.py averages weights; write 0" in done.stderr
    assert not list(tmp_path.iterdir())
