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
from utils.runs.tables import BEST_COLUMNS, EPOCH_COLUMNS, SUMMARY, VALIDATION_COLUMNS, columns_of

AVERAGED = {"experiment_params.ema_decay": 0.9, "dataset.validation_images": 100, **SHORT}
AVERAGE = ["ema_test_acc", "ema_test_loss", "ema_val_acc", "ema_val_loss"]
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
    one = make_trainer(None, {**OPTIONS, "validation": True})
    train_epoch(one, 0, 0)
    before = {name: tensor.clone() for name, tensor in one.model.state_dict().items()}
    one.seed_draws(0, 1)
    tally = one.new_tally()
    one.train_epoch(0, 1, tally, lambda steps: False)
    result = one.finish_epoch(0, 1, tally, evaluate=True)
    after = {name: tensor.clone() for name, tensor in one.model.state_dict().items()}
    evaluation = one.evaluation
    own = evaluation.read(evaluation.count())
    assert own == {name: result[name] for name in ("test_loss", "test_acc", "val_loss", "val_acc")}
    one.model.load_state_dict(one.average.state_dict())
    assert evaluation.read(evaluation.count()) == {name: result[f"ema_{name}"] for name in own}
    assert all(result[f"ema_{name}"] != result[name] for name in ("test_loss", "val_loss"))
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_training_and_its_figures_are_those_without_an_average():
    one, plain = make_trainer(None, OPTIONS), make_trainer(None, {})
    for epoch in range(2):
        found, expected = train_epoch(one, 0, epoch), train_epoch(plain, 0, epoch)
        assert {name: found[name] for name in expected} == expected
        assert found.keys() - expected.keys() == {"ema_test_loss", "ema_test_acc"}
    for name, tensor in plain.model.state_dict().items():
        assert torch.equal(one.model.state_dict()[name], tensor), name


def test_graphs_have_the_same_bits():
    graphs, plain = make_trainer(RecordedGraphs, OPTIONS), make_trainer(None, OPTIONS)
    for epoch in range(4):
        assert train_epoch(graphs, 0, epoch) == train_epoch(plain, 0, epoch)
    assert graphs.graphs.graphs.replays > 8
    for name, tensor in plain.average.values.items():
        assert torch.equal(graphs.average.values[name], tensor), name


@pytest.fixture(scope="module")
def undisturbed(forks):
    return forks("wr", **AVERAGED, **KINDS["wr"])


def test_what_a_run_leaves(undisturbed):
    epochs = undisturbed.csv("epochwise_metrics/level_1_metrics")
    assert list(epochs) == [*EPOCH_COLUMNS, *VALIDATION_COLUMNS, *AVERAGE]
    summary = undisturbed.csv("summary")
    assert list(summary) == [*columns_of(SUMMARY), *VALIDATION_COLUMNS, *BEST_COLUMNS, *AVERAGE]
    assert summary[AVERAGE].iloc[1].tolist() == epochs[AVERAGE].iloc[-1].tolist()
    printed = next(line.split() for line in undisturbed.out.splitlines() if line.split()[:2] == ["level", "density"])
    assert printed == list(summary)
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
    assert list(plain.csv("summary")) == columns_of(SUMMARY)
    assert not list(plain.path.rglob("*_ema.pt"))


def test_the_single_harness_refuses_it(tmp_path):
    words = [f"--{key}={value}" for key, value in {**SMALL, "experiment_params.base_dir": tmp_path}.items()]
    command = [sys.executable, "-m", "utils.single_gpu_harness", *words, "--experiment_params.ema_decay=0.9"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "experiment_params.ema_decay: only harness.py averages weights; write 0" in done.stderr
    assert not list(tmp_path.iterdir())
