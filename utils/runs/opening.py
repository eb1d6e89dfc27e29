"""What a run turns out to be once every "auto" is settled: for ``environment.json`` and the run's first lines."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import nn

from harness_params import Config
from utils.conv_type import coverage, unmasked_params
from utils.data.loaders import Data
from utils.distributed import notes_on
from utils.output import note
from utils.processes.place import started_rank
from utils.runs.directory import check_run_directory, taken_up_again
from utils.runs.tickets import Ticket

PRECISIONS = {None: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
LARGE = 0.01  # of a network's parameters: what stays dense and is at least so large is told


def begin(cfg: Config) -> Config:
    """Checks a config before any work, and prints its notes.

    Returns:
        the config; after a restart by torchrun, that of a resume.

    Raises:
        ConfigError: it may not run in its directory, or not as it was started.
    """
    notes = notes_on(cfg)
    if started_rank() == 0:  # the other machines of a run may not even see its directory
        cfg = taken_up_again(cfg)
        check_run_directory(cfg)
        note(*notes)
    return cfg


def settled(
    data: Data, model: nn.Module, dtype: torch.dtype | None, compiled: Collection[str], graphs: bool
) -> dict[str, Any]:
    """What "auto" has come to, and which part of the network has masks, in plain values.

    Args:
        dtype: autocast type, None for float32.
        compiled: compiled parts of the run, of `utils.training.compiling.PARTS`.
        graphs: whether steps are captured as CUDA graphs.
    """
    total = sum(param.numel() for param in model.parameters())
    dense = {name: param.numel() for name, param in unmasked_params(model) if param.numel() >= LARGE * total}
    return {
        "precision": PRECISIONS[dtype],
        "compile": list(compiled),
        "cuda_graphs": "on" if graphs else "off",
        "loader": data.loader,
        "device": next(model.parameters()).device.type,
        "parameters": total,
        "masked": round(coverage(model) * total),
        "large_unmasked": dense,
    }


def record_of(
    ticket: Ticket | None,
    data: Data,
    model: nn.Module,
    dtype: torch.dtype | None,
    compiled: Collection[str],
    graphs: bool,
) -> dict[str, Any]:
    """What ``environment.json`` tells of a run beside its machine: "settled", "images", "ticket" if there is one."""
    record: dict[str, Any] = {"settled": settled(data, model, dtype, compiled, graphs), "images": data.images}
    return record | ({"ticket": ticket.record} if ticket else {})


def finished_line(cfg: Config, path: Path) -> str:
    """The line of a run that is resumed and has no level left to train."""
    levels = cfg.prune_params.num_levels
    more = f"--prune_params.num_levels={levels + 1} or more trains on"
    return f"{path.name} in {cfg.experiment_params.base_dir}: finished, all {levels} levels are trained; {more}"


def opening_lines(cfg: Config, name: str, facts: dict[str, Any]) -> list[str]:
    """The first lines of a run: its name and folder, what it trains and how, and what has masks."""
    compiled = ", ".join(facts["compile"]) or "off"
    study = f"{cfg.model_params.model_name} on {cfg.dataset.dataset_name}, {facts['precision']} on {facts['device']}"
    how = f"compile {compiled}, CUDA graphs {facts['cuda_graphs']}, loader {facts['loader']}"
    share = f"{facts['masked']:,} of {facts['parameters']:,} parameters ({facts['masked'] / facts['parameters']:.1%})"
    dense = ", ".join(f"{key} ({count:,})" for key, count in facts["large_unmasked"].items())
    return [
        f"{name} in {cfg.experiment_params.base_dir}: {study}, {how}",
        f"masks on {share}" + (f"; dense stay {dense}" if dense else ""),
    ]
