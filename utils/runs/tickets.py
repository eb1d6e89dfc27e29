"""Tickets: masks and weights that level 0 takes from a run or a file, unchanged or with one thing changed."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from harness_params import Config
from utils.conv_type import MASK_SUFFIX, apply_masks, density
from utils.data.loaders import Data
from utils.distributed import Context
from utils.errors import KINDS, ConfigError, RunError, lines_of
from utils.files import sha256
from utils.pruning_utils import dead_layers
from utils.runs.points import Point, read_point, read_rewind_point, rewind_step
from utils.runs.records import environment_file, saved_plugins, saved_ticket
from utils.runs.ticket_files import State
from utils.runs.ticket_source import Source, find_source, notes_on, reads_source, source_path
from utils.runs.ticket_weights import TicketReader, note_ticket


@dataclass(frozen=True)
class Ticket:
    """What level 0 starts from; weights and masks are in the network already.

    Attributes:
        record: where it comes from, in plain values, for ``artifacts/environment.json``.
        optimizer: state to go on from; None = a fresh optimizer.
    """

    record: dict[str, Any]
    optimizer: dict[str, Any] | None = None

    @property
    def first_step(self) -> int:
        """Optimizer step of its schedule at which level 0 begins; not 0 only with weights ``rewind``."""
        return int(self.record["first_step"])

    @property
    def density(self) -> float:
        """Density that level 0 starts from, before pruning at initialization, 0 to 1."""
        return float(self.record["density"])


def start_from_ticket(cfg: Config, ctx: Context, data: Data, model: nn.Module) -> Ticket | None:
    """Put the ticket's weights and masks into `model`, the same on every rank; None without ``ticket_params.source``.

    A resumed run that has a saved state needs its source no more: then the network stays as it is, until the state is
    loaded. All ranks call this together; rank 0 reads and draws.

    Raises:
        ConfigError: the source does not fit the options or the network, or is not what the run began with.
        RunError: a file of it is missing or damaged, or holds more than tensors. All on every rank, before anything is
            created.
    """
    if not cfg.ticket_params.source:
        return None
    ticket = fault = None
    if ctx.is_main:
        try:
            ticket = _read_ticket(cfg, data, model)
        except Exception as error:  # whatever it is, the others must learn of it before this rank leaves them waiting
            ctx.broadcast_object((None, (type(error).__name__, lines_of(error))))
            raise
    ticket, fault = ctx.broadcast_object((ticket, fault))
    if fault is not None:
        kind, lines = fault
        raise KINDS.get(kind, RunError)(lines if kind == "ConfigError" else lines[0])
    ctx.broadcast_tensors(list(model.state_dict().values()))
    return ticket


def _read_ticket(cfg: Config, data: Data, model: nn.Module) -> Ticket:
    """The ticket, its weights and masks written into `model`; on rank 0."""
    e = cfg.experiment_params
    own = Path(e.base_dir) / e.resume_expt_name
    before = saved_ticket(own) if e.resume_expt_name else None
    if not reads_source(cfg):
        if before is None:
            raise RunError(f"{environment_file(own)} does not say what ticket the run started from")
        if not _is_moved(cfg, before):
            return Ticket(before)
        # Another place than the run has noted: it must hold the same. The level is the run's, not the last one there.
        cfg = cfg.replace({"ticket_params": {"level": before["level"]}})
    source = find_source(cfg)
    for option, text in notes_on(cfg, source):
        note_ticket(option, text)
    point = _point(cfg, data, source) if source.weights == "rewind" else None
    masks, state = TicketReader(cfg, data, model, source, point).read()
    _load_into(model, masks, state)
    step = point.step if point else 0
    record = _describe(source) | {
        "mask": cfg.ticket_params.mask,
        "first_step": step,
        "first_epoch": step // data.train.steps_per_epoch,
        "density": density(model),
        "sha256": digest_of(model),
    }
    if before is not None and before["sha256"] != record["sha256"]:
        raise ConfigError(
            f"ticket_params.source: {source.path} holds other masks or weights than the run being resumed began with"
        )
    if dead := dead_layers(model):
        note_ticket("mask", f"no weight is kept in {', '.join(dead)}")
    return Ticket(record if before is None else before, point.optimizer if point else None)


def _is_moved(cfg: Config, before: dict[str, Any]) -> bool:
    """Whether the source of a resumed run is there, at another place than it has noted."""
    path = source_path(cfg)
    if str(path.resolve()) == before["source"]:
        return False
    if not path.exists():
        note_ticket(
            "source", f"{cfg.ticket_params.source} is not there, and is not read: the run began with {before['source']}"
        )
    return path.exists()


@torch.no_grad()
def _load_into(model: nn.Module, masks: dict[str, Tensor], state: State) -> None:
    """Weights, statistics and masks into `model`, in place."""
    own = model.state_dict()
    for name, tensor in [*state.items(), *((name + MASK_SUFFIX, mask) for name, mask in masks.items())]:
        own[name].copy_(tensor)
    apply_masks(model)


def _describe(source: Source) -> dict[str, Any]:
    """The source for the record, which outlives it: of a run, also its seed, its options, its own ticket."""
    record: dict[str, Any] = {
        "source": str(source.path.resolve()),
        "level": source.level,
        "step": source.step,
        "weights": source.weights,
    }
    if source.cfg is None:
        return {**record, "sha256_of_file": sha256(source.path)}
    e = source.cfg.experiment_params
    if plugins := saved_plugins(source.path):
        record["plugins"] = plugins
    return {**record, "seed": e.seed, "options": source.cfg.to_dict(), "ticket": saved_ticket(source.path)}


def digest_of(model: nn.Module) -> str:
    """SHA-256 of all weights, statistics and masks by name: what level 0 starts from."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _point(cfg: Config, data: Data, source: Source) -> Point:
    """The step of the source's level 0 that level 0 goes on from.

    Raises:
        ConfigError: the schedule ends before it, or weight rewinding would go back behind it.
        RunError: its files are missing or damaged.
    """
    steps, p, e = data.train.steps_per_epoch, cfg.prune_params, cfg.experiment_params
    if source.step == -1:
        point = read_rewind_point(source.path, steps)
    else:
        point = read_point(source.path, source.step)
    begins = f"level 0 begins at step {point.step}, the {source.point} of {source.path} ({steps} steps per epoch)"
    if point.step >= e.epochs_per_level * steps:
        raise ConfigError(f"experiment_params.epochs_per_level: {e.epochs_per_level} is not allowed: {begins}")
    if e.training_type == "wr" and p.num_levels > 1 and rewind_step(cfg, steps) < point.step:
        key = "rewind_step" if p.rewind_step else "rewind_epoch"
        raise ConfigError(f"prune_params.{key}: {getattr(p, key)} is not allowed: {begins}")
    return point
