"""A run that is killed or stopped anywhere, and resumed, is the run that would have been: weights, masks, figures."""

import functools
import os
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.conftest import Finished
from tests.processes import Forks, fork, rows_of  # noqa: F401 (a fixture)

SYNFLOW = {
    "prune_params.er_method": "synflow",
    "prune_params.er_init": 0.5,
    "prune_params.synflow_rounds": 10,
    "experiment_params.training_type": "lrr",
}
KINDS = {
    "imp": {"experiment_params.training_type": "imp"},
    "wr": {"experiment_params.training_type": "wr", "prune_params.rewind_epoch": 1},
    "lrr": {"experiment_params.training_type": "lrr"},
    "synflow": SYNFLOW,
}
# Three classes of state at once: BN statistics, dropout's draws, gradients of very different sizes.
WITH_DROPOUT = {
    "model_params.model_name": "vgg11_bn", "dataset.batch_size": 500, "prune_params.num_levels": 2,
    "experiment_params.epochs_per_level": 2, "experiment_params.training_type": "lrr",
}  # fmt: skip


@pytest.fixture(scope="module")
def forks(tmp_path_factory) -> Forks:
    return Forks(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def undisturbed(forks) -> dict[str, Finished]:
    return {kind: forks(kind, **options) for kind, options in KINDS.items()}


def contents(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def copy_of(run: Finished, folder: Path, name: str = "copy") -> Finished:
    shutil.copytree(run.path, folder / name)
    return Finished(folder / name, 0, "", "")


# --- killed ----------------------------------------------------------------------------------------------------------


class DieAt:
    """Ends the process, as kill -9 would, before or after its n-th call of one of the functions that make files."""

    def __init__(self, place: int):
        self.place = place

    def __call__(self) -> None:
        self.count = 0
        for name in ("fsync", "replace"):
            setattr(os, name, functools.partial(self.counted, getattr(os, name)))

    def counted(self, function: Callable, *args):
        if self.count == self.place:
            os.kill(os.getpid(), signal.SIGKILL)
        self.count += 1
        return function(*args)


def _begun(path: Path) -> bool:
    return (path / "expt_config.yaml").exists()


def killed_at_every(places: range, forks: Forks, name: str, options: dict) -> Finished:
    """A run killed over and over, each time a little further into its writing of files, until none is left to die at.

    A run that makes no progress between two deaths would never end: `places` bounds their number.
    """
    for place in places:
        run = forks.start(name, resume=_begun(forks.folder / name), trap=DieAt(place), **options).finish(None)
        if run.status == 0:
            return run
        assert run.status == -signal.SIGKILL, run.err
    return forks(name, resume=True, **options)


@pytest.mark.parametrize("kind", KINDS)
def test_killed_between_any_two_writes(undisturbed, fork, kind):  # noqa: F811
    """Deaths at the 1st, 4th, 7th ... fsync or rename of each process: each is survived, and costs no bit."""
    run = killed_at_every(range(0, 60, 3), fork, "killed", KINDS[kind])
    assert fork.count > 4
    run.assert_same_figures(undisturbed[kind])
    assert not list(run.path.rglob("*.part"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place", range(0, 75))
def test_killed_once_at_each_write(undisturbed, fork, kind, place):  # noqa: F811
    run = fork.start("killed", trap=DieAt(place), **KINDS[kind]).finish(None)
    if run.status:
        run = fork("killed", resume=_begun(run.path), **KINDS[kind])
    run.assert_same_figures(undisturbed[kind])


def test_killed_at_random_moments(undisturbed, fork):  # noqa: F811
    rng = random.Random(1)
    for attempt in range(12):
        process = fork.start("killed", resume=_begun(fork.folder / "killed"), **KINDS["wr"])
        process.process.join(rng.uniform(0.2, 1.5))
        if process.process.exitcode is None:
            process.kill()
        if process.finish(None).status == 0:
            break
    run = fork("killed", resume=True, **KINDS["wr"])
    run.assert_same_figures(undisturbed["wr"])


# --- stopped in the middle of an epoch -------------------------------------------------------------------------------


class StopAt:
    """Sends the process a signal while it takes step `step` of an epoch, once."""

    def __init__(self, *steps: int, signum: int = signal.SIGTERM):
        self.steps, self.signum = steps, signum

    def __call__(self) -> None:
        from utils.signals import StopRequest

        plain, self.calls = StopRequest.__call__, 0

        def asked(request, steps: int) -> bool:
            self.calls += 1
            if self.calls in self.steps:
                os.kill(os.getpid(), self.signum)
            return plain(request, steps)

        StopRequest.__call__ = asked


@pytest.mark.parametrize("kind", KINDS)
def test_stopped_and_resumed_again_and_again(undisturbed, fork, kind):  # noqa: F811
    """Each process is stopped a few steps further: in the middle of an epoch, at its end, at a level's end."""
    stops = 0
    for steps in (5, 7, 12, 20, 36, 40, 1000):
        run = fork.start("stopped", resume=stops > 0, trap=StopAt(steps), **KINDS[kind]).finish(None)
        if run.status == 0:
            break
        assert run.status == 143
        assert run.last_line == "harness: stopped by SIGTERM; resume with --experiment_params.resume_expt_name=stopped"
        stops += 1
    assert run.status == 0 and stops >= 4
    run.assert_same_figures(undisturbed[kind])
    for level in range(3):
        rows = run.csv(f"epochwise_metrics/level_{level}_metrics")
        assert (rows["seconds"] > 0).all() and (rows["images_per_second"] > 0).all()


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_dropout_and_batch_norm_go_on_where_they_stood(forks, precision):
    options = {**WITH_DROPOUT, "experiment_params.precision": precision}
    whole = forks(f"dropout_{precision}", **options)
    parts = forks(f"parts_{precision}", status=143, trap=StopAt(2), **options)
    parts = forks(parts.path.name, resume=True, status=143, trap=StopAt(5), **options)
    parts = forks(parts.path.name, resume=True, **options)
    parts.assert_same_figures(whole)


def test_bf16_small(forks):
    options = {**KINDS["wr"], "experiment_params.precision": "bf16", "prune_params.num_levels": 2}
    whole = forks("bf16", **options)
    parts = forks("bf16_parts", status=143, trap=StopAt(17), **options)
    forks("bf16_parts", resume=True, **options).assert_same_figures(whole)
    assert parts.status == 143


def ranks_of(forks: Forks, name: str, world: int, statuses: int = 0, **more) -> Finished:
    return [rank.finish(statuses) for rank in forks.ranks(name, world, **more)][0]


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_stopped_and_resumed(forks, world):
    """Stops by a signal at one rank only: every rank ends at the same step. 3 ranks: the order of sums matters."""
    options = {
        "model_params.model_name": "conv2", "dataset.batch_size": 40, "prune_params.num_levels": 2,
        "experiment_params.epochs_per_level": 2, "prune_params.prune_rate": 0.8,
    }  # fmt: skip
    name = f"ranks_{world}"
    whole = ranks_of(forks, name, world, **options)
    ranks = forks.ranks(f"{name}_parts", world, **options)
    ranks[world - 1].wait_for_rows(1)
    ranks[world - 1].kill(signal.SIGTERM)
    assert [rank.finish(None).status for rank in ranks] == [143] * world
    resumed = ranks_of(forks, f"{name}_parts", world, resume=True, **options)
    assert resumed.err == ""
    resumed.assert_same_figures(whole)
