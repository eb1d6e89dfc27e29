"""What a run leaves in its directory: `open_run` makes or reopens it, `Run` writes to it, `print_levels` sums it up.

`load_run` reads a finished level back: network, config, tables, test batches.
"""

import contextlib
import datetime
import fcntl
import json
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import pandas as pd
import yaml

from harness_params import Config, dump_yaml
from utils.errors import RunError
from utils.files import sweep_parts, write_whole
from utils.output import say
from utils.processes.place import launch_id
from utils.runs.directory import lock_file, never_began
from utils.runs.environment import describe
from utils.runs.loading import LoadedRun, load_run
from utils.runs.opening import opening_lines
from utils.runs.plugin_files import keep_copies
from utils.runs.records import environment_file
from utils.runs.run import Run
from utils.runs.tables import SUMMARY
from utils.wording import density_text

__all__ = ["LoadedRun", "Run", "load_run", "open_run", "print_levels"]

# Longest life of a killed run's processes: a DataLoader's worker looks for its parent every 5 seconds and keeps the
# lock.
LOCK_SECONDS = 10.0


@contextlib.contextmanager
def open_run(cfg: Config, record: dict[str, Any] | None = None) -> Iterator[Run]:
    """Creates the run directory, or opens the one to resume; holds its lock and its writer until the run ends.

    Args:
        record: what ``artifacts/environment.json`` says beside the machine, by name (`utils.runs.opening.record_of`);
            "settled", what auto has come to, is also printed.

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
        lock = open(lock_file(path), "a+")  # noqa: SIM115 - held for the life of the run
    except OSError as error:
        raise RunError(f"experiment_params.base_dir: cannot create {path}: {error.strerror}") from error
    with lock:
        _acquire(lock, path)
        if not e.resume_expt_name and not never_began(path):
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
                _record_levels(path / "expt_config.yaml", cfg)
            else:
                resolved = cfg.replace({"experiment_params": {"expt_name": name}})
                write_whole(path / "expt_config.yaml", dump_yaml(resolved).encode())
            if not finished:
                plugins = keep_copies(path, cfg)
                _record_environment(path, (record or {}) | ({"plugins": plugins} if plugins else {}))
                run.begin_tracking()
            if record and "settled" in record:
                say(*opening_lines(cfg, name, record["settled"]))
            yield run
            run.writer.flush()
        finally:
            run.close()


def _acquire(lock: IO[str], path: Path) -> None:
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


def _record_levels(file: Path, cfg: Config) -> None:
    """Writes the new number of levels into expt_config.yaml; figures read it there."""
    saved, p = yaml.safe_load(file.read_text()), cfg.prune_params
    section = saved.setdefault("prune_params", {})
    extent = {"num_levels": p.num_levels, "target_density": p.target_density}
    if {"target_density": 0.0, **section} != {**section, **extent}:
        section |= extent
        write_whole(file, yaml.safe_dump(saved, sort_keys=False, default_flow_style=False, width=10**6).encode())


def _record_environment(path: Path, record: dict[str, Any]) -> None:
    """Appends one entry per start to ``artifacts/environment.json``: what runs, and the record."""
    file = environment_file(path)
    try:
        entries = json.loads(file.read_text())
    except (FileNotFoundError, ValueError):
        entries = []
    entries = [*(entries if isinstance(entries, list) else []), {**describe(), **record}]
    write_whole(file, json.dumps(entries, indent=1).encode())


def print_levels(run: Run) -> None:
    """The table of levels that ends a run."""
    run.writer.flush()
    frame = pd.DataFrame(run.tables[SUMMARY], columns=run.tables.columns(SUMMARY))
    formatters = {"density": density_text}
    say("", str(run.path), frame.to_string(index=False, float_format=lambda x: f"{x:.4f}", formatters=formatters))
