"""What makes a run's experiment what it is, and what a figure calls it."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness_params import Config
from utils.config.rules import without_effect
from utils.pruning.methods import METHODS, NO_METHOD

# Where and how a run executes, or how far; not what the experiment is. Among them all that is free to differ on resume
# (FREE_ON_RESUME of utils/runs/directory.py, whose import would cost a figure the seconds of torch's). Where the images
# lie is among them for a data set with a name; `data_files` puts it back where the place is all that names the images.
IGNORED = {
    "model_params.conv_type", "dataset.num_classes", "dataset.num_workers", "dataset.data_root", "dataset.download",
    "dataset.loader", "dataset.os_cache", "dataset.train_beton", "dataset.val_beton", "prune_params.num_levels",
    "experiment_params.seed", "experiment_params.base_dir", "experiment_params.expt_name",
    "experiment_params.resume_level", "experiment_params.resume_expt_name", "experiment_params.compile",
    "experiment_params.cuda_graphs", "experiment_params.channels_last", "experiment_params.save_every_epochs",
    "experiment_params.save_every_minutes", "experiment_params.deterministic", "dist_params.threads",
    "dist_params.distributed", "dist_params.nproc", "dist_params.backend", "dist_params.address", "dist_params.port",
    "dist_params.sparse_allreduce", "dist_params.timeout_minutes",
}  # fmt: skip
FILES = ("dataset.data_root", "dataset.train_beton", "dataset.val_beton")
# Told by the method's name.
METHOD = {"experiment_params.training_type", "prune_params.er_method", "prune_params.prune_method"}
# Without pruning between levels.
BETWEEN_LEVELS = {
    "experiment_params.training_type", "prune_params.prune_method", "prune_params.prune_rate",
    "prune_params.rewind_epoch",
}  # fmt: skip
# The density a run starts from: a place on the axis of density if it is pruned only there; if it is pruned further,
# its levels are a line of their own.
AXIS = "prune_params.er_init"

REWINDING = {"imp": "IMP", "wr": "IMP + weight rewinding", "lrr": "IMP + LR rewinding"}
UNITS = {"experiment_params.epochs_per_level": "epochs", "prune_params.rewind_epoch": "epochs"}
# Names in the legend, for keys that say little alone.
SHORT = {
    "model_params.model_name": "", "optimizer.scheduler_type": "", "dataset.batch_size": "batch",
    "experiment_params.epochs_per_level": "E", "prune_params.rewind_epoch": "k", "dataset.augment": "augment",
}  # fmt: skip


def starting_density(cfg: Config) -> float:
    """What pruning at initialization leaves, 0..1; 1 without it."""
    return cfg.prune_params.er_init if cfg.prune_params.er_method != NO_METHOD else 1.0


def effective_options(cfg: Config) -> dict[str, Any]:
    """{section.key: value} of all that makes the experiment what it is."""
    unused = IGNORED | {path for path, _ in without_effect(cfg)}
    if cfg.prune_params.num_levels == 1:
        unused = unused | BETWEEN_LEVELS
    if starting_density(cfg) == 1:  # er_init 1 is the same as no er_method
        unused = unused | {AXIS, "prune_params.er_method"}
    flat = {f"{section}.{key}": value for section, keys in cfg.to_dict().items() for key, value in keys.items()}
    options = {
        path: tuple(value) if isinstance(value, list) else value for path, value in flat.items() if path not in unused
    }
    if cfg.dataset.dataset_name == "ImageFolder":  # in memory its images are cropped and normalised otherwise
        options["dataset.loader"] = cfg.dataset.loader
    return options | data_files(cfg)


def data_files(cfg: Config) -> dict[str, str]:
    """{section.key: resolved path} of what the data set's name leaves open: an ImageFolder's tree, ffcv's files.

    A .beton that is not named is found under the root, and told by it. A relative path counts from the working
    directory, as it did for the run.
    """
    d = cfg.dataset
    betons = {"dataset.train_beton": d.train_beton, "dataset.val_beton": d.val_beton} if d.loader == "ffcv" else {}
    chosen = {path: value for path, value in betons.items() if value}
    if d.dataset_name == "ImageFolder" and len(chosen) < 2:
        chosen["dataset.data_root"] = d.data_root
    return {path: str(Path(value).expanduser().resolve()) for path, value in chosen.items()}


def method_name(cfg: Config) -> str:
    """As in 'SNIP', 'IMP + LR rewinding', 'SynFlow, then IMP', 'Dense'."""
    p = cfg.prune_params
    parts = []
    if starting_density(cfg) < 1:
        parts.append(METHODS[p.er_method].title)
    if p.num_levels > 1:
        by = "" if p.prune_method == "mag" else f" by {METHODS[p.prune_method].title}"
        name = REWINDING[cfg.experiment_params.training_type]
        # The M of IMP is magnitude.
        parts.append(name if not by else name.replace("IMP", "Iterative pruning" + by))
    return ", then ".join(parts) or "Dense"


def differing(options: Sequence[dict[str, Any]]) -> set[str]:
    """Options that have more than one value among those that have them, or files that not all have."""
    values: dict[str, list] = {}
    for chosen in options:
        for path, value in chosen.items():
            values.setdefault(path, []).append(value)
    return {
        path for path, found in values.items() if len(set(found)) > 1 or (path in FILES and len(found) < len(options))
    }


def short_paths(options: Sequence[dict[str, Any]]) -> dict[str, str]:
    """{path of files: the path from the folder that all have in common}: what a legend has room for."""
    files = {chosen[path] for chosen in options for path in FILES if path in chosen}
    if not files:
        return {}
    folder = os.path.commonpath(files)
    if folder in files:  # one holds the others, or is the only one: it goes by its name
        folder = os.path.dirname(folder)
    return {file: os.path.relpath(file, folder) for file in files}


def word(path: str, value: Any) -> str:
    """As in 'lr 0.1', 'resnet20', 'E = 160 epochs'."""
    text = f"{value:g}" if isinstance(value, float) else str(value)
    if isinstance(value, tuple):
        text = ", ".join(map(str, value)) or "by default"
    name = SHORT.get(path, path.partition(".")[2].replace("_", " "))
    unit = f" {UNITS[path]}" if path in UNITS else ""
    return f"{name} {'= ' if len(name) == 1 else ''}{text}{unit}".strip()
