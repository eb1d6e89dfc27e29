"""Checks across options, made before anything touches the disk, and the options that others leave without effect.

Each check yields (section.key at fault, what is allowed). `c` holds the options of all sections; one whose own value is
bad is missing from it, which ends the check that asks for it (see ``_build`` in harness_params.py).
"""

import itertools
from collections.abc import Iterator
from typing import Any

from utils.data.specs import DATASETS
from utils.pruning.methods import NO_METHOD

TREES = [name for name, spec in DATASETS.items() if spec.is_tree]

DROPS = ("MultiStepLRWarmup", "ImageNetLRDropsWarmup")  # the schedules with milestones

# Options that do nothing in a run of one level, and in one of one process.
BETWEEN_LEVELS = ("prune_params.prune_method", "prune_params.prune_rate", "experiment_params.training_type")
# (nproc 0 is one on a CPU, which only harness.py finds out.)
BETWEEN_PROCESSES = ("address", "port", "sync_bn", "sparse_allreduce", "wire", "timeout_minutes")

Faults = Iterator[tuple[str, str]]


def _check_levels(c: Any) -> Faults:
    p, e = c.prune_params, c.experiment_params
    if e.training_type == "wr" and not 1 <= p.rewind_epoch < e.epochs_per_level:
        yield (
            "prune_params.rewind_epoch",
            f"training_type wr needs 1 <= rewind_epoch < experiment_params.epochs_per_level ({e.epochs_per_level})",
        )


def _check_density(c: Any) -> Faults:
    p = c.prune_params
    start = p.er_init if p.er_method != NO_METHOD else 1.0
    last = start * (1 - p.prune_rate) ** (p.num_levels - 1)
    if last < 1e-9:  # less than one weight of a network of 10^9
        yield (
            "prune_params.num_levels",
            f"density {last:.1e} at the last level (prune_rate {p.prune_rate:g}) keeps no weight at all; at least 1e-9",
        )


def _check_classes(c: Any) -> Faults:
    own = DATASETS[c.dataset.dataset_name].num_classes
    if own is not None and c.dataset.num_classes not in (0, own):
        yield "dataset.num_classes", f"{c.dataset.dataset_name} has {own} classes; write {own}, or 0 for the set's own"


def _check_loader(c: Any) -> Faults:
    d = c.dataset
    if d.loader == "memory" and d.dataset_name == "ImageNet":
        yield "dataset.loader", "ImageNet does not fit in memory; one of auto, torchvision, ffcv"
    if d.loader == "torchvision" and d.dataset_name not in TREES:
        yield (
            "dataset.loader",
            f"torchvision reads {' and '.join(TREES)}; {d.dataset_name} is held in memory: auto, memory",
        )
    if d.loader == "ffcv" and d.dataset_name not in TREES and not (d.train_beton and d.val_beton):
        yield (
            "dataset.loader",
            f"ffcv reads {' and '.join(TREES)}; {d.dataset_name} needs both dataset.train_beton and dataset.val_beton",
        )


def _check_ffcv_only(c: Any) -> Faults:
    d = c.dataset
    if d.loader != "ffcv":
        for key in ("train_beton", "val_beton", "start_resolution", "end_resolution"):
            if getattr(d, key):
                yield f"dataset.{key}", f"only with dataset.loader ffcv (it is {d.loader})"
    elif bool(d.start_resolution) != bool(d.end_resolution):
        missing = "end_resolution" if d.start_resolution else "start_resolution"
        yield f"dataset.{missing}", "start_resolution and end_resolution are given together, or neither"
    elif d.start_resolution > d.end_resolution:
        yield "dataset.start_resolution", f"at most dataset.end_resolution ({d.end_resolution})"


def _check_resolution(c: Any) -> Faults:
    d = c.dataset
    if d.dataset_name in TREES or d.loader == "ffcv":
        return
    own = DATASETS[d.dataset_name].side
    for key in ("resolution", "eval_resolution"):
        if own and getattr(d, key) not in (0, own):
            yield f"dataset.{key}", f"{d.dataset_name} is held in memory at its own {own}x{own} pixels; {own}, or 0"


def _check_flip(c: Any) -> Faults:
    d = c.dataset
    if not d.alternate_flip:
        return
    if d.augment in ("none", "crop") or (d.augment == "auto" and not DATASETS[d.dataset_name].flipped):
        what = f"it is {d.augment}" + (f", which flips no image of {d.dataset_name}" if d.augment == "auto" else "")
        yield "dataset.alternate_flip", f"only with dataset.augment flip or crop_flip ({what})"
    if d.loader in ("torchvision", "ffcv") or d.dataset_name == "ImageNet":
        yield "dataset.alternate_flip", "only for images held in memory (loader memory, or auto and a small set)"


def _check_batch(c: Any) -> Faults:
    if c.dist_params.distributed and c.dataset.batch_size < 2 * c.dist_params.nproc:
        least = 2 * c.dist_params.nproc
        yield "dataset.batch_size", f"at least 2 images for each of dist_params.nproc processes: >= {least}"


def _check_resume(c: Any) -> Faults:
    e = c.experiment_params
    if e.resume_level and not e.resume_expt_name:
        yield "experiment_params.resume_level", "only with experiment_params.resume_expt_name, the run to continue"


def _check_resume_level(c: Any) -> Faults:
    if c.experiment_params.resume_level >= c.prune_params.num_levels:
        yield "experiment_params.resume_level", f"less than prune_params.num_levels ({c.prune_params.num_levels})"


def _check_cuda_graphs(c: Any) -> Faults:
    if c.experiment_params.cuda_graphs and c.experiment_params.compile == "off":
        yield "experiment_params.cuda_graphs", "only with experiment_params.compile auto or on (it is off)"
    if c.experiment_params.cuda_graphs and c.dist_params.sync_bn and c.dist_params.nproc != 1:
        yield "experiment_params.cuda_graphs", "not with dist_params.sync_bn, which waits for the GPU in every layer"


def _check_milestones(c: Any) -> Faults:
    o, epochs = c.optimizer, c.experiment_params.epochs_per_level
    places = [m * epochs if m < 1 else m for m in o.milestones]
    if places and o.scheduler_type not in DROPS:
        yield "optimizer.milestones", f"[] unless scheduler_type is {' or '.join(DROPS)} (it is {o.scheduler_type})"
    if any(late <= early for early, late in itertools.pairwise(places)):
        yield (
            "optimizer.milestones",
            f"each later than the one before (in epochs: {', '.join(f'{m:g}' for m in places)})",
        )
    if any(m >= epochs for m in places):
        yield "optimizer.milestones", f"each before the end, experiment_params.epochs_per_level ({epochs})"


def _check_warmup(c: Any) -> Faults:
    epochs = c.experiment_params.epochs_per_level
    if c.optimizer.warmup_epochs >= epochs:
        yield "optimizer.warmup_epochs", f"less than experiment_params.epochs_per_level ({epochs})"


def _check_rates(c: Any) -> Faults:
    if c.optimizer.lr_min > c.optimizer.lr:
        yield "optimizer.lr_min", f"at most optimizer.lr ({c.optimizer.lr:g})"


def _check_nesterov(c: Any) -> Faults:
    if c.optimizer.nesterov and c.optimizer.momentum == 0:
        yield "optimizer.nesterov", "only with optimizer.momentum > 0"


CHECKS = (
    _check_levels,
    _check_density,
    _check_classes,
    _check_loader,
    _check_ffcv_only,
    _check_resolution,
    _check_flip,
    _check_batch,
    _check_resume,
    _check_resume_level,
    _check_cuda_graphs,
    _check_milestones,
    _check_warmup,
    _check_rates,
    _check_nesterov,
)


def without_effect(c: Any) -> Iterator[tuple[str, str]]:
    """(section.key, why) of the options that the others leave without effect."""
    d, p, e, o = c.dataset, c.prune_params, c.experiment_params, c.optimizer
    used = {p.prune_method if p.num_levels > 1 else NO_METHOD, p.er_method if p.er_init < 1 else NO_METHOD}
    if p.num_levels == 1:
        for key in BETWEEN_LEVELS:
            yield key, "num_levels is 1: nothing is pruned or rewound after level 0"
    if p.er_method == NO_METHOD:
        yield "prune_params.er_init", f"er_method is {NO_METHOD!r}: nothing is pruned at initialization"
    elif p.er_init == 1:
        yield "prune_params.er_method", "er_init is 1: nothing is pruned at initialization"
    if e.training_type != "wr":
        yield "prune_params.rewind_epoch", f"training_type is {e.training_type}: only wr rewinds to an epoch"
    if "synflow" not in used:
        yield "prune_params.synflow_rounds", "synflow is not used"
    if not used & {"snip", "grasp"}:
        yield "prune_params.score_batches", "neither snip nor grasp is used"
        yield "prune_params.score_dtype", "neither snip nor grasp is used"
    if o.scheduler_type in DROPS:
        yield "optimizer.lr_min", f"{o.scheduler_type} does not end at a rate of its own"
    else:
        yield "optimizer.gamma", f"{o.scheduler_type} has no milestones"
        if o.scheduler_type == "Constant":
            yield "optimizer.lr_min", "the rate is constant"
    if d.loader == "memory" or (d.loader == "auto" and d.dataset_name not in TREES):
        yield "dataset.num_workers", "the set is held in memory, where no worker is needed"
    if d.loader != "ffcv":
        yield "dataset.os_cache", "the loader is not ffcv"
    if DATASETS[d.dataset_name].embedded:
        yield "dataset.data_root", f"{d.dataset_name} are embedded in {DATASETS[d.dataset_name].embedded}"
    if o.weight_decay == 0:
        yield "optimizer.no_decay_bn", "weight_decay is 0"
    if e.save_every_epochs == 1:
        yield "experiment_params.save_every_minutes", "the state is saved at every epoch's end, and only there"
    if DATASETS[d.dataset_name].is_tree or DATASETS[d.dataset_name].embedded:
        yield "dataset.download", f"{d.dataset_name} is never fetched"
    if not c.dist_params.distributed:
        for key in ("nproc", "backend", *BETWEEN_PROCESSES):
            yield f"dist_params.{key}", "distributed is false: one process"
    elif c.dist_params.nproc == 1:
        for key in BETWEEN_PROCESSES:
            yield f"dist_params.{key}", "nproc is 1: one process"
    if e.resume_expt_name and e.expt_name != e.resume_expt_name:
        yield "experiment_params.expt_name", f"the run continues in {e.resume_expt_name}"
