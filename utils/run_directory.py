"""Opening a run directory: may this config run there, create it or take it up again, lock it, record what runs."""

import contextlib
import datetime
import fcntl
import json
import os
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import yaml

from harness_params import Config, ConfigError, dump_yaml, make_config
from harness_utils import Run, trained_levels
from utils.distributed import launch_id
from utils.environment import describe
from utils.files import RunError, sweep_parts, write_whole

# Options that say where and how a run executes, not what the experiment is: free to differ on resume.
FREE_ON_RESUME = {
    "dataset": {"num_workers", "data_root", "download", "os_cache", "train_beton", "val_beton"},
    "prune_params": {"num_levels"},  # more levels prolong a study; fewer than are trained are refused
    "experiment_params": {
        "base_dir", "expt_name", "resume_level", "resume_expt_name", "compile", "cuda_graphs",
        "channels_last", "save_every_epochs", "save_every_minutes", "deterministic",
    },
    "dist_params": {
        "threads", "distributed", "nproc", "backend", "address", "port", "sparse_allreduce", "timeout_minutes",
    },
}  # fmt: skip


# The processes of a run that was just killed are gone within this time: a DataLoader's worker looks for its parent
# every 5 seconds, and holds the run's lock until then.
LOCK_SECONDS = 10.0


def check_run_directory(cfg: Config) -> None:
    """Faults of the run directory that can be told before any work: it exists, it does not, it is another experiment.

    Raises:
        ConfigError: as said; nothing was created.
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
    elif e.expt_name and path.exists() and not _never_began(path):
        faults = [
            f"experiment_params.expt_name: {e.expt_name!r} exists in {base}; resume it with "
            f"--experiment_params.resume_expt_name={e.expt_name} or choose another name"
        ]
    else:
        faults = []
    if faults:
        raise ConfigError(faults)


def _faults_of_resuming(cfg: Config, path: Path) -> list[str]:
    e = cfg.experiment_params
    no_run = f"experiment_params.resume_expt_name: {e.resume_expt_name!r}: no run to resume at {path}"
    if path.is_dir() and _never_began(path):
        return [f"{no_run}: it was stopped before it began; start it with expt_name instead"]
    try:
        saved = yaml.safe_load((path / "expt_config.yaml").read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        return [f"{no_run}: {' '.join(str(error).split())}"]
    if not isinstance(saved, dict) or not all(isinstance(options, dict) for options in saved.values()):
        return [f"{no_run}: expt_config.yaml does not hold sections of options"]
    faults = []
    defaults = make_config().to_dict()  # an option that is newer than the run had its default's effect then
    for section, options in cfg.to_dict().items():
        for key, value in options.items():
            old = saved.get(section, {}).get(key, defaults[section][key])
            if key not in FREE_ON_RESUME.get(section, set()) and old != value:
                faults.append(
                    f"{section}.{key}: {value!r} would change the experiment being resumed, where it is {old!r}"
                )
    asked = cfg.prune_params.num_levels
    with contextlib.suppress(RunError):  # a damaged index is told of when it is needed
        if not e.resume_level and asked < (trained := trained_levels(path)):
            faults.append(
                f"prune_params.num_levels: {asked} is less than the {trained} levels that the run has trained; "
                "resume_level starts one of them again"
            )
    if e.resume_level:
        needed = ["checkpoints/model_init.pt", f"checkpoints/model_level_{e.resume_level - 1}.pt"]
        if e.training_type == "wr":
            needed += ["checkpoints/model_rewind.pt", "artifacts/optimizer_rewind.pt"]
        missing = [name for name in needed if not (path / name).exists()]
        if missing:
            faults.append(
                f"experiment_params.resume_level: {e.resume_level} starts from {' and '.join(missing)}, "
                f"which {path} does not hold"
            )
    return faults


def _never_began(path: Path) -> bool:
    """Whether a run directory was left before its config was written: empty folders, a lock, and temporary files."""
    return path.is_dir() and all(
        file.is_dir() or file.name == "lock" or file.name.endswith(".part") for file in path.rglob("*")
    )


def taken_up_again(cfg: Config) -> Config:
    """The config of workers that torchrun starts anew: the run that this torchrun has begun already is resumed.

    A run without ``expt_name`` cannot be found again, and starts afresh under another name.
    """
    e, launch = cfg.experiment_params, launch_id()
    path = Path(e.base_dir) / e.expt_name
    if not launch or e.resume_expt_name or not e.expt_name or not (path / "expt_config.yaml").exists():
        return cfg
    with contextlib.suppress(OSError):
        if _lock_file(path).read_text() == launch:
            return cfg.replace({"experiment_params": {"resume_expt_name": e.expt_name}})
    return cfg


def _lock_file(path: Path) -> Path:
    """What the process that runs there holds locked; it holds that process's `launch_id`."""
    return path / "artifacts" / "lock"


@contextlib.contextmanager
def open_run(cfg: Config) -> Iterator[Run]:
    """Creates the run directory, or opens the one to resume; holds its lock and its writer until the run ends.

    Raises:
        RunError: it cannot be created, or another process runs in it.
    """
    e = cfg.experiment_params
    name = e.resume_expt_name or e.expt_name or _default_name()
    path = Path(e.base_dir) / name
    try:
        if not e.resume_expt_name:
            path.mkdir(parents=True, exist_ok=True)
        for folder in ("checkpoints", "artifacts", "metrics/epochwise_metrics"):
            (path / folder).mkdir(parents=True, exist_ok=True)
        lock = open(_lock_file(path), "a+")  # noqa: SIM115 - held for the life of the run
    except OSError as error:
        raise RunError(f"experiment_params.base_dir: cannot create {path}: {error.strerror}") from error
    with lock:
        _acquire(lock, path)
        if not e.resume_expt_name and not _never_began(path):
            raise RunError(f"experiment_params.expt_name: another process has just run in {path}")
        sweep_parts(path)
        run = Run(path, cfg)
        try:
            finished = run.is_finished()
            if not finished:  # before the config is there: from then on the same torchrun must know its run
                lock.truncate(0)
                lock.write(launch_id())
                lock.flush()
            if e.resume_expt_name:
                _record_levels(path / "expt_config.yaml", cfg.prune_params.num_levels)
            else:
                resolved = cfg.replace({"experiment_params": {"expt_name": name}})
                write_whole(path / "expt_config.yaml", dump_yaml(resolved).encode())
            if not finished:
                _record_environment(path)
            yield run
            run.writer.flush()
        finally:
            run.writer.close()


def _acquire(lock: IO[Any], path: Path) -> None:
    end = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > end:
                raise RunError(f"another process is running in {path}") from None
            time.sleep(0.2)
        except OSError as error:  # some network file systems cannot
            raise RunError(f"experiment_params.base_dir: cannot lock {path}: {error.strerror}") from error


def _default_name() -> str:
    return f"experiment_{datetime.datetime.now():%Y%m%d_%H%M%S}_{uuid.uuid4().hex[:6]}"


def _record_levels(file: Path, levels: int) -> None:
    """Writes how many levels the run is to have now into its config, which figures go by."""
    saved = yaml.safe_load(file.read_text())
    section = saved.setdefault("prune_params", {})
    if section.get("num_levels") != levels:
        section["num_levels"] = levels
        write_whole(file, yaml.safe_dump(saved, sort_keys=False, default_flow_style=False, width=10**6).encode())


def _record_environment(path: Path) -> None:
    """Appends what runs here to ``artifacts/environment.json``: one entry a start, so a resumed run tells of each."""
    file = path / "artifacts" / "environment.json"
    try:
        entries = json.loads(file.read_text())
    except (FileNotFoundError, ValueError):
        entries = []
    entries = [*(entries if isinstance(entries, list) else []), describe()]
    write_whole(file, json.dumps(entries, indent=1).encode())
