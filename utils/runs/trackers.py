"""Trackers: a run's tables and config on TensorBoard or Weights & Biases, as they grow. Rank 0 alone has one.

A tracker works in a thread of its own. Training never waits for it; if it fails, the run goes on with a warning.
Their packages are optional: imported when a tracker is asked for. Imports no torch.
"""

import datetime
import importlib.util
import json
import math
import os
import platform
import queue
import threading
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from harness_params import Config, dump_yaml
from utils.output import complain
from utils.processes.signals import SHUTDOWN_SECONDS
from utils.runs.tables import LAYERS, SUMMARY, Row, level_of

OPTION = "experiment_params.tracker"
# A run that has ended waits so long for what its tracker still has to write or send; one that is stopped, too.
LAST_SECONDS = SHUTDOWN_SECONDS - 10.0


def _now() -> float:
    """This moment as TensorBoard's files hold it: seconds since 1970."""
    return datetime.datetime.now().timestamp()


class Tracker(Protocol):
    """Where figures go. Every call may raise."""

    def log(self, step: int, values: dict[str, float]) -> None:
        """Figures by their names, at a step. The first step of a start is where the run goes on."""

    def show(self, step: int, name: str, image: np.ndarray) -> None:
        """A picture, uint8 (H, W, 3)."""

    def close(self) -> None:
        """Writes what is left."""


class TensorBoard:
    """An event file per start, in the run's folder ``tensorboard/``.

    TensorBoard drops what an earlier start of the run has written from the first step of this one on. The file is
    written here and not by torch's SummaryWriter, whose thread prints its own traceback when the disk is full.
    """

    def __init__(self, run: Path, cfg: Config):
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter
        from torch.utils.tensorboard import summary

        self._event, self._summary, self._began = Event, summary, False
        self._start = SessionLog(status=SessionLog.START)
        self._config = "\n".join(f"    {line}" for line in dump_yaml(cfg).splitlines())  # indented: shown as it is
        folder = run / "tensorboard"
        folder.mkdir(exist_ok=True)
        name = f"events.out.tfevents.{int(_now()):010d}.{platform.node()}.{os.getpid()}"
        self._writer = RecordWriter(open(folder / name, "wb"))  # noqa: SIM115 - closed by `close`
        self._write(0, file_version="brain.Event:2")

    def _write(self, step: int, **content: Any) -> None:
        self._writer.write(self._event(wall_time=_now(), step=step, **content).SerializeToString())

    def _begin(self, step: int) -> None:
        if not self._began:
            self._began = True
            self._write(step, session_log=self._start)
            self._write(step, summary=self._summary.text("config", self._config))

    def log(self, step: int, values: dict[str, float]) -> None:
        self._begin(step)
        for name, value in values.items():
            self._write(step, summary=self._summary.scalar(name, value))
        self._writer.flush()

    def show(self, step: int, name: str, image: np.ndarray) -> None:
        self._begin(step)
        self._write(step, summary=self._summary.image(name, image, dataformats="HWC"))
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run of Weights & Biases, with its files in the run's folder ``wandb/``.

    Its project, account and mode are wandb's own settings, such as WANDB_PROJECT and WANDB_MODE. A resumed run goes on
    in the same one: its id, and the last step that it has, are in ``artifacts/wandb.json``.
    """

    def __init__(self, run: Path, cfg: Config):
        import wandb

        self._wandb, self._file = wandb, run / "artifacts" / "wandb.json"
        settings = wandb.Settings(console="off", silent=True)
        if wandb.setup(settings).settings.mode == "online" and not wandb.login(prompt=False):
            raise RuntimeError("no login: run `wandb login` first, or set WANDB_MODE=offline")
        saved = json.loads(self._file.read_text()) if self._file.exists() else {}
        self._id, self._before = saved.get("id") or uuid.uuid4().hex[:12], int(saved.get("last_step", -1))
        self._note(self._before)
        self._run = wandb.init(
            dir=str(run), id=self._id, name=run.name, resume="allow", config=cfg.to_dict(), settings=settings
        )

    def _note(self, step: int) -> None:
        self._file.write_text(json.dumps({"id": self._id, "last_step": step}))

    def log(self, step: int, values: dict[str, Any]) -> None:
        if step > self._before:  # else an earlier start has logged it, and was killed before it had saved its state
            self._run.log(values, step=step)
            self._note(step)

    def show(self, step: int, name: str, image: np.ndarray) -> None:
        self.log(step, {name: self._wandb.Image(image)})

    def close(self) -> None:
        self._run.finish()


# experiment_params.tracker -> (its package, what makes it)
TRACKERS: dict[str, tuple[str, Callable[[Path, Config], Tracker]]] = {
    "tensorboard": ("tensorboard", TensorBoard),
    "wandb": ("wandb", WeightsAndBiases),
}


def missing_package(cfg: Config) -> list[str]:
    """The fault of asking for a tracker whose package is not installed."""
    name = cfg.experiment_params.tracker
    spec = importlib.util.find_spec(TRACKERS[name][0]) if name in TRACKERS else None
    if name in TRACKERS and (
        spec is None or spec.origin is None
    ):  # None: a folder, such as wandb leaves, is no package
        return [f"{OPTION}: {name} is not installed here: pip install {TRACKERS[name][0]}, or write none"]
    return []


class Tracking:
    """Hands a run's rows to its tracker, in a thread of its own.

    A row's step counts the epochs of the run: level * epochs_per_level + epoch, also where a rewound level leaves some
    out. Rows of a level are at the step of its last epoch. Values that are not numbers are left out.
    """

    def __init__(self, run: Path, cfg: Config):
        self._epochs = cfg.experiment_params.epochs_per_level
        self._name = cfg.experiment_params.tracker
        self._jobs: queue.Queue[Callable[[Tracker], None] | None] = queue.Queue()
        self._failed = False
        self._thread: threading.Thread | None = None
        if self._name in TRACKERS:
            self._thread = threading.Thread(target=self._work, args=(run, cfg), name="tracker", daemon=True)
            self._thread.start()

    def add(self, table: str, rows: list[Row], summary: list[Row]) -> None:
        """Queues rows that a table has got, all of one step; `summary` has the rows of all finished levels."""
        if self._thread is None or self._failed:
            return
        level = rows[0]["level"] if "level" in rows[0] else level_of(table)
        step = level * self._epochs + rows[0].get("epoch", self._epochs - 1)
        numbers = {name: float(v) for row in rows for name, v in _named(table, row).items() if not math.isnan(v)}
        self._jobs.put(lambda tracker: tracker.log(step, numbers))
        points = [(row["density"], row["final_test_acc"]) for row in summary]
        if table == SUMMARY and len(points) > 1:
            self._jobs.put(lambda tracker: tracker.show(step, "accuracy against density", draw(points)))

    def close(self) -> None:
        """Waits until everything is written, but not for ever."""
        if self._thread is None:
            return
        self._jobs.put(None)
        self._thread.join(LAST_SECONDS)
        if self._thread.is_alive() and not self._failed:
            self._warn(f"it has not finished within {LAST_SECONDS:g} seconds, and is left alone")

    def _work(self, run: Path, cfg: Config) -> None:
        try:
            tracker = TRACKERS[self._name][1](run, cfg)
            while (job := self._jobs.get()) is not None:
                job(tracker)
            tracker.close()
        except (Exception, SystemExit) as error:  # whatever a tracker meets: disk, network, its own faults
            self._warn(" ".join(f"{type(error).__name__}: {error}".split()))

    def _warn(self, why: str) -> None:
        self._failed = True
        complain(f"harness: warning: {OPTION}: {self._name} gets no more figures of this run: {why}")


def _named(table: str, row: Row) -> dict[str, float]:
    """The figures of a row by the names that a tracker shows: level/density, epoch/lr, layers/fc1.weight."""
    if table == LAYERS:
        return {f"layers/{row['layer']}": row["density"]}
    part = "level" if table == SUMMARY else "epoch"
    return {f"{part}/{column}": value for column, value in row.items()}


def draw(points: list[tuple[float, float]]) -> np.ndarray:
    """Accuracy (percent) against density (a fraction) of all levels so far: a picture, uint8 (H, W, 3)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3.5), layout="constrained")
    canvas, ax = FigureCanvasAgg(figure), figure.add_subplot()
    ax.plot([100 * density for density, _ in points], [accuracy for _, accuracy in points], "o-")
    ax.set(xscale="log", xlabel="Density (% of prunable weights kept)", ylabel="Test accuracy (%)")
    ax.invert_xaxis()
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
