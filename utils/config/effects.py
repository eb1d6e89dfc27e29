"""Options without effect: those that the values of other options switch off."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from utils.config.options import Schema
from utils.config.values import Values
from utils.data.specs import DATASETS
from utils.optimizers import OPTIMIZERS, own_options
from utils.pruning.methods import METHODS, NO_METHOD
from utils.registry import plain
from utils.schedulers import SCHEDULES

# The options that name a line of a table, and the kind of its entries.
NAMED = {
    "model_params.model_name": "model",
    "dataset.dataset_name": "data set",
    "prune_params.prune_method": "criterion",
    "prune_params.er_method": "criterion",
    "optimizer.optimizer_name": "optimizer",
    "optimizer.scheduler_type": "schedule",
}

Reasons = Iterator[tuple[str, str]]  # (section.key, why it has no effect)


def scores_weights(method: str) -> bool:
    """Whether a method, or none, scores weights; the other methods choose them at random."""
    return method in METHODS and METHODS[method].score != "random_scores"


def needs_levels(schema: Schema) -> tuple[str, ...]:
    """Options without effect in a run of one level."""
    return schema.paths(lambda option: option.needs_several == "levels")


def needs_processes(schema: Schema) -> tuple[str, ...]:
    """Options without effect in a run of one process."""
    return schema.paths(lambda option: option.needs_several == "processes")


def without_effect(c: Values, schema: Schema) -> Reasons:
    """Each option of the checked config `c` that has no effect, and why."""
    yield from _in_pruning(c, schema)
    yield from _in_tickets(c)
    yield from _in_training(c)
    yield from _in_data(c)
    yield from _in_one_process(c, schema)
    e = c.experiment_params
    if e.resume_expt_name and e.expt_name != e.resume_expt_name:
        yield "experiment_params.expt_name", f"the run continues in {e.resume_expt_name}"


def parts_used(c: Any, adds: Mapping[str, Iterable[str]]) -> list[str]:
    """The options of the checked config `c` that name, with effect, what a plugin adds.

    Args:
        adds: {kind: names}, as in `Plugin.record`.
    """
    added = {kind: {plain(name) for name in names} for kind, names in adds.items()}
    unused = {path for path, _ in without_effect(c, c.schema)}
    return [
        path for path, kind in NAMED.items() if path not in unused and plain(c.value(path)) in added.get(kind, set())
    ]


def _in_pruning(c: Values, schema: Schema) -> Reasons:
    p, e = c.prune_params, c.experiment_params
    used = {p.prune_method if p.num_levels > 1 else NO_METHOD, p.er_method if p.er_init < 1 else NO_METHOD}
    if p.num_levels == 1:
        for path in needs_levels(schema):
            yield path, "num_levels is 1: nothing is pruned or rewound after level 0"
    if p.er_method == NO_METHOD:
        yield "prune_params.er_init", f"er_method is {NO_METHOD!r}: nothing is pruned at initialization"
    elif p.er_init == 1:
        yield "prune_params.er_method", "er_init is 1: nothing is pruned at initialization"
    if e.training_type != "wr":
        yield "prune_params.rewind_epoch", f"training_type is {e.training_type}: only wr rewinds to an epoch"
        yield "prune_params.rewind_step", f"training_type is {e.training_type}: only wr rewinds to a step"
    elif p.rewind_step:
        yield "prune_params.rewind_epoch", f"rewind_step is {p.rewind_step}: wr rewinds to that step"
    in_rounds = [name for name, method in METHODS.items() if method.in_rounds]
    # Methods in rounds look at the shape of a batch alone.
    on_batches = [name for name, method in METHODS.items() if method.needs_batches and not method.in_rounds]
    if not used & set(in_rounds):
        yield "prune_params.synflow_rounds", f"{' or '.join(in_rounds)} is not used"
    if not any(map(scores_weights, used)):
        yield "prune_params.invert_scores", "no method that scores weights is used"
    if not used & set(on_batches):
        for key in ("score_batches", "score_dtype"):
            yield f"prune_params.{key}", f"neither {' nor '.join(on_batches)} is used"
    if p.scope == "global":
        yield "prune_params.layer_rates", "scope is global: all layers are pruned at one rate"


def _in_tickets(c: Values) -> Reasons:
    t = c.ticket_params
    if not t.source:
        for key in ("level", "step", "mask", "weights"):
            yield f"ticket_params.{key}", 'source is "": level 0 starts from a fresh network'
        return
    if t.weights != "rewind":
        yield "ticket_params.step", f"weights is {t.weights}: only rewind starts at a step of the source"
    if t.mask == "none" and t.weights in ("init", "rewind", "init_signs", "reinit"):
        yield "ticket_params.level", f"mask is none, and weights {t.weights} are those of every level"


def _in_training(c: Values) -> Reasons:
    o, e = c.optimizer, c.experiment_params
    for key in own_options():
        if key not in OPTIMIZERS[o.optimizer_name].options:
            users = [name for name, optimizer in OPTIMIZERS.items() if key in optimizer.options]
            yield f"optimizer.{key}", f"optimizer_name is {o.optimizer_name}; it is an option of {' and '.join(users)}"
    if SCHEDULES[o.scheduler_type].milestones:
        yield "optimizer.lr_min", f"{o.scheduler_type} has no final rate of its own"
    else:
        yield "optimizer.gamma", f"{o.scheduler_type} has no milestones"
        if o.scheduler_type == "Constant":
            yield "optimizer.lr_min", "the rate is constant"
    if not SCHEDULES[o.scheduler_type].cooldown:
        yield "optimizer.cooldown_epochs", f"{o.scheduler_type} has no cool-down"
    if o.weight_decay == 0:
        yield "optimizer.no_decay_bn", "weight_decay is 0"
    if e.save_every_epochs >= e.epochs_per_level:
        yield "experiment_params.save_every_epochs", "a state is saved at the end of every level anyway"
    if e.epochs_per_level == 1:
        yield "experiment_params.eval_every_epochs", "epochs_per_level is 1, and a level's last epoch is evaluated"


def _in_data(c: Values) -> Reasons:
    d = c.dataset
    data = DATASETS[d.dataset_name]
    if d.loader == "memory" or (d.loader == "auto" and not data.is_tree):
        yield "dataset.num_workers", "the set is held in memory, where no worker is needed"
    if d.loader != "ffcv":
        yield "dataset.os_cache", "the loader is not ffcv"
    if data.embedded:
        yield "dataset.data_root", f"{d.dataset_name} are embedded in {data.embedded}"
    if data.is_tree or data.embedded:
        yield "dataset.download", f"{d.dataset_name} is never downloaded"


def _in_one_process(c: Values, schema: Schema) -> Reasons:
    """nproc 0 may mean one process: see `unused_alone`."""
    if not c.dist_params.distributed:
        for path in ("dist_params.nproc", "dist_params.backend", *needs_processes(schema)):
            yield path, "distributed is false: one process"
    elif c.dist_params.nproc == 1:
        for path in needs_processes(schema):
            yield path, "nproc is 1: one process"
