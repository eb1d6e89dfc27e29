"""What a resume state holds of a run in progress, and how a run is taken up from one."""

import sys
from typing import TYPE_CHECKING, Any

import torch

from harness_utils import cpu_copy, load_masks, load_weights
from utils.conv_type import density
from utils.environment import git_commit
from utils.order import stable_seed

if TYPE_CHECKING:
    from harness import Harness

# Plain values of the harness that say where it stands.
FIELDS = ("level", "begun", "epoch", "initial_density", "best", "seconds", "last")


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
    }


def surroundings(harness: "Harness") -> dict[str, Any]:
    """What else the last bits of a run's figures hang on, besides its config."""
    device = harness.ctx.device
    return {
        "processes": harness.ctx.world,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
        "precision": str(harness.trainer.dtype or torch.float32).removeprefix("torch."),
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
    """
    e, run = harness.cfg.experiment_params, harness.run
    state = None
    if run and e.resume_expt_name:  # the other ranks' configs may not know: torchrun may have started them anew
        state = _from_level(harness, e.resume_level) if e.resume_level else run.load_state()
        if state and state["level"] < harness.cfg.prune_params.num_levels:
            _tell_of_changes(state.get("surroundings"), surroundings(harness))
    state = harness.ctx.broadcast_object(state)
    if state is None:
        return
    load_weights(harness.model, state["model"], "the saved state")
    load_masks(harness.model, state["model"])
    for name in FIELDS:
        setattr(harness, name, state[name])
    if harness.begun:
        harness.trainer.restart(state["optimizer"])
    if run:
        run.restore_tables(state["tables"])
        harness.bar.update(harness.level)
        if e.resume_level:  # from here on a plain resume goes on with this attempt, not with what it replaces
            run.save_state(capture(harness))
            run.remove_checkpoints(first_level=e.resume_level)
    if state["mid_epoch"]:
        _restore_epoch(harness, state["mid_epoch"])


def _tell_of_changes(before: dict[str, Any] | None, now: dict[str, Any]) -> None:
    changes = [f"{key} {now[key]} (was {before[key]})" for key in now if before and before.get(key) != now[key]]
    if changes:
        print(f"harness: note: resumed with {', '.join(changes)}: the last bits of figures may differ", file=sys.stderr)


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
