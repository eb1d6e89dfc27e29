"""Checks across options, made before anything touches the disk.

Each check reads all sections of options, `c`, and yields (section.key at fault, what is allowed). Invalid options are
absent; checks reading them are skipped.
"""

import itertools
from collections.abc import Iterator

from utils.config.sections.model_params import TIMM
from utils.config.sections.prune_params import MOST_LEVELS
from utils.config.values import Values
from utils.data.specs import DATASETS
from utils.pruning.methods import NO_METHOD, initial_density, layer_wise, level_density
from utils.schedulers import OWN_COOLDOWN, SCHEDULES, with_milestones

Faults = Iterator[tuple[str, str]]


def _trees() -> str:
    """The data sets that are trees of images, for messages."""
    return " and ".join(name for name, spec in DATASETS.items() if spec.is_tree)


def check_model_args(c: Values) -> Faults:
    """Only timm's models take arguments."""
    m = c.model_params
    if m.model_args and not m.model_name.lower().startswith(TIMM):
        yield "model_params.model_args", f"only for models of timm ({TIMM}NAME), not for {m.model_name}"


def check_levels(c: Values) -> Faults:
    """Weight rewinding needs an epoch k within level 0; how many steps it has, only the data tell."""
    p, e = c.prune_params, c.experiment_params
    if e.training_type == "wr" and not p.rewind_step and not 1 <= p.rewind_epoch < e.epochs_per_level:
        yield (
            "prune_params.rewind_epoch",
            f"training_type wr needs 1 <= rewind_epoch < experiment_params.epochs_per_level ({e.epochs_per_level})",
        )


def check_save_steps(c: Values) -> Faults:
    """Steps to save rise; only the data tell whether level 0 has them."""
    steps = c.prune_params.save_steps
    if any(late <= early for early, late in itertools.pairwise(steps)):
        yield "prune_params.save_steps", "each step must be later than the one before"


def check_density(c: Values) -> Faults:
    """The last level must keep a weight of the largest networks."""
    p = c.prune_params
    last = level_density(initial_density(p), p.prune_rate, p.num_levels - 1)
    if last < 1e-9:  # less than one weight in a network of 10^9 weights
        yield (
            f"prune_params.{'target_density' if p.target_density else 'num_levels'}",
            f"the last level's density would be {last:.1e} (prune_rate {p.prune_rate:g}); it must be at least 1e-9",
        )


def check_scope(c: Values) -> Faults:
    """Layer-wise rates are for methods that do not share out the weights themselves."""
    p = c.prune_params
    if p.scope == "layer" and p.num_levels > 1 and p.prune_method not in layer_wise():
        yield "prune_params.scope", f"layer only with prune_method {', '.join(layer_wise())} (it is {p.prune_method})"


def check_ticket(c: Values) -> Faults:
    """A ticket brings its mask, so that only a dense one is pruned at initialization."""
    t, p = c.ticket_params, c.prune_params
    if t.source and t.mask != "none" and p.er_method != NO_METHOD:
        yield "ticket_params.mask", f"only none with prune_params.er_method (it is {p.er_method}): one mask at a time"


def check_target_density(c: Values) -> Faults:
    """The density of level 0 is known, and so is the number of levels, which is one that num_levels may have."""
    t, p = c.ticket_params, c.prune_params
    if p.target_density and t.source and t.mask != "none":
        yield (
            "prune_params.target_density",
            f"0 where a ticket brings its mask (ticket_params.mask is {t.mask}): write prune_params.num_levels",
        )
    if p.target_density and p.scope == "layer" and p.layer_rates:
        yield "prune_params.target_density", "0 with layer_rates, which lead to another density: write num_levels"
    if p.target_density and p.num_levels > MOST_LEVELS:
        yield (
            "prune_params.target_density",
            f"prune_rate {p.prune_rate:g} would take {p.num_levels} levels; at most {MOST_LEVELS}",
        )


def check_classes(c: Values) -> Faults:
    """A data set's number of classes is its own."""
    own = DATASETS[c.dataset.dataset_name].num_classes
    if own is not None and c.dataset.num_classes not in (0, own):
        yield "dataset.num_classes", f"{c.dataset.dataset_name} has {own} classes; write {own}, or 0 for the set's own"


def check_validation(c: Values) -> Faults:
    """At least one image of each class is held out; how many the classes can spare, only the data tell."""
    d = c.dataset
    classes = DATASETS[d.dataset_name].num_classes or d.num_classes
    if 0 < d.validation_images < classes:
        yield "dataset.validation_images", f"0, or at least {classes}: one image of each of {classes} classes"


def check_loader(c: Values) -> Faults:
    """Each loader reads some data sets only."""
    d = c.dataset
    if d.loader == "memory" and DATASETS[d.dataset_name].large:
        yield "dataset.loader", f"{d.dataset_name} does not fit in memory; write auto, torchvision or ffcv"
    if d.loader == "torchvision" and not DATASETS[d.dataset_name].is_tree:
        yield (
            "dataset.loader",
            f"torchvision reads only {_trees()}; write auto or memory for {d.dataset_name}",
        )
    if d.loader == "ffcv" and not DATASETS[d.dataset_name].is_tree and not (d.train_beton and d.val_beton):
        yield (
            "dataset.loader",
            f"ffcv reads {d.dataset_name} only from files named in dataset.train_beton and dataset.val_beton",
        )


def check_ffcv_only(c: Values) -> Faults:
    """Options of the ffcv loader need that loader, and some need each other."""
    d = c.dataset
    if d.loader != "ffcv":
        for key in ("train_beton", "val_beton", "start_resolution", "end_resolution"):
            if getattr(d, key):
                yield f"dataset.{key}", f"only with dataset.loader ffcv (it is {d.loader})"
    elif bool(d.start_resolution) != bool(d.end_resolution):
        missing = "end_resolution" if d.start_resolution else "start_resolution"
        yield f"dataset.{missing}", "start_resolution and end_resolution need each other: set both together, or neither"
    elif d.start_resolution > d.end_resolution:
        yield "dataset.start_resolution", f"at most dataset.end_resolution ({d.end_resolution})"


def check_resolution(c: Values) -> Faults:
    """Images held in memory keep their own size."""
    d = c.dataset
    if DATASETS[d.dataset_name].is_tree or d.loader == "ffcv":
        return
    own = DATASETS[d.dataset_name].side
    for key in ("resolution", "eval_resolution"):
        if own and getattr(d, key) not in (0, own):
            yield (
                f"dataset.{key}",
                f"{d.dataset_name} is held in memory at its own {own}x{own} pixels; write {own} or 0",
            )


def check_flip(c: Values) -> Faults:
    """Alternating flips need flips, and images held in memory."""
    d = c.dataset
    if not d.alternate_flip:
        return
    if d.augment in ("none", "crop") or (d.augment == "auto" and not DATASETS[d.dataset_name].flipped):
        what = f"it is {d.augment}" + (f", which flips no image of {d.dataset_name}" if d.augment == "auto" else "")
        yield "dataset.alternate_flip", f"only with dataset.augment flip or crop_flip ({what})"
    if d.loader in ("torchvision", "ffcv") or DATASETS[d.dataset_name].large:
        yield "dataset.alternate_flip", "only for images held in memory (loader memory, or auto with small images)"


def check_augmentation(c: Values) -> Faults:
    """Augmentation that a loader lacks."""
    d = c.dataset
    for key in ("mixup", "cutmix", "random_erasing"):
        if getattr(d, key) and d.loader == "ffcv":
            yield f"dataset.{key}", "0 with dataset.loader ffcv, which has no such augmentation"
    if d.randaugment and (d.loader in ("memory", "ffcv") or not DATASETS[d.dataset_name].is_tree):
        yield "dataset.randaugment", f"0 unless the torchvision loader decodes the images ({_trees()})"


def check_batch(c: Values) -> Faults:
    """Each process needs an image. (A network with BatchNorm needs two: see `utils.training.setup.build_model`.)"""
    nproc = c.dist_params.nproc
    if c.dist_params.distributed and c.dataset.batch_size < nproc:
        yield "dataset.batch_size", f"at least 1 image per process (dist_params.nproc is {nproc}): >= {nproc}"


def check_resume(c: Values) -> Faults:
    """A level starts again only in a run that is resumed."""
    e = c.experiment_params
    if e.resume_level and not e.resume_expt_name:
        yield "experiment_params.resume_level", "only with experiment_params.resume_expt_name, the run to resume"


def check_resume_level(c: Values) -> Faults:
    """The level to start again is one of the run's levels."""
    if c.experiment_params.resume_level >= c.prune_params.num_levels:
        yield "experiment_params.resume_level", f"less than prune_params.num_levels ({c.prune_params.num_levels})"


def check_cuda_graphs(c: Values) -> Faults:
    """CUDA graphs need one process, images held in memory, and no loss scale."""
    d, e, dist = c.dataset, c.experiment_params, c.dist_params
    if e.cuda_graphs != "on":
        return
    if dist.distributed and dist.nproc > 1:
        yield "experiment_params.cuda_graphs", f"auto or off with several processes (dist_params.nproc is {dist.nproc})"
    if e.precision == "fp16":
        yield (
            "experiment_params.cuda_graphs",
            "auto or off with precision fp16: the loss scaler's steps are not captured",
        )
    if d.loader in ("torchvision", "ffcv") or DATASETS[d.dataset_name].large:
        yield "experiment_params.cuda_graphs", "auto or off unless the images are held in memory (dataset.loader)"


def check_milestones(c: Values) -> Faults:
    """Milestones rise, within the level, for the schedules that have them."""
    o, (epochs, of_level) = c.optimizer, _schedule_epochs(c)
    places = [m * epochs if m < 1 else m for m in o.milestones]
    if places and not SCHEDULES[o.scheduler_type].milestones:
        yield (
            "optimizer.milestones",
            f"[], as {o.scheduler_type} has no milestones; {' and '.join(with_milestones())} have",
        )
    if any(late <= early for early, late in itertools.pairwise(places)):
        yield (
            "optimizer.milestones",
            f"each must be later than the one before (in epochs: {', '.join(f'{m:g}' for m in places)})",
        )
    if any(m >= epochs for m in places):
        yield (
            "optimizer.milestones",
            f"each must be before the end of the level ({of_level} is {epochs:g})",
        )


def check_warmup(c: Values) -> Faults:
    """The warm-up ends before the level, and before the cool-down begins."""
    o, (epochs, of_level) = c.optimizer, _schedule_epochs(c)
    if o.warmup_epochs >= epochs:
        yield "optimizer.warmup_epochs", f"less than {of_level} ({epochs:g})"
    elif (
        SCHEDULES[o.scheduler_type].cooldown and o.warmup_epochs + (o.cooldown_epochs or OWN_COOLDOWN * epochs) > epochs
    ):
        yield (
            "optimizer.cooldown_epochs",
            f"warm-up ({o.warmup_epochs:g} epochs) and cool-down (0 = a fifth) fit into {of_level} ({epochs:g})",
        )


def _schedule_epochs(c: Values) -> tuple[float, str]:
    """Epochs of the schedule, a cycle's, and how the options say it."""
    e = c.experiment_params
    if e.cycles == 1:
        return e.epochs_per_level, "experiment_params.epochs_per_level"
    return e.epochs_per_level / e.cycles, "epochs_per_level / cycles"


def check_cycles(c: Values) -> Faults:
    """Cycles are equal, of whole epochs."""
    e = c.experiment_params
    if e.epochs_per_level % e.cycles:
        yield "experiment_params.cycles", f"a divisor of experiment_params.epochs_per_level ({e.epochs_per_level})"


def check_rates(c: Values) -> Faults:
    """The last rate is at most the peak rate."""
    if c.optimizer.lr_min > c.optimizer.lr:
        yield "optimizer.lr_min", f"at most optimizer.lr ({c.optimizer.lr:g})"


def check_nesterov(c: Values) -> Faults:
    """Nesterov's momentum needs momentum."""
    if c.optimizer.optimizer_name == "sgd" and c.optimizer.nesterov and c.optimizer.momentum == 0:
        yield "optimizer.nesterov", "only with optimizer.momentum > 0"


CHECKS = (
    check_model_args,
    check_levels,
    check_save_steps,
    check_density,
    check_scope,
    check_ticket,
    check_target_density,
    check_classes,
    check_validation,
    check_loader,
    check_ffcv_only,
    check_resolution,
    check_flip,
    check_augmentation,
    check_batch,
    check_resume,
    check_resume_level,
    check_cuda_graphs,
    check_milestones,
    check_warmup,
    check_cycles,
    check_rates,
    check_nesterov,
)
