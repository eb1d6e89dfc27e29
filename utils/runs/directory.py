"""Whether a config may run in its directory: start there, or resume there."""

import contextlib
import os
from pathlib import Path
from typing import Any

import yaml

from harness_params import SCHEMA, Config, make_config
from utils.errors import ConfigError, DataError, RunError
from utils.processes.place import launch_id
from utils.runs.hints import resume_command
from utils.runs.plugin_files import changed_plugins
from utils.runs.saved import finished_levels, lock_file, never_began
from utils.runs.states import trained_levels
from utils.runs.tables import LAYERS, table_file
from utils.runs.ticket_source import find_source, reads_source
from utils.runs.trackers import missing_package

FREE_ON_RESUME = frozenset(SCHEMA.paths(lambda option: option.role.free_on_resume))


def check_run_directory(cfg: Config, source_exists: bool = True) -> None:
    """Checks before any work: a fresh run has a directory to itself, a resumed run is the same experiment.

    A run that starts from a ticket has a source that holds it.

    Args:
        source_exists: False if that source is still to be trained.

    Raises:
        ConfigError: one fault per option; nothing was created.
    """
    e = cfg.experiment_params
    base = Path(e.base_dir)
    for folder in [base, *base.parents]:
        if folder.exists():
            if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
                raise ConfigError([f"experiment_params.base_dir: {str(base)!r}: {folder} is not a writable folder"])
            break
    key, name = ("resume_expt_name", e.resume_expt_name) if e.resume_expt_name else ("expt_name", e.expt_name)
    path = base / name
    if name and path.resolve().parent != base.resolve():
        raise ConfigError([f"experiment_params.{key}: {name!r} leaves {base}: it is a link to {path.resolve()}"])
    if e.resume_expt_name:
        faults = _faults_of_resuming(cfg, path)
    elif e.expt_name and path.exists() and not never_began(path):
        faults = [
            f"experiment_params.expt_name: {e.expt_name!r} exists in {base}; resume it with "
            f"{resume_command(path)} or choose another name"
        ]
    else:
        faults = []
    faults += missing_package(cfg)
    if faults:
        raise ConfigError(faults)
    if source_exists and reads_source(cfg):
        find_source(cfg)


def _faults_of_resuming(cfg: Config, path: Path) -> list[str]:
    e = cfg.experiment_params
    no_run = f"experiment_params.resume_expt_name: {e.resume_expt_name!r}: no run to resume at {path}"
    if path.is_dir() and never_began(path):
        return [f"{no_run}: it was stopped before it began; start it with expt_name instead"]
    try:
        saved = yaml.safe_load((path / "expt_config.yaml").read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        return [f"{no_run}: {' '.join(str(error).split())}"]
    if not isinstance(saved, dict) or not all(isinstance(options, dict) for options in saved.values()):
        return [f"{no_run}: expt_config.yaml does not hold sections of options"]
    changed = [*_changed_options(cfg, saved), *changed_plugins(path, cfg, saved)]
    return [*changed, *_too_few_levels(cfg, path), *_missing_for_level(cfg, path)]


def _changed_options(cfg: Config, saved: dict[str, dict[str, Any]]) -> list[str]:
    """Faults of options that would change the experiment."""
    faults = []
    defaults = make_config().to_dict()  # an option that is newer than the run had its default's effect then
    for section, options in cfg.to_dict().items():
        for key, value in options.items():
            old = saved.get(section, {}).get(key, defaults[section][key])
            if f"{section}.{key}" not in FREE_ON_RESUME and old != value:
                faults.append(
                    f"{section}.{key}: {value!r} would change the experiment being resumed, where it is {old!r}"
                )
    # Its place may change, but not whether there is one.
    old, new = saved.get("ticket_params", {}).get("source", ""), cfg.ticket_params.source
    if bool(old) != bool(new):
        faults.append(f"ticket_params.source: {new!r} would change the experiment being resumed, where it is {old!r}")
    return faults


def _too_few_levels(cfg: Config, path: Path) -> list[str]:
    """The fault of asking for fewer levels than are trained."""
    p = cfg.prune_params
    asked = p.num_levels
    with contextlib.suppress(RunError):  # load_state reports a damaged index
        if not cfg.experiment_params.resume_level and asked < (trained := trained_levels(path)):
            key, what = "num_levels", f"{asked} is"
            if p.target_density:
                key, what = "target_density", f"{p.target_density:g} takes {asked} levels,"
            return [
                f"prune_params.{key}: {what} less than the {trained} levels that the run has trained; "
                "resume_level starts one of them again"
            ]
    return []


def _missing_for_level(cfg: Config, path: Path) -> list[str]:
    """The fault of a resume_level that starts from files which are not there."""
    e = cfg.experiment_params
    if not e.resume_level:
        return []
    needed = ["checkpoints/model_init.pt", f"checkpoints/model_level_{e.resume_level - 1}.pt"]
    if e.training_type == "wr":
        needed += ["checkpoints/model_rewind.pt", "artifacts/optimizer_rewind.pt"]
    missing = " and ".join(name for name in needed if not (path / name).exists())
    fault = f"experiment_params.resume_level: {e.resume_level} starts from {missing}, which {path} does not hold"
    return [fault] if missing else []


def has_finished(cfg: Config) -> bool:
    """Whether the run that is resumed has trained all of its levels, and has their tables. Errors as `trained_levels`.

    Tables that are lost or damaged are written again from the saved state, which a start of the run reads.
    """
    e = cfg.experiment_params
    if not e.resume_expt_name or e.resume_level:
        return False
    path, levels = Path(e.base_dir) / e.resume_expt_name, cfg.prune_params.num_levels
    if trained_levels(path) < levels:
        return False
    with contextlib.suppress(DataError):
        return len(finished_levels(path)) >= levels and table_file(path, LAYERS).exists()
    return False


def taken_up_again(cfg: Config) -> Config:
    """After a torchrun restart, turn expt_name into a resume.

    A run without ``expt_name`` cannot be found again: it starts afresh under another name.
    """
    e, launch = cfg.experiment_params, launch_id()
    path = Path(e.base_dir) / e.expt_name
    if not launch or e.resume_expt_name or not e.expt_name or not (path / "expt_config.yaml").exists():
        return cfg
    with contextlib.suppress(OSError):
        if lock_file(path).read_text() == launch:
            return cfg.replace({"experiment_params": {"resume_expt_name": e.expt_name}})
    return cfg
