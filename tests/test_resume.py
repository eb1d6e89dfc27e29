"""A run that is killed or stopped anywhere, and resumed, is the run that would have been: weights, masks, figures."""

import random
import signal
import time

import pytest
import torch

from tests.conftest import Finished
from tests.processes import Forks
from tests.traps import KINDS, SHORT, UNMET, Both, DieAt, Dropout, StopAt, begun


@pytest.fixture(scope="module")
def undisturbed(forks) -> dict[str, Finished]:
    return {kind: forks(kind, **options) for kind, options in KINDS.items()}


# --- killed ----------------------------------------------------------------------------------------------------------


def killed_at_every(places: range, forks: Forks, name: str, options: dict) -> Finished:
    """A run killed over and over, each time a little further into its writing of files, until none is left to die at.

    A run that makes no progress between two deaths would never end: `places` bounds their number.
    """
    for place in places:
        run = forks.start(name, resume=begun(forks.folder / name), trap=DieAt(place), **options).finish(None)
        if run.status == 0:
            return run
        assert run.status == -signal.SIGKILL, run.err
    return forks(name, resume=True, **options)


@pytest.mark.parametrize("kind", KINDS)
def test_killed_between_any_two_writes(undisturbed, fork, kind):
    """Deaths at the 1st, 4th, 7th ... fsync or rename of each process: each is survived, and costs no bit."""
    run = killed_at_every(range(0, 60, 3), fork, "killed", KINDS[kind])
    assert fork.count > 4
    run.assert_same_figures(undisturbed[kind])
    assert not list(run.path.rglob("*.part"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place", range(0, 75))
def test_killed_once_at_each_write(undisturbed, fork, kind, place):
    run = fork.start("killed", trap=DieAt(place), **KINDS[kind]).finish(None)
    if run.status:
        run = fork("killed", resume=begun(run.path), **KINDS[kind])
    run.assert_same_figures(undisturbed[kind])


def test_killed_at_random_moments(undisturbed, fork):
    begin = time.monotonic()
    fork("timed", **KINDS["wr"])
    whole = time.monotonic() - begin
    rng, kills = random.Random(1), 0
    for _ in range(12):
        process = fork.start("killed", resume=begun(fork.folder / "killed"), **KINDS["wr"])
        process.process.join(rng.uniform(0.1, 0.8) * whole)
        if process.process.exitcode is None:
            process.kill()
        if process.finish(None).status == 0:
            break
        kills += 1
    assert kills >= 1
    run = fork("killed", resume=begun(fork.folder / "killed"), **KINDS["wr"])
    run.assert_same_figures(undisturbed["wr"])


# --- stopped in the middle of an epoch -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_stopped_and_resumed_again_and_again(undisturbed, fork, kind):
    """Each process is stopped a few steps further: in the middle of an epoch, at its end, at a level's end."""
    stops = 0
    for steps in (5, 7, 12, 20, 36, 40, 1000):
        run = fork.start("stopped", resume=stops > 0, trap=StopAt(steps), **KINDS[kind]).finish(None)
        if run.status == 0:
            break
        assert run.status == 143
        assert run.last_line.startswith("harness: stopped by SIGTERM; ")
        assert run.last_line.endswith(f" --resume {run.path}")
        stops += 1
    assert run.status == 0 and stops >= 4
    run.assert_same_figures(undisturbed[kind])
    for level in range(3):
        rows = run.csv(f"epochwise_metrics/level_{level}_metrics")
        assert (rows["seconds"] > 0).all() and (rows["images_per_second"] > 0).all()


ADAM = {"optimizer.lr": 0.01, "prune_params.num_levels": 2}
OPTIMIZERS = {
    "adam": {**ADAM, "experiment_params.training_type": "wr", "prune_params.rewind_step": 17},
    "adamw": {**ADAM, "experiment_params.training_type": "lrr", "optimizer.weight_decay": 0.1},
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_moments_of_adam_go_on_where_they_stood(fork, launch, name):
    """Stopped in the middle of epochs of both levels; level 1 is rewound into the middle of an epoch, with the moments.

    The harness in one process and one screen gives the same bits.
    """
    options = {**OPTIMIZERS[name], "optimizer.optimizer_name": name}
    whole = fork("whole", **options)
    for place, steps in enumerate((5, 20, 14)):
        fork("parts", resume=place > 0, status=143, trap=StopAt(steps), **options)
    fork("parts", resume=True, **options).assert_same_figures(whole)
    launch("one", program=("-m", "utils.single_gpu_harness"), **options).assert_same_figures(whole)


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_dropout_and_batch_norm_go_on_where_they_stood(forks, precision):
    options = {
        **SHORT, "model_params.model_name": "resnet20", "prune_params.num_levels": 1,
        "experiment_params.precision": precision,
    }  # fmt: skip
    name = f"dropout_{precision}"
    whole = forks(name, trap=Dropout(), **options)
    for place in range(2):
        forks(f"{name}_parts", resume=place > 0, status=143, trap=Both(Dropout(), StopAt(2)), **options)
    forks(f"{name}_parts", resume=True, trap=Dropout(), **options).assert_same_figures(whole)


def test_a_trap_that_is_never_met_is_a_failure(fork):
    """LeNet has no BatchNorm for it: the run is whole, and the test that laid the trap would have shown nothing."""
    run = fork("missed", status=UNMET, trap=Both(Dropout(), StopAt(1000)), **SHORT)
    assert run.last_line == "the trap Dropout was laid and never met" and len(run.csv("summary")) == 2


def test_bf16(forks):
    options = {**SHORT, **KINDS["wr"], "experiment_params.precision": "bf16"}
    whole = forks("bf16", **options)
    assert "bfloat16" in torch.load(whole.path / "artifacts" / "state_0.pt")["surroundings"]["precision"]
    forks("bf16_parts", status=143, trap=StopAt(4), **options)
    forks("bf16_parts", resume=True, **options).assert_same_figures(whole)


def ranks_of(forks: Forks, name: str, world: int, statuses: int = 0, **more) -> Finished:
    ended = [rank.finish(statuses) for rank in forks.ranks(name, world, **more)]
    return ended[0]


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_stopped_and_resumed(forks, world):
    """Stops by a signal at one rank only: every rank ends at the same step. 3 ranks: the order of sums matters."""
    options = {**SHORT, "model_params.model_name": "conv2", "dataset.batch_size": 40}
    name = f"ranks_{world}"
    whole = ranks_of(forks, name, world, **options)
    ranks = forks.ranks(f"{name}_parts", world, **options)
    ranks[world - 1].wait_for_rows(1)
    ranks[world - 1].kill(signal.SIGTERM)
    assert [rank.finish(None).status for rank in ranks] == [143] * world
    resumed = ranks_of(forks, f"{name}_parts", world, resume=True, **options)
    assert resumed.err == ""
    resumed.assert_same_figures(whole)
