"""Points of level 0: optimizer steps whose state is kept, with what later levels and branches need to go on from there.

Points are the steps of ``prune_params.save_steps``, and with training type ``wr`` step k, to which later levels rewind
(Frankle et al. 2020). A point is two files: ``checkpoints/model_{name}.pt``, a plain state_dict as every checkpoint,
and ``artifacts/optimizer_{name}.pt``. Its name is ``step_{n}`` or ``rewind``.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from harness_params import Config
from utils.config.options import fault
from utils.errors import ConfigError, RunError
from utils.runs.run import Run, read_saved
from utils.runs.snapshots import Snapshot
from utils.runs.states import Position
from utils.training.trainer import Trainer

REWIND = "rewind"


# --- which steps -----------------------------------------------------------------------------------------------------


def rewind_step(cfg: Config, steps_per_epoch: int) -> int:
    """k in optimizer steps: ``rewind_step``, or the end of ``rewind_epoch`` epochs where that is 0."""
    p = cfg.prune_params
    return p.rewind_step or p.rewind_epoch * steps_per_epoch


def points_of(cfg: Config, steps_per_epoch: int) -> dict[int, list[str]]:
    """{optimizer steps of level 0: names of the points that are kept there}."""
    points = {step: [f"step_{step}"] for step in cfg.prune_params.save_steps}
    if cfg.experiment_params.training_type == "wr":
        points.setdefault(rewind_step(cfg, steps_per_epoch), []).append(REWIND)
    return points


def check_points(cfg: Config, steps_per_epoch: int) -> None:
    """Check before training that level 0 has every step of `points_of`.

    Raises:
        ConfigError: a step lies beyond level 0, or nothing would be left to train after ``rewind_step``.
    """
    p, e = cfg.prune_params, cfg.experiment_params
    steps = e.epochs_per_level * steps_per_epoch
    of_level = f"the {steps} steps of a level ({e.epochs_per_level} epochs of {steps_per_epoch} steps)"
    faults = []
    if e.training_type == "wr" and p.rewind_step >= steps:
        faults.append(fault("prune_params.rewind_step", p.rewind_step, f"less than {of_level}"))
    if any(step > steps for step in p.save_steps):
        faults.append(fault("prune_params.save_steps", p.save_steps, f"each at most {of_level}"))
    if faults:
        raise ConfigError(faults)


# --- saving and reading ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Point:
    """The state of level 0 after some optimizer steps.

    Attributes:
        step: n, optimizer steps done.
        weights: state_dict of the network: weights, BatchNorm statistics and masks.
        optimizer: its state and the loss scale, as `Trainer.restart` takes them.
    """

    step: int
    weights: dict[str, Tensor]
    optimizer: dict[str, Any]


def save_points(
    run: Run, names: Iterable[str], step: int, weights: Mapping[str, Tensor], optimizer: Mapping[str, Any]
) -> None:
    """Queues the files of the points `names` of optimizer step `step`; tensors are copied first."""
    snapshot = Snapshot({"weights": weights, "optimizer": {**optimizer, "step": step}})
    for name in names:
        run.save_checkpoint(name, snapshot["weights"])
        run.save_artifact(_optimizer(name), snapshot["optimizer"])


class Points:
    """Keeps the points of a run as training comes to them, on every rank."""

    def __init__(self, cfg: Config, trainer: Trainer):
        self.trainer, self.steps_per_epoch = trainer, trainer.timeline.steps_per_epoch
        self.names = points_of(cfg, self.steps_per_epoch)

    def keep(self, run: Run | None, position: Position, missing_only: bool = False) -> None:
        """Saves the points at which the run stands, if there are any. All ranks call it together; `run` is rank 0's.

        Args:
            missing_only: not those that are saved. (Older code could stop after the last step before its rewind point,
                and saved the point when it went on.)

        Raises:
            RunError: a loss or a weight is not finite.
        """
        if position.level > 0 or not position.begun:
            return
        step = position.epoch * self.steps_per_epoch + position.step
        names = self.names.get(step, [])
        if names and position.tally:
            self.trainer.check_finite(position.level, position.epoch, position.tally)
        if names and run:
            names = [name for name in names if not (missing_only and run.checkpoint(name).exists())]
            if names:
                save_points(run, names, step, self.trainer.model.state_dict(), self.trainer.optimizer_state_dict())


def read_point(run: Path, step: int) -> Point:
    """The state after `step` steps of level 0 of the run in directory `run`, kept by ``prune_params.save_steps``.

    Raises:
        RunError: the run has no such point, or it is damaged.
    """
    return Point(step, *_read(run, f"step_{step}"))


def read_rewind_point(run: Path, steps_per_epoch: int) -> Point:
    """The point to which the ``wr`` run in directory `run` rewinds.

    Args:
        steps_per_epoch: of the run; used for a point of older code, which is the end of an epoch and does not hold its
            step.

    Raises:
        RunError: the run has no such point, or it is damaged.
    """
    weights, optimizer = _read(run, REWIND)
    step = optimizer["step"] if "step" in optimizer else _rewind_epoch(run) * steps_per_epoch
    return Point(step, weights, optimizer)


def _read(run: Path, name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    weights = read_saved(run / "checkpoints" / f"model_{name}.pt")
    return weights, read_saved(run / "artifacts" / f"{_optimizer(name)}.pt")


def _rewind_epoch(run: Path) -> int:
    try:
        return int(yaml.safe_load((run / "expt_config.yaml").read_text())["prune_params"]["rewind_epoch"])
    except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError) as error:
        raise RunError(f"{run / 'expt_config.yaml'} does not say where the run rewinds to: {error}") from error


def _optimizer(name: str) -> str:
    return f"optimizer_{name}"
