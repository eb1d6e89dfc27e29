"""Resume states: what one holds, and how a run takes one up: choose it, check it, apply it."""

import contextlib
from typing import Any

import torch

from harness_params import Config
from utils.conv_type import MASK_SUFFIX, density_of
from utils.distributed import Context
from utils.errors import ConfigError, RunError
from utils.output import note
from utils.processes.place import launch_id
from utils.runs.environment import git_commit
from utils.runs.run import Run
from utils.runs.snapshots import Snapshot
from utils.runs.states import Position
from utils.state_dicts import check_weights
from utils.training.compiling import decided_before
from utils.training.trainer import Trainer

State = dict[str, Any]

# What ``precision: auto`` may have meant where the run began.
AUTO_PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16}


# --- what a state holds ----------------------------------------------------------------------------------------------


def capture(cfg: Config, trainer: Trainer, position: State) -> Snapshot:
    """A resume state, without the tables: weights, masks, BatchNorm and optimizer, and what it fits.

    Between two levels there is no optimizer in it (None): rewinding makes the next one.

    Args:
        position: of `Position.state_dict`.
    """
    state = trainer.state_dict() if position["begun"] else {**trainer.state_dict(), "optimizer": None}
    return Snapshot({**position, **state, **_origin(cfg, trainer)})


def _origin(cfg: Config, trainer: Trainer) -> State:
    """Config, environment and data of a state; resuming compares them."""
    return {
        "config": cfg.to_dict(),
        "surroundings": surroundings(cfg, trainer),
        "data": trainer.data.identity,
        "launch": launch_id(),
    }


def surroundings(cfg: Config, trainer: Trainer) -> dict[str, Any]:
    """Environment that can change results bit for bit, besides the experiment's own options."""
    device, e = trainer.ctx.device, cfg.experiment_params
    return {
        "processes": trainer.ctx.world,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
        "precision": str(trainer.dtype or torch.float32).removeprefix("torch."),
        "compile": e.compile,
        "compiled": ", ".join(trainer.compiled) or "nothing",  # what auto has decided
        "cuda_graphs": trainer.graphs is not None,
        "channels_last": e.channels_last,
        "deterministic": e.deterministic,
        "sparse_allreduce": cfg.dist_params.sparse_allreduce,
        "torch": str(torch.__version__),
        "code": git_commit(),
    }


# --- taking one up ---------------------------------------------------------------------------------------------------


def restore(cfg: Config, ctx: Context, trainer: Trainer, position: Position, run: Run | None) -> None:
    """Takes up the run that is resumed: its last state, or level L-1's checkpoint with ``resume_level: L``.

    Does nothing in a fresh run. A run without a saved state starts again from level 0. All ranks call it together;
    `run` is rank 0's.

    Raises:
        ConfigError: the data are not those that the run began with.
        RunError: what is to be taken up is missing or damaged.
    """
    # Rank 0 decides: torchrun may have started the others anew with a config that does not resume.
    state = choose(cfg, trainer, run) if run and cfg.experiment_params.resume_expt_name else None
    state = ctx.broadcast_object(state)
    if state is not None:
        check_data(cfg, trainer, state)
        keep_auto(cfg, trainer, state)
        note_changes(cfg, trainer, state)
        apply(cfg, trainer, position, run, state)
    elif run:
        run.tables.rewrite()  # rows of epochs that no state has are trained again


def choose(cfg: Config, trainer: Trainer, run: Run) -> State | None:
    """The state to take up; None if none was saved."""
    level = cfg.experiment_params.resume_level
    if not level:
        return run.load_state()
    newest = None
    with contextlib.suppress(RunError):  # resume_level is what helps when every state is damaged
        newest = run.load_state()
    if newest is None:
        return _from_level(trainer, run, level)
    # torchrun and Slurm start the same command again, but the level must be restarted only once per launch.
    mine = launch_id() and newest.get("launch") == launch_id()
    if mine and newest["config"]["experiment_params"]["resume_level"] == level:
        return newest
    origin: State = {key: newest[key] for key in ("surroundings", "data") if key in newest}
    return {**_from_level(trainer, run, level), **origin}


def _from_level(trainer: Trainer, run: Run, level: int) -> State:
    """The state in which `level` was about to begin, from the checkpoints and CSVs of the levels before it."""
    init = run.load_checkpoint("init")
    check_weights(trainer.model, init, str(run.checkpoint("init")))
    masks = [tensor for name, tensor in init.items() if name.endswith(MASK_SUFFIX)]
    return {
        "level": level,
        "begun": False,
        "epoch": 0,
        "initial_density": density_of(masks),
        "step": 0,
        "mid_epoch": None,
        "model": run.load_checkpoint(f"level_{level - 1}"),
        "optimizer": None,
        "tables": run.tables.read_levels(before=level),
    }


def check_data(cfg: Config, trainer: Trainer, state: State) -> None:
    """Checks that `state` is of the same data.

    Raises:
        ConfigError: the data are others.
    """
    if state.get("data", trainer.data.identity) != trainer.data.identity:
        where = cfg.dataset.data_root
        raise ConfigError(f"dataset.data_root: {where} holds other data than the run being resumed began with")


def keep_auto(cfg: Config, trainer: Trainer, state: State) -> None:
    """Gives ``precision: auto`` and ``compile: auto`` the meaning that they had where the run began.

    All ranks call it together. Notes on rank 0 where they would mean something else here.
    """
    before = state.get("surroundings")  # the oldest runs have none
    if not before:
        return
    here = surroundings(cfg, trainer)
    if cfg.experiment_params.precision == "auto":
        trainer.dtype = AUTO_PRECISIONS[before["precision"]]
    parts = decided_before(cfg, trainer.ctx, before)
    if parts is not None:
        trainer.compile(parts)
    kept = surroundings(cfg, trainer)
    for option, key in (("precision", "precision"), ("compile", "compiled")):
        if kept[key] != here[key] and _goes_on(cfg, trainer, state):
            meaning = f"auto stays {kept[key]}, which it was where the run began; here it would be {here[key]}"
            note(f"experiment_params.{option}: {meaning}")


def _goes_on(cfg: Config, trainer: Trainer, state: State) -> bool:
    """Whether this is rank 0 of a run that has levels left to train: only then there is something to be told."""
    return trainer.ctx.is_main and state["level"] < cfg.prune_params.num_levels


def note_changes(cfg: Config, trainer: Trainer, state: State) -> None:
    """Notes on rank 0 what may change the figures of the run, after `keep_auto`.

    (Options that would change the experiment are refused before, by `check_run_directory`.)
    """
    before, now = state.get("surroundings") or {}, surroundings(cfg, trainer)
    changed = [key for key in now if key in before and before[key] != now[key]]
    if changed and _goes_on(cfg, trainer, state):
        norms = (m for m in trainer.model.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm))
        norms_by_rank = not all(isinstance(norm, torch.nn.SyncBatchNorm) for norm in norms)
        changes = ", ".join(f"{key} {now[key]} (was {before[key]})" for key in changed)
        other_parts = norms_by_rank and "processes" in changed
        effect = "BatchNorm sees other parts of a batch, so figures may differ"
        effect = effect if other_parts else "the last bits of figures may differ"
        note(f"resumed with {changes}: {effect}")


def apply(cfg: Config, trainer: Trainer, position: Position, run: Run | None, state: State) -> None:
    """Puts network, optimizer, position and tables where `state` has them."""
    trainer.load_state_dict(state)
    position.load_state_dict(state, trainer)
    if run is None:
        return
    run.tables.load_state_dict(state["tables"])
    if cfg.experiment_params.resume_level:
        # From here on a plain resume goes on with this attempt. The old checkpoints go once its state is on disk.
        run.save_state(Snapshot({**state, **_origin(cfg, trainer)}))
        run.writer.flush()
        run.remove_checkpoints(first_level=position.level)
    run.tables.rewrite()
