"""The folder of a saved run, found by its name or path. No heavy import: the command line may name a run."""

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from utils.config.checkers import near_names
from utils.config.options import show
from utils.config.sources import read_yaml
from utils.errors import ConfigError

CONFIG_FILE = "expt_config.yaml"
PLUGIN_COPIES = Path("artifacts", "plugins")  # of a run: its copies of its plugins

Sections = dict[str, dict[str, Any]]


def is_run(path: Path) -> bool:
    """Whether a folder is the directory of a run."""
    return (path / CONFIG_FILE).is_file()


def runs_in(folder: Path) -> list[Path]:
    """The runs that lie in a folder, sorted; hidden ones, and folders further below, are not looked at."""
    return sorted(path.parent for path in folder.glob(f"*/{CONFIG_FILE}") if not path.parent.name.startswith("."))


def find_run(name: str, base_dir: str, option: str = "--resume") -> Path:
    """The folder of the run that `name` stands for.

    Args:
        name: of a run in `base_dir`, or a path to a run, as tab completion gives it, with a slash at its end.
        option: the option that has the name, for the fault.

    Raises:
        ConfigError: no run has this name; the line tells names that are near.
    """
    if not name.strip():
        raise ConfigError(f"{option}: {show(name)} is not allowed: the name of a run in {base_dir}, or its folder")
    named, given = Path(base_dir) / name, Path(name).expanduser()
    folders: list[Path] = []
    with contextlib.suppress(OSError, ValueError):  # a name that no file can have: too long, or with a NUL
        folders = [path for path in (named, given) if path.is_dir()]
    for path in folders:
        if is_run(path):
            return path if path.name not in ("", "..") else Path(os.path.abspath(path))
    if folders:
        raise ConfigError(f"{option}: {show(name)}: no run: {_what_is_in(folders[-1])}")
    by_name = given.parent == Path()
    places = f"in {base_dir}" if by_name else f"at {given}"
    choices = [path.name if by_name else str(path) for path in runs_in(named.parent if by_name else given.parent)]
    near = near_names(given.name if by_name else str(given), choices)
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    raise ConfigError(f"{option}: {show(name)}: no run {places}{hint}")


def _what_is_in(folder: Path) -> str:
    inside = runs_in(folder)
    if inside:
        return f"{folder} holds {len(inside)}, such as {inside[0]}"
    return f"{folder} has no {CONFIG_FILE}; a run that was stopped before it began is started again"


def resumed(name: str, cli: Mapping[str, Mapping[str, Any]], default_base: str) -> tuple[Sections, Sections, list[str]]:
    """What ``--resume NAME`` stands for: the run's own config, and the options that resume it where it lies.

    Args:
        cli: {section: {key: text}} of the command line, which goes on top.
        default_base: the default of ``experiment_params.base_dir``.

    Returns:
        (the saved options, the options of its place, faults).

    Raises:
        ConfigError: there is no such run, or its config cannot be read.
    """
    options = cli.get("experiment_params", {})
    base = os.path.expanduser(options.get("base_dir") or default_base)
    path = find_run(name, base)
    file = path / CONFIG_FILE
    saved, faults = read_yaml(str(file), where=f"--resume {show(name)}: {file}")
    place = {"base_dir": str(path.parent), "expt_name": path.name, "resume_expt_name": path.name}
    if options.get("resume_expt_name") is not None:
        faults.append(f"--resume: {show(name)} is not allowed beside experiment_params.resume_expt_name; keep one")
    if os.path.realpath(path.parent) == os.path.realpath(base):
        place["base_dir"] = base
    elif "base_dir" in options:
        elsewhere = f"--resume has the path of a run in {path.parent}; leave it out"
        faults.append(f"experiment_params.base_dir: {show(options['base_dir'])} is not allowed: {elsewhere}")
    return _with_plugins(saved, path), {"experiment_params": place}, faults


def _with_plugins(saved: Sections, run: Path) -> Sections:
    """The saved options; a plugin that is not where they say is the run's own copy, which has the same content.

    Relative paths start at the working directory, which may be another one than that of the run's first start.
    """
    section = saved.get("experiment_params")
    files = section.get("plugins") if isinstance(section, dict) else None
    if not isinstance(section, dict) or not isinstance(files, list):
        return saved
    copies = [run / PLUGIN_COPIES / os.path.basename(str(file)) for file in files]
    found = [
        str(copy) if copy.is_file() and not os.path.exists(os.path.expanduser(str(file))) else file
        for file, copy in zip(files, copies)
    ]
    return {**saved, "experiment_params": {**section, "plugins": found}}
