"""States of level 0 at given steps: where wr rewinds to (`rewind_step`), and what is kept beside (`save_steps`)."""

import signal
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from harness_params import make_config
from tests.conftest import SMALL, Finished
from tests.processes import Forks
from tests.test_resume import killed_at_every
from tests.test_saved_by_older_code import unpack
from tests.traps import SHORT, Both, Dropout, KillAfterWrite, StopAt, states_of
from utils import single_gpu_harness
from utils.errors import RunError
from utils.grids.grid_run import GridRun
from utils.runs.points import points_of, read_point, read_rewind_point
from utils.schedulers import Timeline, learning_rate

STEPS = 12  # of an epoch: 1437 digits in batches of 128
K = 17  # step 5 of epoch 1
WR = {"experiment_params.training_type": "wr"}
POINTS = {
    **WR, "prune_params.rewind_step": K, "prune_params.save_steps": "0,5,12,17,36",
    "optimizer.scheduler_type": "CosineLRWarmup",  # another rate in each step
}  # fmt: skip
NAMES = ["rewind", *(f"step_{n}" for n in (0, 5, 12, 17, 36))]
# BatchNorm and 3 steps per epoch; step 4 is step 1 of epoch 1.
NORMS = {**SHORT, **WR, "model_params.model_name": "resnet20", "prune_params.rewind_step": 4}


@pytest.fixture(scope="module")
def whole(forks) -> Finished:
    return forks("whole", **POINTS)


def same(a: Any, b: Any) -> bool:
    """Whether two saved objects are equal, tensors to the bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def optimizer(run: Path, name: str) -> dict[str, Any]:
    return torch.load(run / "artifacts" / f"optimizer_{name}.pt", weights_only=True)


def assert_same_run(run: Finished, other: Finished) -> None:
    """Checkpoints, figures, and the optimizers of all points."""
    run.assert_same_figures(other)
    files = [{file.name for file in (r.path / "artifacts").glob("optimizer_*.pt")} for r in (run, other)]
    assert files[0] == files[1] != set()
    for name in files[0]:
        a, b = (torch.load(r.path / "artifacts" / name, weights_only=True) for r in (run, other))
        assert same(a, b), name


# --- what is trained -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("epochs", [1, 2])
def test_a_step_at_the_end_of_an_epoch_is_that_epoch(forks, epochs):
    by_epoch = forks(f"epoch_{epochs}", **WR, **{"prune_params.rewind_epoch": epochs})
    by_step = forks(f"step_{epochs}", **WR, **{"prune_params.rewind_step": epochs * STEPS})
    assert_same_run(by_step, by_epoch)
    assert by_step.err == by_epoch.err == ""
    assert by_step.csv("summary")["epochs"].tolist() == [3, 3 - epochs, 3 - epochs]


def test_rows_of_a_level_that_starts_in_the_middle_of_an_epoch(whole):
    assert whole.csv("summary")["epochs"].tolist() == [3, 2, 2]
    line = Timeline(epochs=3, steps_per_epoch=STEPS, warmup_epochs=1)
    for level, first in enumerate([0, K, K]):
        rows = whole.csv(f"epochwise_metrics/level_{level}_metrics")
        starts = [max(first, epoch * STEPS) for epoch in range(first // STEPS, 3)]
        assert rows["epoch"].tolist() == [start // STEPS for start in starts]
        assert rows["lr"].tolist() == [learning_rate("CosineLRWarmup", 0.1, start, line) for start in starts]
        assert (rows["images_per_second"] > 0).all()


def test_the_plain_harness_leaves_the_same_files(launch, whole):
    run = launch("plain", program=("-m", "utils.single_gpu_harness"), **POINTS)
    assert_same_run(run, whole)


# --- what is kept ----------------------------------------------------------------------------------------------------


def test_files_of_points(whole):
    files = {file.name for file in (whole.path / "checkpoints").glob("*.pt")}
    assert files == {f"model_{name}.pt" for name in [*NAMES, "init", "level_0", "level_1", "level_2"]}
    assert {f.name for f in (whole.path / "artifacts").glob("opt*.pt")} == {f"optimizer_{name}.pt" for name in NAMES}
    for point, known in (("step_0", "init"), ("step_17", "rewind"), ("step_36", "level_0")):
        assert same(whole.checkpoint(point), whole.checkpoint(known))
    assert same(optimizer(whole.path, "step_17"), optimizer(whole.path, "rewind"))
    assert optimizer(whole.path, "step_0")["optimizer"]["state"] == {}
    assert not same(whole.checkpoint("step_5"), whole.checkpoint("step_12"))
    assert [optimizer(whole.path, name)["step"] for name in NAMES] == [17, 0, 5, 12, 17, 36]


@pytest.mark.parametrize("kind", ["imp", "lrr"])
def test_points_are_kept_by_every_training_type_and_change_nothing(forks, kind):
    options = {"experiment_params.training_type": kind, "prune_params.er_method": "er_erk", "prune_params.er_init": 0.5}
    plain = forks(f"{kind}_plain", **options)
    kept = forks(f"{kind}_kept", **options, **{"prune_params.save_steps": "0,30"})
    for name in ("init", "level_0", "level_1", "level_2"):
        assert same(kept.checkpoint(name), plain.checkpoint(name))
    start = kept.checkpoint("step_0")
    assert same(start, kept.checkpoint("init")), "after pruning at initialization"
    assert 0.4 < float(start["fc1.weight_mask"].float().mean()) < 1
    assert not (kept.path / "checkpoints" / "model_rewind.pt").exists()


def test_reading_points(whole, tmp_path):
    rewound = read_rewind_point(whole.path, STEPS)
    assert rewound.step == K and same(rewound.weights, whole.checkpoint("rewind"))
    with pytest.raises(RunError, match=r"model_step_6\.pt is missing"):
        read_point(whole.path, 6)
    old = unpack(tmp_path)  # its rewind point, of epoch 1, does not hold its step
    assert read_rewind_point(old, 15).step == 15
    file = old / "checkpoints" / "model_rewind.pt"
    file.write_bytes((old / "checkpoints" / "model_init.pt").read_bytes())
    with pytest.raises(RunError, match="was changed since this run wrote it"):
        read_rewind_point(old, 15)


# --- killed, stopped, resumed ----------------------------------------------------------------------------------------


def test_killed_between_any_two_writes(whole, fork):
    run = killed_at_every(range(0, 80, 3), fork, "killed", POINTS)
    assert fork.count > 4
    assert_same_run(run, whole)


# Of the whole run: around step k of level 0, around the ends of epochs, in and around the first epoch of level 1.
@pytest.mark.parametrize("step", [5, 11, 12, 16, 17, 18, 36, 37, 43, 44])
def test_stopped_around_a_point(whole, fork, step):
    fork("stopped", status=143, trap=StopAt(step), **POINTS)
    kept = {file: file.stat().st_mtime_ns for file in (fork.folder / "stopped").rglob("*_step_*.pt")}
    assert len(kept) == 2 * (1 + sum(n <= step for n in (5, 12, 17, 36)))
    run = fork("stopped", resume=True, **POINTS)
    assert_same_run(run, whole)
    assert {file: file.stat().st_mtime_ns for file in kept} == kept, "a point that is reached is not written again"


def test_level_1_trained_again(whole, fork):
    fork("again", **POINTS)
    assert_same_run(fork("again", resume=True, **POINTS, **{"experiment_params.resume_level": 1}), whole)


def test_older_code_stopped_after_the_last_step_before_its_point(fork):
    """It saved the rewind point once the epoch was evaluated: its state at that step has no point yet."""
    options = {**WR, "prune_params.rewind_epoch": 1}
    whole = fork("whole", **options)
    fork("stopped", status=143, trap=StopAt(STEPS), **options)
    for file in ("checkpoints/model_rewind.pt", "artifacts/optimizer_rewind.pt"):
        (fork.folder / "stopped" / file).unlink()
    assert_same_run(fork("stopped", resume=True, **options), whole)


def test_batch_norm_and_dropout_in_the_first_epoch_of_level_1(forks):
    """It starts at step 1 of epoch 1, with random draws that are its own: stopped after one step; killed before it."""
    unbroken = forks("norms", trap=Dropout(), **NORMS)
    forks("norms_stopped", status=143, trap=Both(Dropout(), StopAt(7)), **NORMS)
    assert_same_run(forks("norms_stopped", resume=True, trap=Dropout(), **NORMS), unbroken)

    trap = Both(Dropout(), KillAfterWrite("state.json", 2))
    killed = forks("norms_killed", status=-signal.SIGKILL, trap=trap, **NORMS)
    state = torch.load(states_of(killed.path)[0], weights_only=True)
    assert (state["level"], state["begun"]) == (1, False)
    assert_same_run(forks("norms_killed", resume=True, trap=Dropout(), **NORMS), unbroken)


# --- two processes ---------------------------------------------------------------------------------------------------

TWO = {**NORMS, "prune_params.save_steps": "0,2,4"}


def ranks(forks: Forks, name: str, status: int = 0, **more) -> Finished:
    ended = [rank.finish(status) for rank in forks.ranks(name, 2, **TWO, **more)]
    return ended[0]


@pytest.fixture(scope="module")
def of_two(forks) -> Finished:
    return ranks(forks, "of_two")


def test_two_processes(of_two, forks):
    assert of_two.csv("summary")["epochs"].tolist() == [2, 1]
    one = forks("of_one", **TWO)
    assert same(one.checkpoint("step_0"), of_two.checkpoint("step_0"))
    for level in range(2):
        table = f"epochwise_metrics/level_{level}_metrics"
        a, b = (run.csv(table)[["epoch", "lr"]] for run in (one, of_two))
        pd.testing.assert_frame_equal(a, b)


@pytest.mark.parametrize("step", [4, 7])
def test_two_processes_stopped_around_a_point(of_two, forks, step):
    ranks(forks, f"two_{step}", 143, trap=StopAt(step))
    assert_same_run(ranks(forks, f"two_{step}", resume=True), of_two)


def test_two_processes_killed_at_a_point(of_two, forks):
    """kill -9 once the point's first file is there; the saved state is that of an earlier epoch."""
    both = forks.ranks("harmed", 2, **TWO)
    both[0].wait_for((both[0].path / "checkpoints" / "model_rewind.pt").exists)
    for rank in both:
        rank.kill(signal.SIGKILL)
    assert [rank.finish(None).status for rank in both] == [-signal.SIGKILL] * 2
    assert_same_run(ranks(forks, "harmed", resume=True), of_two)


# --- options ---------------------------------------------------------------------------------------------------------


LEVEL = "the 36 steps of a level (3 epochs of 12 steps)"
TOO_LATE = {**WR, "prune_params.rewind_step": 36, "prune_params.save_steps": "0,36,37"}
FAULTS = [
    f"prune_params.rewind_step: 36 is not allowed: less than {LEVEL}",
    f"prune_params.save_steps: [0, 36, 37] is not allowed: each at most {LEVEL}",
]


@pytest.mark.parametrize("nproc", [1, 2])
def test_steps_that_level_0_does_not_have(fork, nproc):
    """All of them at once, before anything is created."""
    run = fork("run", status=2, **TOO_LATE, **{"dist_params.nproc": nproc})
    assert run.err.splitlines() == [f"harness: {fault}" for fault in FAULTS]
    assert not run.path.exists()


def test_the_plain_harness_refuses_them_too(launch, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", launch.command("run", **TOO_LATE)[1:])
    assert single_gpu_harness.main() == 2
    assert capsys.readouterr().err.splitlines() == [f"single_gpu_harness: {fault}" for fault in FAULTS]
    assert not (launch.folder / "run").exists()


def test_both_options_are_told(fork):
    options = {**SHORT, **WR, "prune_params.rewind_step": 4, "prune_params.rewind_epoch": 1}
    assert fork("run", **options).err == (
        "harness: note: prune_params.rewind_epoch: 1 has no effect: rewind_step is 4: wr rewinds to that step\n"
    )


def test_points_may_not_change_on_resume(fork):
    fork("run", **SHORT, **{"prune_params.save_steps": 2})
    run = fork("run", resume=True, status=2, **SHORT, **{"prune_params.save_steps": 3})
    assert run.last_line.startswith("harness: prune_params.save_steps: [3] would change the experiment being resumed")


def test_a_network_that_is_not_finite_is_no_point(fork):
    options = {**POINTS, "optimizer.lr": "1e30", "optimizer.warmup_epochs": 0}
    run = fork("run", status=1, **options)
    assert run.last_line.startswith("harness: training loss is ") and len(run.err.splitlines()) == 1
    kept = {file.name for file in run.path.rglob("*.pt") if "step" in file.name or "rewind" in file.name}
    assert kept == {"model_step_0.pt", "optimizer_step_0.pt"}


def test_points_of_a_config():
    def points(**prune_params: Any) -> dict[int, list[str]]:
        kind = prune_params.pop("kind", "wr")
        return points_of(make_config({"prune_params": prune_params, "experiment_params": {"training_type": kind}}), 7)

    assert points(rewind_epoch=2) == {14: ["rewind"]}
    assert points(rewind_step=3) == {3: ["rewind"]}, "the default rewind_epoch has no say"
    assert points(rewind_step=3, save_steps=[0, 3, 9]) == {0: ["step_0"], 3: ["step_3", "rewind"], 9: ["step_9"]}
    assert points(kind="imp", rewind_step=3, save_steps=[5]) == {5: ["step_5"]}
    assert points(kind="lrr") == {}


def test_a_grid_counts_its_epochs(whole):
    """Steps per epoch are the run's to know: its first row of level 1 tells where levels begin."""
    options: dict[str, dict[str, Any]] = {}
    for path, value in {**SMALL, **POINTS}.items():
        section, key = path.split(".")
        options.setdefault(section, {})[key] = value
    options["experiment_params"] |= {"base_dir": str(whole.path.parent), "expt_name": "whole"}
    run = GridRun("whole", (), make_config(options))
    assert run.progress().epochs == run.progress().total == 3 + 2 + 2
    assert GridRun("not_begun", (), make_config(options)).progress().total == 9, "at most"
