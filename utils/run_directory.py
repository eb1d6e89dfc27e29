"""Opening a run directory: may this config run there, create it or take it up again, lock it, record what runs."""

import contextlib
import datetime
import fcntl
import json
import os
import platform
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import torch
import yaml

from harness_params import Config, ConfigError, dump_yaml
from harness_utils import Run
from utils.files import RunError, sweep_parts, write_whole

# Options that say where and how a run executes, not what the experiment is: free to differ on resume.
FREE_ON_RESUME = {
    "dataset": {"num_workers", "data_root", "download", "os_cache", "train_beton", "val_beton"},
    "prune_params": {"num_levels"},  # more levels prolong a study, they don't change those already run
    "experiment_params": {
        "base_dir", "expt_name", "resume_level", "resume_expt_name", "compile", "channels_last",
        "save_every_epochs", "save_every_minutes", "deterministic",
    },
    "dist_params": {"threads", "distributed", "nproc", "backend", "address", "port", "timeout_minutes"},
}  # fmt: skip


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
    if not e.resume_expt_name:
        if e.expt_name and (base / e.expt_name).exists():
            raise ConfigError(
                [f"experiment_params.expt_name: {e.expt_name!r} exists in {base}; resume it with "
                 f"--experiment_params.resume_expt_name={e.expt_name} or choose another name"]
            )  # fmt: skip
        return
    path = base / e.resume_expt_name
    try:
        saved = yaml.safe_load((path / "expt_config.yaml").read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(
            [f"experiment_params.resume_expt_name: {e.resume_expt_name!r}: no run to resume at {path}: {error}"]
        ) from error
    faults = []
    for section, options in cfg.to_dict().items():
        for key, value in options.items():
            old = (saved.get(section) or {}).get(key, value)
            if key not in FREE_ON_RESUME.get(section, set()) and old != value:
                faults.append(
                    f"{section}.{key}: {value!r} would change the experiment being resumed, where it is {old!r}"
                )
    if e.resume_level and not (path / "checkpoints" / f"model_level_{e.resume_level - 1}.pt").exists():
        faults.append(
            f"experiment_params.resume_level: {e.resume_level} starts from level {e.resume_level - 1}'s checkpoint, "
            f"which {path} does not hold"
        )
    if faults:
        raise ConfigError(faults)


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
            Path(e.base_dir).mkdir(parents=True, exist_ok=True)
            path.mkdir()
        for folder in ("checkpoints", "artifacts", "metrics/epochwise_metrics"):
            (path / folder).mkdir(parents=True, exist_ok=True)
        lock = open(path / "artifacts" / "lock", "w")  # noqa: SIM115 - held for the life of the run
    except OSError as error:
        raise RunError(f"experiment_params.base_dir: cannot create {path}: {error.strerror}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RunError(f"another process is running in {path}") from None
        sweep_parts(path)
        run = Run(path, cfg)
        try:
            if not e.resume_expt_name:
                resolved = cfg.replace({"experiment_params": {"expt_name": name}})
                write_whole(path / "expt_config.yaml", dump_yaml(resolved).encode())
            _record_environment(path)
            yield run
            run.writer.flush()
        finally:
            run.writer.close()


def _default_name() -> str:
    return f"experiment_{datetime.datetime.now():%Y%m%d_%H%M%S}_{uuid.uuid4().hex[:6]}"


def _record_environment(path: Path) -> None:
    """Appends what runs here to ``artifacts/environment.json``: one entry a start, so a resumed run tells of each."""
    file = path / "artifacts" / "environment.json"
    try:
        entries = json.loads(file.read_text())
    except (FileNotFoundError, ValueError):
        entries = []
    here = Path(__file__).parent.parent
    entries.append(
        {
            "started": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "command": sys.argv,
            "host": platform.node(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda if torch.cuda.is_available() else None,
            "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
            "git_commit": _git(here, "rev-parse", "HEAD"),
            "git_dirty": bool(_git(here, "status", "--porcelain")),
        }
    )
    write_whole(file, json.dumps(entries, indent=1).encode())


def _git(folder: Path, *words: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
