"""Trackers: what TensorBoard and Weights & Biases hold is what the CSVs say, once, and their faults end no run."""

import importlib.util
import json
import os
import signal
import struct
import sys
import threading
from pathlib import Path

import pandas as pd
import pytest

from tests.processes import Forks
from tests.traps import SHORT, MustBeMet, StopAt

TENSORBOARD = {"experiment_params.tracker": "tensorboard"}
WANDB = {"experiment_params.tracker": "wandb"}
OFFLINE = {"WANDB_MODE": "offline"}
EPOCHS = SHORT["experiment_params.epochs_per_level"]


def needs(package: str):
    missing = importlib.util.find_spec(package) is None
    return pytest.mark.skipif(missing, reason=f"{package} IS NOT INSTALLED: pip install -r tests/requirements.txt")


Figures = dict[str, list[tuple[int, float]]]  # {name: [(step, value), ...]}


def events(run: Path, purged: bool = True) -> Figures:
    """The figures that TensorBoard shows; with `purged` False also those that it drops."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(run / "tensorboard"), {"scalars": 0, "images": 0, "tensors": 0}, None, purged)
    found.Reload()
    figures = {tag: [(e.step, e.value) for e in found.Scalars(tag)] for tag in found.Tags()["scalars"]}
    figures["images"] = [(e.step, 0.0) for e in found.Images("accuracy against density")]
    assert "model_name: lenet_300_100" in str(found.Tensors("config/text_summary")[0].tensor_proto.string_val)
    return figures


def logged(run: Path) -> list[tuple[str, dict, Figures]]:
    """(id, config, figures) of each start of a run of Weights & Biases, from its files."""
    from wandb.proto.wandb_internal_pb2 import Record

    starts = []
    for file in sorted(run.glob("wandb/offline-run-*/*.wandb")):
        name, config, figures = "", {}, {}
        for data in records_of(file.read_bytes()):
            record = Record.FromString(data)
            if record.HasField("run"):
                name = record.run.run_id
                config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
            if record.HasField("history"):
                # A picture is several entries, of text and numbers, below its name.
                pictures = {item.nested_key[0] for item in record.history.item if len(item.nested_key) > 1}
                row = {item.key or item.nested_key[0]: item.value_json for item in record.history.item}
                for key, value in row.items():
                    if not key.startswith("_"):
                        number = 0.0 if key in pictures else float(value)
                        figures.setdefault(key, []).append((int(row["_step"]), number))
        starts.append((name, config, figures))
    return starts


def records_of(data: bytes) -> list[bytes]:
    """The records of a log in LevelDB's format, behind a header of 7 bytes: blocks of 32 KiB, records in parts."""
    found, part, place = [], b"", 7
    while place + 7 <= len(data):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        _, size, kind = struct.unpack("<IHB", data[place : place + 7])
        part += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # whole, or the last part
            found.append(part)
            part = b""
    return found


def expected(run: Path) -> Figures:
    """The same figures by the CSVs."""
    figures: Figures = {}

    def add(step: int, part: str, row: dict) -> None:
        for column, value in row.items():
            if value == value:
                figures.setdefault(f"{part}/{column}", []).append((step, pytest.approx(value, rel=1e-6)))

    summary = pd.read_csv(run / "metrics" / "summary.csv")
    for level, row in enumerate(summary.to_dict("records")):
        epochs = pd.read_csv(run / "metrics" / "epochwise_metrics" / f"level_{level}_metrics.csv")
        for epoch in epochs.to_dict("records"):
            add(level * EPOCHS + int(epoch["epoch"]), "epoch", epoch)
        add((level + 1) * EPOCHS - 1, "level", row)
    for row in pd.read_csv(run / "metrics" / "layerwise_density.csv").to_dict("records"):
        add((row["level"] + 1) * EPOCHS - 1, "layers", {row["layer"]: row["density"]})
    return figures


class KillAfterLog:
    """kill -9 once TensorBoard has the figures of a step; until then each epoch waits for them."""

    def __init__(self, step: int):
        self.step = step

    def __call__(self) -> None:
        from utils.runs import trackers

        log, add, done = trackers.TensorBoard.log, trackers.Tracking.add, threading.Event()

        def logged(tracker, step, values):
            log(tracker, step, values)
            if step == self.step:
                os.kill(os.getpid(), signal.SIGKILL)
            done.set()

        def added(tracking, *args):
            done.clear()
            add(tracking, *args)
            assert done.wait(120)

        trackers.TensorBoard.log, trackers.Tracking.add = logged, added


@needs("tensorboard")
def test_tensorboard_has_each_step_once_after_a_kill(fork):
    """A run killed in level 1 after an epoch that no state has."""
    never = {"experiment_params.save_every_epochs": 0, "experiment_params.save_every_minutes": 0}
    options = {**SHORT, **TENSORBOARD, **never}
    fork("run", status=-signal.SIGKILL, trap=KillAfterLog(EPOCHS), **options)
    fork("run", resume=True, **options)
    run = fork.folder / "run"
    shown = events(run)
    images = shown.pop("images")
    assert shown == expected(run)
    assert [step for step, _ in images] == [2 * EPOCHS - 1]
    written = [step for step, _ in events(run, purged=False)["epoch/lr"]]
    again = written[3]  # 2, or 0 where the kill came before the state of level 0 was on disk
    assert written == [0, 1, 2, *range(again, 2 * EPOCHS)] and again <= 2, "what is trained again is there twice"


@needs("tensorboard")
def test_rank_0_alone_has_a_tracker(fork):
    two = fork("two", **{**SHORT, **TENSORBOARD, "dist_params.nproc": 2})
    assert len(list(two.path.glob("tensorboard/*"))) == 1
    shown = events(two.path)
    shown.pop("images")
    assert shown == expected(two.path)
    one = fork("one", **{**SHORT, "dist_params.nproc": 2})
    one.assert_same_figures(two)
    assert not (one.path / "tensorboard").exists()


@needs("wandb")
def test_wandb_goes_on_in_the_same_run(fork):
    options = {**SHORT, **WANDB, "experiment_params.eval_every_epochs": 2}
    fork("run", status=143, trap=StopAt(4), env=OFFLINE, timeout=300, **options)
    done = fork("run", resume=True, env=OFFLINE, timeout=300, **options)
    starts = logged(done.path)
    assert len(starts) == 2 and len({name for name, _, _ in starts}) == 1
    assert all(config["optimizer"]["lr"] == 0.1 for _, config, _ in starts)
    shown: Figures = {}
    for _, _, figures in starts:
        for name, points in figures.items():
            shown.setdefault(name, []).extend(points)
    assert [step for step, _ in shown.pop("accuracy against density")] == [2 * EPOCHS - 1]
    assert shown == expected(done.path)
    assert [step for step, _ in shown["epoch/test_acc"]] == [1, 3], "epochs without an evaluation have no figure"
    saved = json.loads((done.path / "artifacts" / "wandb.json").read_text())
    assert saved == {"id": starts[0][0], "last_step": 2 * EPOCHS - 1}


# --- faults ----------------------------------------------------------------------------------------------------------

WARNING = "harness: warning: experiment_params.tracker: {} gets no more figures of this run: "


class Without:
    """A package that is not installed."""

    def __init__(self, package: str):
        self.package = package

    def __call__(self) -> None:
        sys.modules[self.package] = None  # type: ignore[assignment]


@pytest.mark.parametrize("package", ["tensorboard", "wandb"])
def test_a_missing_package_is_a_fault_of_the_config(fork, package):
    done = fork("run", status=2, trap=Without(package), **{"experiment_params.tracker": package})
    line = f"harness: experiment_params.tracker: {package} is not installed here: pip install {package}, or write none"
    assert done.err.splitlines() == [line] and not done.path.exists()


class DiskFull(MustBeMet):
    """No room for the second row."""

    def lay(self) -> None:
        from utils.runs import trackers

        plain = trackers.TensorBoard.log

        def log(tracker, step, values):
            if step > 0:
                self.met()
                raise OSError(28, "No space left on device")
            plain(tracker, step, values)

        trackers.TensorBoard.log = log


class NoAnswer(MustBeMet):
    """A tracker that waits for ever."""

    def lay(self) -> None:
        from utils.runs import trackers

        def log(tracker, step, values):
            self.met()
            threading.Event().wait()

        trackers.TensorBoard.log, trackers.LAST_SECONDS = log, 5


@needs("tensorboard")
@pytest.mark.parametrize(("trap", "why"), [(DiskFull, "OSError: [Errno 28]"), (NoAnswer, "it has not finished within")])
def test_a_tracker_that_fails_costs_a_warning(fork, trap, why):
    plain = fork("plain", **SHORT)
    done = fork("run", trap=trap(), **SHORT, **TENSORBOARD)
    (line,) = done.err.splitlines()
    assert line.startswith(WARNING.format("tensorboard") + why)
    plain.assert_same_figures(done)


@needs("tensorboard")
def test_a_folder_that_cannot_be_made_costs_a_warning(fork, tmp_path):
    fork("run", **{**SHORT, "prune_params.num_levels": 1})
    (tmp_path / "run" / "tensorboard").write_text("in the way")
    done = fork("run", resume=True, **SHORT, **TENSORBOARD)
    (line,) = done.err.splitlines()
    assert line.startswith(WARNING.format("tensorboard")) and len(done.csv("summary")) == 2


@needs("wandb")
def test_without_a_login_there_is_a_warning(fork, tmp_path):
    env = {"WANDB_MODE": "online", "WANDB_API_KEY": "", "HOME": tmp_path, "NETRC": tmp_path / "none"}
    done = fork("run", env=env, timeout=300, **SHORT, **WANDB)
    assert WARNING.format("wandb") in done.err and "wandb login" in done.last_line
    assert not list(done.path.glob("wandb/*/*.wandb"))


def test_none_is_the_default(forks: Forks):
    run = forks("run", **SHORT)
    assert not (run.path / "tensorboard").exists() and not (run.path / "wandb").exists()
