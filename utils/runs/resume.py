"""What a resume state holds of a run in progress, and how a run is taken up from one."""

import contextlib
import sys
from typing import TYPE_CHECKING, Any

import torch

from harness_params import ConfigError
from utils.conv_type import density
from utils.errors import RunError
from utils.processes.place import launch_id
from utils.runs.environment import git_commit
from utils.runs.weights import cpu_copy, load_masks, load_weights
from utils.seeds import stable_seed

if TYPE_CHECKING:
    from harness import Harness

# Plain values of the harness that say where it stands.
FIELDS = ("level", "begun", "epoch", "initial_density", "best", "seconds", "last")
# What ``precision: auto`` may have meant where the run began.
AUTO_PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16}


def capture(harness: "Harness", mid_epoch: dict[str, Any] | None = None) -> dict[str, Any]:
    """CPU copies of all that `restore` needs: weights, masks, BN, optimizer, position and best accuracy (rank 0)."""
    return {
        **{name: cpu_copy(getattr(harness, name)) for name in FIELDS},
        "step": mid_epoch["step"] if mid_epoch else 0,
        "mid_epoch": mid_epoch,
        "model": cpu_copy(harness.model.state_dict()),
        "optimizer": cpu_copy(harness.trainer.optimizer_state_dict()),
        "config": harness.cfg.to_dict(),
        "surroundings": surroundings(harness),
        "data": harness.data.identity,
        "launch": launch_id(),
    }


def surroundings(harness: "Harness") -> dict[str, Any]:
    """What else the last bits of a run's figures hang on, besides its config."""
    device, e = harness.ctx.device, harness.cfg.experiment_params
    return {
        "processes": harness.ctx.world,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
        "precision": str(harness.trainer.dtype or torch.float32).removeprefix("torch."),
        "compile": e.compile,
        "cuda_graphs": e.cuda_graphs,
        "channels_last": e.channels_last,
        "deterministic": e.deterministic,
        "sparse_allreduce": harness.cfg.dist_params.sparse_allreduce,
        "torch": str(torch.__version__),
        "code": git_commit(),
    }


def capture_epoch(harness: "Harness") -> dict[str, Any] | None:
    """What the epoch in progress has counted and drawn, summed or gathered over the ranks (all must call it).

    Raises:
        RunError: its losses or the network are no longer finite, so there is nothing worth saving.
    """
    tally, ctx = harness.tally, harness.ctx
    if tally is None or tally.step == 0:
        return None
    harness.trainer.sync_statistics()
    harness.trainer.check_finite(harness.level, harness.epoch, tally)
    rng = {"cpu": torch.get_rng_state()}
    if ctx.device.type == "cuda":
        rng["cuda"] = torch.cuda.get_rng_state(ctx.device)
    return {
        "step": tally.step,
        "seconds": tally.seconds,
        "losses": ctx.sum(tally.losses.clone()).cpu(),
        "correct": int(ctx.sum(tally.correct.clone())),
        "rng": ctx.gather_objects(rng),
    }


def restore(harness: "Harness") -> None:
    """Takes up the run being resumed: its last state, or level L-1's checkpoint with ``resume_level: L``.

    Does nothing in a fresh run, and starts from the beginning one that was killed before its first state was saved.
    ``precision: auto`` goes on meaning what it did.

    Raises:
        ConfigError: the data are not those that the run began with.
    """
    e, run = harness.cfg.experiment_params, harness.run
    state = None
    if run and e.resume_expt_name:  # the other ranks' configs may not know: torchrun may have started them anew
        state = _state_to_take_up(harness)
    state = harness.ctx.broadcast_object(state)
    if state is None:
        return
    if state.get("data", harness.data.identity) != harness.data.identity:
        where = harness.cfg.dataset.data_root
        raise ConfigError(f"dataset.data_root: {where} holds other data than the run being resumed began with")
    before, now = state.get("surroundings"), surroundings(harness)
    if before and e.precision == "auto":
        harness.trainer.dtype = AUTO_PRECISIONS[before["precision"]]
    if run and before and state["level"] < harness.cfg.prune_params.num_levels:
        norms = (m for m in harness.model.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm))
        by_rank = not all(isinstance(norm, torch.nn.SyncBatchNorm) for norm in norms)
        _tell_of_changes(before, now, e.precision, by_rank)
    load_weights(harness.model, state["model"], "the saved state")
    load_masks(harness.model, state["model"])
    for name in FIELDS:
        setattr(harness, name, state[name])
    if harness.begun:
        harness.trainer.restart(state["optimizer"])
    if run:
        if e.resume_level:  # from here on a plain resume goes on with this attempt, not with what it replaces
            run.tables = state["tables"]
            run.save_state(capture(harness, state["mid_epoch"]))
            run.writer.flush()  # until then what is replaced must stay whole
            run.remove_checkpoints(first_level=harness.level)
        run.restore_tables(state["tables"])
        harness.bar.update(harness.level)
    if state["mid_epoch"]:
        _restore_epoch(harness, state["mid_epoch"])


def _state_to_take_up(harness: "Harness") -> dict[str, Any] | None:
    e, run = harness.cfg.experiment_params, harness.run
    assert run is not None
    if not e.resume_level:
        return run.load_state()
    newest = None
    with contextlib.suppress(RunError):  # resume_level is what helps when every state is damaged
        newest = run.load_state()
    if newest is None:
        return _from_level(harness, e.resume_level)
    # torchrun and Slurm start the same command again: it is to start the level again once.
    mine = launch_id() and newest.get("launch") == launch_id()
    if mine and newest["config"]["experiment_params"]["resume_level"] == e.resume_level:
        return newest
    kept = {key: newest[key] for key in ("surroundings", "data") if key in newest}
    return {**_from_level(harness, e.resume_level), **kept}


def _tell_of_changes(before: dict[str, Any], now: dict[str, Any], precision: str, norms_by_rank: bool) -> None:
    """Notes of what differs between two `surroundings`; norms_by_rank: BatchNorm looks at each process's own images."""
    changed = [key for key in now if key in before and before[key] != now[key]]
    if "precision" in changed and precision == "auto":
        changed.remove("precision")
        told = f"auto stays {before['precision']}, which it was where the run began; here it would be"
        print(f"harness: note: experiment_params.precision: {told} {now['precision']}", file=sys.stderr)
    changes = [f"{key} {now[key]} (was {before[key]})" for key in changed]
    if changes:
        more = "BatchNorm sees other parts of a batch, so figures may differ"
        told = more if norms_by_rank and "processes" in changed else "the last bits of figures may differ"
        print(f"harness: note: resumed with {', '.join(changes)}: {told}", file=sys.stderr)


def _restore_epoch(harness: "Harness", mid_epoch: dict[str, Any]) -> None:
    ctx = harness.ctx
    harness.tally = tally = harness.trainer.new_tally()
    tally.step, tally.seconds = mid_epoch["step"], mid_epoch["seconds"]
    if ctx.is_main:  # the counts were summed over the ranks
        tally.losses.copy_(mid_epoch["losses"])
        tally.correct.fill_(mid_epoch["correct"])
    if ctx.rank >= len(mid_epoch["rng"]):  # more processes than before
        torch.manual_seed(stable_seed(harness.cfg.experiment_params.seed, harness.level, harness.epoch, ctx.rank))
    else:
        rng = mid_epoch["rng"][ctx.rank]
        torch.set_rng_state(rng["cpu"])
        if "cuda" in rng and ctx.device.type == "cuda":
            torch.cuda.set_rng_state(rng["cuda"], ctx.device)


def _from_level(harness: "Harness", level: int) -> dict[str, Any]:
    run = harness.run
    assert run is not None
    masks = run.load_checkpoint("init")
    load_weights(harness.model, masks, str(run.checkpoint("init")))
    load_masks(harness.model, masks)
    position = {"level": level, "begun": False, "epoch": 0, "best": 0.0, "seconds": 0.0, "last": {}}
    position["initial_density"] = density(harness.model)  # d0 is the density of model_init's masks
    model = run.load_checkpoint(f"level_{level - 1}")
    return {**position, "model": model, "mid_epoch": None, "tables": run.read_tables(before=level)}
