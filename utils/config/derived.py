"""Options that follow from others: the number of levels from a density, the name of a run from its directory."""

import os

from utils.config.options import Schema, fault, show
from utils.config.resolving import Resolved
from utils.config.values import Values
from utils.pruning.methods import initial_density, levels_to_reach

TARGET, LEVELS = "prune_params.target_density", "prune_params.num_levels"

BASE, RESUMED = "experiment_params.base_dir", "experiment_params.resume_expt_name"


def derive_levels(found: Resolved, schema: Schema) -> list[str]:
    """Puts the number of levels that ``target_density`` asks for into `found`; returns the faults.

    The two say the same thing: where the command line gives one and the file the other, the command line's holds. Of
    one source, both must agree, as those of a dumped config do.
    """
    p = found.values["prune_params"]
    if found.bad & {"target_density", "num_levels", "prune_rate", "er_method", "er_init"} or not p.target_density:
        return []
    levels = levels_to_reach(p.target_density, initial_density(p), p.prune_rate)
    target_from, levels_from = found.origin.get(TARGET), found.origin.get(LEVELS)
    if levels_from == "cli" != target_from:
        found.values["prune_params"] = Values({**vars(p), "target_density": schema.default(TARGET)})
        return []
    if levels_from is not None and levels_from == target_from and p.num_levels != levels:
        asked = f"{TARGET} is also given, as {show(p.target_density)}, which takes {levels} levels; keep one of them"
        return [fault(LEVELS, p.num_levels, asked)]
    found.values["prune_params"] = Values({**vars(p), "num_levels": levels})
    return []


def name_of_resumed(found: Resolved) -> list[str]:
    """Turns the directory of a run to resume into its name (and base_dir, if nothing sets that); returns the faults."""
    e = vars(found.values["experiment_params"])
    folder, name = os.path.split(e.get("resume_expt_name", ""))
    if not folder or "base_dir" not in e:
        return []
    e["resume_expt_name"] = name
    if os.path.realpath(folder) == os.path.realpath(os.path.expanduser(e["base_dir"])):
        return []
    if BASE in found.origin:
        return [fault(RESUMED, os.path.join(folder, name), f"a run in {BASE}, which is {show(e['base_dir'])}")]
    e["base_dir"] = folder
    return []


def without_derived(values: dict[str, dict]) -> dict[str, dict]:
    """The sections of a config without what is derived in them."""
    prune_params = dict(values["prune_params"])
    if prune_params["target_density"]:
        del prune_params["num_levels"]
    return {**values, "prune_params": prune_params}
