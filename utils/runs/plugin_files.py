"""Plugins of a run: the same ones on every rank and in a resumed run; the copies that the run keeps."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harness_params import Config
from utils.distributed import Context
from utils.errors import RunError
from utils.files import sha256, write_whole
from utils.plugins import OPTION, load_plugins, loaded_plugins
from utils.runs.records import plugin_copies, saved_plugins


def load_everywhere(cfg: Config, ctx: Context) -> None:
    """Loads the plugins in this process. All ranks call it together.

    Raises:
        ConfigError: as `load_plugins`.
        RunError: the ranks have read different files.
    """
    if not cfg.experiment_params.plugins:
        return
    mine = [plugin.sha256 for plugin in load_plugins(cfg.experiment_params.plugins)]
    if any(other != mine for other in ctx.gather_objects(mine)):
        raise RunError(f"{OPTION}: the processes of the run have read different files; each machine needs the same")


def keep_copies(run: Path, cfg: Config) -> list[dict[str, Any]]:
    """Copies the plugins into the run, once; returns their records for ``artifacts/environment.json``."""
    records = []
    for plugin in loaded_plugins(cfg.experiment_params.plugins):
        copy = plugin_copies(run) / plugin.name
        if not copy.exists():
            copy.parent.mkdir(exist_ok=True)
            write_whole(copy, plugin.source)
        records.append({**plugin.record(), "file": str(Path(plugin.path).absolute())})
    return records


def changed_plugins(run: Path, cfg: Config, saved: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Faults of resuming a run with other plugins than it began with. Their place does not matter.

    Args:
        saved: the run's own config, which names them.
    """
    copies = plugin_copies(run)
    before = {Path(record["file"]).name: record["sha256"] for record in saved_plugins(run)}
    before = before or {file.name: sha256(file) for file in copies.glob("*") if not file.name.endswith(".part")}
    now = {plugin.name: plugin.sha256 for plugin in loaded_plugins(cfg.experiment_params.plugins)}
    if not before and saved.get("experiment_params", {}).get("plugins"):  # stopped before it could copy them
        return []
    faults = []
    for name in before.keys() | now.keys():
        if name not in now:
            faults.append(f"{OPTION}: the run being resumed began with {name}: name it, or the copy {copies / name}")
        elif name not in before:
            faults.append(f"{OPTION}: {name} would change the experiment being resumed, which began without it")
        elif before[name] != now[name]:
            change = f"{name} has changed since the run being resumed began with it"
            faults.append(f"{OPTION}: {change}; the run's copy is {copies / name}")
    return sorted(faults)


def kept_copies(run: Path) -> list[str]:
    """Paths of a saved run's own copies of its plugins, checked.

    Raises:
        RunError: one is missing, or is not what the run has used.
    """
    paths = []
    for record in saved_plugins(run):
        copy = plugin_copies(run) / Path(record["file"]).name
        if not copy.is_file():
            raise RunError(f"{copy}: no such file: it is the run's copy of a plugin")
        if sha256(copy) != record["sha256"]:
            raise RunError(f"{copy} was changed since the run copied it: it is another plugin")
        paths.append(str(copy))
    return paths
