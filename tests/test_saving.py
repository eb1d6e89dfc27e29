"""When states are saved, what a snapshot holds, and that neither changes a bit of a run."""

import contextlib
import json
import os
import signal
import threading
from collections.abc import Callable

import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from harness_params import make_config
from tests.conftest import Finished
from tests.processes import Forked
from tests.test_faults import BadGradient
from tests.traps import KINDS, Both, KillAfterWrite, MustBeMet, StateEachStep, StopAt, states_of
from utils.files import HashedFile, whole_file
from utils.runs import saving, snapshots
from utils.runs.saving import SaveClock
from utils.runs.snapshots import Snapshot
from utils.runs.tables import EPOCH_COLUMNS, LAYER_COLUMNS, csv_text, is_evaluated, summary_row

BY_DEFAULT = {"experiment_params.save_every_epochs": None}  # conftest's runs save after every epoch


@pytest.fixture(scope="module")
def undisturbed(forks) -> dict[str, Finished]:
    return {kind: forks(kind, **KINDS[kind], **BY_DEFAULT) for kind in ("imp", "wr", "lrr")}


def finished(ranks: list[Forked]) -> Finished:
    """What rank 0 has left, once all have ended well."""
    return next(rank.finish() for rank in ranks)


def newest_state(run: Finished) -> dict:
    return json.loads((run.path / "artifacts" / "state.json").read_text())[0]


# --- when ------------------------------------------------------------------------------------------------------------


def test_when_a_state_is_due(monkeypatch):
    """Worked by hand: every minute, but a save that training waited 3 s for is followed by 150 s without one."""
    now = [1000.0]
    monkeypatch.setattr(saving.time, "monotonic", lambda: now[0])
    clock, never = SaveClock(1), SaveClock(0)
    due = []
    for seconds, cost in ((59.5, None), (0.5, 0.25), (59.5, None), (0.5, 3.0), (60.0, None), (89.0, None), (1.0, None)):
        now[0] += seconds
        due.append(clock.due())
        if cost:
            with clock.measured():
                now[0] += cost
    assert due == [False, True, False, True, False, False, True]
    now[0] += 1e9
    assert not never.due()


class WaitsMeasured(MustBeMet):
    """Writes whether the clock runs while training waits for the device, to check its figures within an epoch."""

    def lay(self) -> None:
        from utils.training.trainer import Trainer

        plain, measured, running = Trainer.check_finite, SaveClock.measured, []

        @contextlib.contextmanager
        def noted(clock):
            running.append(clock)
            with measured(clock):
                yield
            running.clear()

        def check_finite(*words):
            self.met()
            assert not running, "the device's backlog counts as saving"
            return plain(*words)

        Trainer.check_finite, SaveClock.measured = check_finite, noted


def test_a_save_is_measured_without_the_steps_before_it(fork):
    fork("one", trap=Both(StateEachStep(), WaitsMeasured()), **KINDS["imp"], **BY_DEFAULT)


def test_a_short_run_saves_at_the_end_of_its_levels_alone(fork):
    """The default. Killed at its second state."""
    run = fork("short", status=-signal.SIGKILL, trap=KillAfterWrite("state.json", 2), **KINDS["lrr"], **BY_DEFAULT)
    entries = json.loads((run.path / "artifacts" / "state.json").read_text())
    assert [(entry["level"], entry["epoch"], entry["step"]) for entry in entries] == [(2, 3, 0), (1, 3, 0)]


@pytest.mark.parametrize("kind", ["imp", "wr", "lrr"])
def test_states_within_an_epoch_change_nothing_and_are_taken_up(undisturbed, fork, kind):
    """A state after every step, and kill -9 after some of them: 12 steps per epoch, 36 per level."""
    options = {**KINDS[kind], **BY_DEFAULT}
    fork("all", trap=StateEachStep(), **options).assert_same_figures(undisturbed[kind])
    places = []
    for turn, count in enumerate((5, 20, 31, 17)):
        trap = Both(StateEachStep(), KillAfterWrite("state.json", count))
        run = fork("killed", status=-signal.SIGKILL, resume=turn > 0, trap=trap, **options)
        state = newest_state(run)
        places.append((state["level"], state["epoch"], state["step"]))
    assert places == sorted(places) and any(0 < step < 11 for _, _, step in places), places
    fork("killed", resume=True, **options).assert_same_figures(undisturbed[kind])


def test_ranks_save_together_within_an_epoch(fork):
    """Rank 0's clock decides, as rank 1's is never asked; both save at the same step, and go on there after a kill."""
    options = {**KINDS["lrr"], **BY_DEFAULT, "dataset.batch_size": 32, "prune_params.num_levels": 2}
    whole = finished(fork.ranks("whole", 2, **options))
    trap = Both(StateEachStep(), KillAfterWrite("state.json", 3))
    first, second = fork.ranks("killed", 2, trap=trap, **options)
    first.finish(-signal.SIGKILL)
    assert "the trap StateEachStep was laid and never met" in second.finish(None).err
    state = newest_state(Finished(first.path, 0, "", ""))
    assert 1 < state["step"] < 44, "45 steps per epoch; the ranks agree after every 16"
    resumed = finished(fork.ranks("killed", 2, resume=True, **options))
    resumed.assert_same_figures(whole)


def test_no_state_of_a_broken_network_within_an_epoch(fork):
    trap = Both(StateEachStep(), BadGradient(15))
    run = fork("bad", status=1, trap=trap, **KINDS["imp"], **BY_DEFAULT)
    assert "fc1.weight is no longer finite at level 0, epoch 1, after step 2" in run.last_line
    assert (newest_state(run)["epoch"], newest_state(run)["step"]) == (1, 2)
    for state in states_of(run.path):
        assert all(t.isfinite().all() for t in torch.load(state, weights_only=True)["model"].values())


@pytest.mark.parametrize("written", [("level_0_metrics.csv", 2), ("summary.csv", 1)])
def test_rows_that_no_state_has_are_gone_when_they_are_trained_again(undisturbed, fork, written):
    """Killed before the first state: what a grid reads as progress must not count epochs twice."""
    options = {**KINDS["lrr"], **BY_DEFAULT}
    run = fork("killed", status=-signal.SIGKILL, trap=KillAfterWrite(*written), **options)
    assert not (run.path / "artifacts" / "state.json").exists()
    again = KillAfterWrite("level_0_metrics.csv", 1)
    run = fork("killed", resume=True, status=-signal.SIGKILL, trap=again, **options)
    assert list(run.csv("epochwise_metrics/level_0_metrics")["epoch"]) == [0]
    assert not (run.path / "metrics" / "summary.csv").exists()
    fork("killed", resume=True, **options).assert_same_figures(undisturbed["lrr"])


# --- snapshots -------------------------------------------------------------------------------------------------------


def test_a_snapshot_holds_what_was_there():
    weight = torch.arange(24.0).reshape(1, 2, 3, 4).to(memory_format=torch.channels_last)
    mask, parameter = torch.tensor([True, False]), torch.nn.Parameter(torch.ones(2))
    obj = {"model": {"w": weight, "m": mask}, "optimizer": {"betas": (0.9, parameter)}, "level": 3, "none": None}
    snapshot = Snapshot(obj)
    weight.zero_()
    mask.fill_(False)
    content = snapshot.content()
    assert torch.equal(content["model"]["w"], torch.arange(24.0).reshape(1, 2, 3, 4))
    assert content["model"]["w"].stride() == weight.stride()
    assert torch.equal(content["model"]["m"], torch.tensor([True, False]))
    betas = content["optimizer"]["betas"]
    assert betas[0] == 0.9 and torch.equal(betas[1], torch.ones(2)) and not betas[1].requires_grad
    assert (content["level"], content["none"]) == (3, None)
    assert snapshot["model"].content() is content["model"], "one copy, whatever is written from it"


class LateStream(MustBeMet):
    """In place of a CUDA stream: the copy to the CPU is made when it is waited for, as late as a GPU could make it.

    Buffers hold rubbish until then, and the wait must be the writer's: training would be held up by it.
    """

    def lay(self) -> None:
        snapshots.TO_HOST = self

    def takes(self, tensor: torch.Tensor) -> bool:
        return True

    def buffer(self, tensor: torch.Tensor) -> torch.Tensor:
        return torch.full_like(tensor, 1)

    def begin(self, pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> Callable[[], None]:
        pairs = list(pairs)

        def wait() -> None:
            assert threading.current_thread().name == "writer"
            while pairs:
                buffer, tensor = pairs.pop()
                buffer.copy_(tensor)
            self.met()

        return wait


@pytest.mark.parametrize("kind", ["wr", "lrr"])
def test_what_is_written_is_what_was_there_when_the_copy_began(undisturbed, fork, kind):
    """The path of a GPU but for the stream itself: stopped, killed within an epoch, resumed, bit for bit."""
    options = {**KINDS[kind], **BY_DEFAULT}
    fork("late", trap=LateStream(), **options).assert_same_figures(undisturbed[kind])
    fork("late_broken", status=143, trap=Both(LateStream(), StopAt(17)), **options)
    trap = Both(LateStream(), StateEachStep(), KillAfterWrite("state.json", 30))
    fork("late_broken", resume=True, status=-signal.SIGKILL, trap=trap, **options)
    fork("late_broken", resume=True, trap=LateStream(), **options).assert_same_figures(undisturbed[kind])


class CountSnapshots:
    """Writes the number of snapshots that a run made to its standard output."""

    def __call__(self) -> None:
        plain, tally = Snapshot.__init__, [0]

        def begin(snapshot, obj) -> None:
            tally[0] += 1
            print(f"snapshot {tally[0]}", flush=True)
            plain(snapshot, obj)

        Snapshot.__init__ = begin


def test_weights_leave_the_device_once_per_level(fork):
    """model_init.pt, model_rewind.pt with its optimizer, and one for each level's checkpoint and state."""
    run = fork("counted", trap=CountSnapshots(), **KINDS["wr"], **BY_DEFAULT)
    assert run.out.count("snapshot ") == 1 + 1 + 3
    state = torch.load(states_of(run.path)[0], weights_only=True)
    assert state["optimizer"] is None, "the next level begins with a fresh one"
    checkpoint = run.checkpoint("level_2")
    assert checkpoint.keys() == state["model"].keys()
    assert all(torch.equal(checkpoint[name], state["model"][name]) for name in checkpoint)


# --- files -----------------------------------------------------------------------------------------------------------


def test_a_digest_is_known_before_the_file_has_its_name(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    with whole_file(path) as file:
        file.write(b"ab")
        file.write(memoryview(b"c"))
        digest = file.finish()
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"abc"
    assert digest == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2


def test_a_file_whose_block_fails_is_not_there(tmp_path):
    def write() -> None:
        with whole_file(tmp_path / "a.bin") as file:
            file.write(b"abc")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write()
    assert not os.listdir(tmp_path)


def test_torch_is_not_told_of_a_full_disk(capfd):
    """It would print warnings and raise another error; the first error comes at the end."""
    with open("/dev/full", "wb", buffering=0) as full:
        file = HashedFile(full)
        torch.save({"a": torch.zeros(100_000)}, file)
        with pytest.raises(OSError, match="No space left on device"):
            file.finish()
    assert capfd.readouterr() == ("", "")


CELLS = st.one_of(st.floats(allow_nan=True, allow_infinity=True), st.floats(0, 100))


@given(st.lists(st.tuples(st.integers(0, 10**6), *[CELLS] * 7), max_size=5))
def test_csv_as_pandas_writes_it(rows):
    rows = [dict(zip(EPOCH_COLUMNS, row)) for row in rows]
    assert csv_text(EPOCH_COLUMNS, rows) == pd.DataFrame(rows, columns=EPOCH_COLUMNS).to_csv(index=False)


def test_csv_of_layers_as_pandas_writes_it():
    rows = [{"level": 1, "layer": 'a,"b".weight', "kept": 0, "total": 12, "density": 0.0, "dead": True}]
    rows += [{"level": 1, "layer": "fc.weight", "kept": 6, "total": 12, "density": 1 / 3, "dead": False}]
    assert csv_text(LAYER_COLUMNS, rows) == pd.DataFrame(rows).to_csv(index=False)


# --- evaluation every N epochs ---------------------------------------------------------------------------------------

EVERY = {"experiment_params.epochs_per_level": 5, "experiment_params.eval_every_epochs": 2, **BY_DEFAULT}


@pytest.mark.parametrize(
    ("every", "epochs", "evaluated"),
    [(1, 4, [0, 1, 2, 3]), (2, 5, [1, 3, 4]), (2, 4, [1, 3]), (3, 7, [2, 5, 6]), (9, 3, [2]), (1, 1, [0])],
)
def test_which_epochs_are_evaluated(every, epochs, evaluated):
    cfg = make_config({
        "experiment_params": {"eval_every_epochs": every, "epochs_per_level": epochs},
        "optimizer": {"warmup_epochs": 0},
    })  # fmt: skip
    assert [epoch for epoch in range(epochs) if is_evaluated(cfg, epoch)] == evaluated


def test_summary_leaves_out_what_was_not_evaluated():
    nan = float("nan")
    rows = [{"test_acc": acc, "test_loss": 0.5, "seconds": 1.0} for acc in (nan, 70.0, nan, 60.0)]
    row = summary_row(2, 0.25, rows, 40.0)
    assert (row["max_test_acc"], row["final_test_acc"], row["epochs"], row["seconds"]) == (70.0, 60.0, 4, 4.0)


@pytest.mark.parametrize("kind", ["wr", "lrr"])
def test_fewer_evaluations_change_nothing_else(fork, launch, kind):
    """Epochs count in the schedule: with wr, later levels begin at epoch 1. Stopped and resumed, and in one process."""
    often = fork("often", **{**KINDS[kind], **EVERY, "experiment_params.eval_every_epochs": 1})
    seldom = fork("seldom", **KINDS[kind], **EVERY)
    for level in range(3):
        name = f"epochwise_metrics/level_{level}_metrics"
        full, some = often.csv(name), seldom.csv(name)
        empty = ~some["epoch"].isin([1, 3, 4])
        assert empty.any() and some.loc[empty, ["test_loss", "test_acc"]].isna().all(axis=None)
        times = ["seconds", "images_per_second"]
        full.loc[empty, ["test_loss", "test_acc"]] = float("nan")
        pd.testing.assert_frame_equal(full.drop(columns=times), some.drop(columns=times))
        assert seldom.csv("summary")["max_test_acc"][level] == some["test_acc"].max()
    for name in ("init", "level_0", "level_2"):
        a, b = often.checkpoint(name), seldom.checkpoint(name)
        assert all(torch.equal(a[key], b[key]) for key in a)

    fork("broken", status=143, trap=StopAt(12 * 2 + 5), **KINDS[kind], **EVERY)
    trap = Both(StateEachStep(), KillAfterWrite("level_1_metrics.csv", 2))
    fork("broken", resume=True, status=-signal.SIGKILL, trap=trap, **KINDS[kind], **EVERY)
    fork("broken", resume=True, **KINDS[kind], **EVERY).assert_same_figures(seldom)
    if kind == "wr":
        options = {**KINDS[kind], **EVERY}
        launch("one", program=("-m", "utils.single_gpu_harness"), **options).assert_same_figures(seldom)
