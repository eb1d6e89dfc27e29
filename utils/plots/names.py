"""The options that tell experiments apart, and the names that figures give to them."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness_params import SCHEMA, Config, make_config
from utils.config.effects import parts_used, scores_weights, without_effect
from utils.config.values import Values
from utils.pruning.methods import METHODS, initial_density
from utils.runs.saved import know_parts

Ticket = dict[str, Any]  # "ticket" of a run's environment.json
OF_SOURCE = "source: "  # before the names of the options of a ticket's source

# Options that no legend names. Where the images lie is among them: `data_files` puts it back for data without a name.
IGNORED = frozenset(SCHEMA.paths(lambda option: not option.role.in_legends))
FILES = ("dataset.data_root", "dataset.train_beton", "dataset.val_beton")
# The method's name says these.
METHOD = {
    "experiment_params.training_type", "prune_params.er_method", "prune_params.prune_method",
    "prune_params.invert_scores", "ticket_params.source", "ticket_params.mask", "ticket_params.weights",
}  # fmt: skip
# What settles the density that a run starts from. A run of one level is one point on the density axis; a run that is
# pruned further is a line of its own.
AXES = {"prune_params.er_init", "ticket_params.level"}
# k of weight rewinding: a run has one of them.
K = {"prune_params.rewind_epoch", "prune_params.rewind_step"}

REWINDING = {"imp": "IMP", "wr": "IMP + weight rewinding", "lrr": "IMP + LR rewinding"}
# What was changed in a ticket.
MASKS = {"same": "", "shuffle_layer": "layers shuffled", "shuffle_global": "shuffled globally", "none": "no mask"}
WEIGHTS = {
    "init": "initial weights", "rewind": "rewound weights", "final": "final weights", "reinit": "reinit",
    "init_signs": "init signs", "final_signs": "final signs",
}  # fmt: skip
# The changes that a ticket can have, as `ticket_name` writes them; those of the papers' ablations first.
CHANGES = ["reinit", "layers shuffled", "shuffled globally", "init signs", "initial weights"]
CHANGES += [
    change
    for weights in WEIGHTS.values()
    for mask in MASKS.values()
    if (change := ", ".join(filter(None, [mask, weights]))) not in CHANGES
]
ITERATIVE = "Iterative pruning by "
# Names in the legend, for keys that say little alone.
SHORT = {
    "model_params.model_name": "", "optimizer.optimizer_name": "", "optimizer.scheduler_type": "",
    "dataset.batch_size": "batch",
    "experiment_params.epochs_per_level": "E", **dict.fromkeys(K, "k"), "dataset.augment": "augment",
    "ticket_params.level": "ticket of level", "ticket_params.step": "from step",
}  # fmt: skip


def effective_options(
    cfg: Config, ticket: Ticket | None = None, plugins: Sequence[dict[str, Any]] = ()
) -> dict[str, Any]:
    """{section.key: value} of the options that define the experiment and have an effect in it.

    Args:
        ticket: what the run's ``environment.json`` says of the ticket that it started from. Its source run stands there
            by the name of its method, and by its own effective options (with `OF_SOURCE` before their names): sources
            that differ in their seed are the same.
        plugins: what the run has noted of its plugins. An option that names a part of one has an entry beside it, such
            as "prune_params.prune_method from", with the file's name and digest: two versions are two lines.
    """
    unused = IGNORED | {path for path, _ in without_effect(cfg, cfg.schema)}
    if cfg.prune_params.num_levels == 1:  # wr saves the state at k here, too, but nothing is rewound to it
        unused = unused | K
    if not cfg.prune_params.rewind_step:
        unused = unused | {"prune_params.rewind_step"}
    if initial_density(cfg.prune_params) == 1:  # er_init 1 is the same as no er_method
        unused = unused | {"prune_params.er_init", "prune_params.er_method"}
    flat = {f"{section}.{key}": value for section, keys in cfg.to_dict().items() for key, value in keys.items()}
    if ticket:
        flat |= {f"ticket_params.{key}": ticket[key] for key in ("level", "step", "mask", "weights")}
    options = {
        path: tuple(value) if isinstance(value, list) else value for path, value in flat.items() if path not in unused
    }
    if ticket:
        options["ticket_params.source"] = source_name(ticket)
        options |= {f"{OF_SOURCE}{path}": value for path, value in _source_options(ticket).items()}
    # IGNORED has the loader because the data set's name settles it, but for an ImageFolder: in memory its images are
    # cropped and normalised in another way.
    if cfg.dataset.dataset_name == "ImageFolder":
        options["dataset.loader"] = cfg.dataset.loader
    return options | data_files(cfg) | plugin_files(cfg, plugins)


def plugin_files(cfg: Config, plugins: Sequence[dict[str, Any]]) -> dict[str, str]:
    """{"section.key from": file and digest} of the options of a run that name a part of its plugins."""
    return {
        f"{path} from": f"{Path(plugin['file']).name} {plugin['sha256'][:8]}"
        for plugin in plugins
        for path in parts_used(cfg, plugin["adds"])
    }


def _source_options(ticket: Ticket) -> dict[str, Any]:
    """What a ticket's source is, beside its method; a file by its content. Older runs have not noted it."""
    if "sha256_of_file" in ticket:
        return {"file": f"{Path(ticket['source']).name} {ticket['sha256_of_file'][:8]}"}
    saved = ticket.get("options", {})
    if "optimizer" not in saved:
        return {}
    plugins = ticket.get("plugins", [])
    know_parts(saved, plugins)
    cfg = make_config(saved)
    options = effective_options(cfg, ticket.get("ticket"), plugins)
    named = METHOD | (AXES if cfg.prune_params.num_levels == 1 else set())  # AXES: points of one line, as elsewhere
    return {path: value for path, value in options.items() if path not in named}


def source_seed(ticket: Ticket) -> int | str | None:
    """Seed of the run that a ticket is from, with those of the runs before it; None if it is from a file."""
    if "seed" not in ticket:
        return None
    before = source_seed(ticket["ticket"]) if ticket.get("ticket") else None
    own = ticket["seed"]
    data_seed = ticket.get("options", {}).get("experiment_params", {}).get("data_seed", -1)
    own = own if data_seed in (-1, own) else f"{own}/{data_seed}"
    return own if before is None else f"{own} of {before}"


def data_files(cfg: Config) -> dict[str, str]:
    """{section.key: resolved path} of files that the data set's name does not settle: an ImageFolder's, ffcv's.

    A .beton that is not named is found in data_root, so data_root stands for it. A relative path starts at the working
    directory, as it did for the run.
    """
    d = cfg.dataset
    betons = {"dataset.train_beton": d.train_beton, "dataset.val_beton": d.val_beton} if d.loader == "ffcv" else {}
    chosen = {path: value for path, value in betons.items() if value}
    if d.dataset_name == "ImageFolder" and len(chosen) < 2:
        chosen["dataset.data_root"] = d.data_root
    return {path: str(Path(value).expanduser().resolve()) for path, value in chosen.items()}


def method_name(cfg: Config, ticket: Ticket | None = None) -> str:
    """The method's name, such as 'SNIP', 'IMP + LR rewinding', 'SynFlow, then IMP', 'IMP, reinit', 'Dense'."""
    return _method_name(cfg.prune_params, cfg.experiment_params.training_type, ticket)


def _method_name(p: Values, training_type: str, ticket: Ticket | None) -> str:
    parts = [ticket_name(ticket)] if ticket else []
    if initial_density(p) < 1:
        parts.append(METHODS[p.er_method].title + _inverted(p, p.er_method))
    if p.num_levels > 1:
        name = REWINDING[training_type]
        if p.prune_method != "mag":  # the M of IMP is magnitude, so other criteria need another name
            name = name.replace("IMP", ITERATIVE + METHODS[p.prune_method].title)
        parts.append(name + _inverted(p, p.prune_method))
    return ", then ".join(parts) or "Dense"


def _inverted(p: Values, method: str) -> str:
    return " inverted" if p.invert_scores and scores_weights(method) else ""


def ticket_name(ticket: Ticket) -> str:
    """A ticket by its source's method and what was changed, such as 'IMP, reinit', 'IMP, layers shuffled'."""
    weights = "" if ticket["weights"] == "init" and MASKS[ticket["mask"]] else WEIGHTS[ticket["weights"]]
    return ", ".join(filter(None, [source_name(ticket), MASKS[ticket["mask"]], weights]))


def source_name(ticket: Ticket) -> str:
    """The method of the source run, by its own ticket if it has one; a file has none that is known."""
    if "options" not in ticket:
        return "Checkpoint"
    saved = ticket["options"]
    know_parts(saved, ticket.get("plugins", []))
    defaults = {key: option.default for (section, key), option in SCHEMA.entries.items() if section == "prune_params"}
    p = Values({**defaults, **saved["prune_params"]})
    return _method_name(p, saved["experiment_params"]["training_type"], ticket.get("ticket"))


def differing(options: Sequence[dict[str, Any]]) -> set[str]:
    """Options with more than one value among the runs that have them, and files that only some runs have.

    An epoch k and a step k are two values of one thing.
    """
    values: dict[str, list] = {}
    for chosen in options:
        for path, value in chosen.items():
            values.setdefault(path, []).append(value)
    differ = {
        path for path, found in values.items() if len(set(found)) > 1 or (path in FILES and len(found) < len(options))
    }
    return differ | K if values.keys() >= K else differ


def short_paths(options: Sequence[dict[str, Any]]) -> dict[str, str]:
    """{path: path relative to the folder that all have in common}, short enough for a legend."""
    files = {chosen[path] for chosen in options for path in FILES if path in chosen}
    if not files:
        return {}
    folder = os.path.commonpath(files)
    if folder in files:  # one path holds the others, or is the only one: keep its last part
        folder = os.path.dirname(folder)
    return {file: os.path.relpath(file, folder) for file in files}


def word(path: str, value: Any) -> str:
    """An option and its value in a legend, such as 'lr 0.1', 'resnet20', 'E = 160 epochs'."""
    if path.startswith(OF_SOURCE):
        return f"ticket of {word(path.removeprefix(OF_SOURCE), value)}"
    text = f"{value:g}" if isinstance(value, float) else str(value)
    if isinstance(value, tuple):
        text = ", ".join(map(str, value)) or "by default"
    name = SHORT.get(path, path.partition(".")[2].replace("_", " "))
    option = SCHEMA.find(path)
    if option and len(name) == 1:  # a symbol, such as E, does not say its unit
        return f"{name} = {text} {option.unit}".strip()
    return f"{name} {text}".strip()
