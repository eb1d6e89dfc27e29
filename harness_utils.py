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
from utils.errors import RunError, lines_of
from utils.files import sweep_parts, write_whole
from utils.output import say
from utils.processes.place import launch_id, started_by_launcher
from utils.runs.directory import has_finished
from utils.runs.environment import describe
from utils.runs.hints import resume_command
from utils.runs.loading import LoadedRun, load_run
from utils.runs.opening import finished_line, opening_lines
from utils.runs.plugin_files import keep_copies
from utils.runs.records import FAILED, environment_file, saved_starts
from utils.runs.run import Run
from utils.runs.saved import lock_file, never_began
from utils.runs.tables import SUMMARY
from utils.wording import density_text

__all__ = ["LoadedRun", "Run", "load_run", "open_run", "print_levels", "resume_command", "tells_finished"]

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
            finished = has_finished(cfg)
            if not finished:  # before the config is there: from then on the same torchrun must know its run
                lock.truncate(0)
                lock.write(launch_id())
                lock.flush()
            _write_config(path / "expt_config.yaml", cfg, name)
            if finished:
                say(finished_line(cfg, path))
            else:
                _begin(run, cfg, record or {})
            yield run
            run.writer.flush()
        except Exception as error:
            _record_failure(path, error)
            raise
        finally:
            run.close()


def _begin(run: Run, cfg: Config, record: dict[str, Any]) -> None:
    """What a start leaves and says before there is a figure."""
    plugins = keep_copies(run.path, cfg)
    _record_environment(run.path, record | ({"plugins": plugins} if plugins else {}))
    run.begin_tracking()
    if "settled" in record:
        say(*opening_lines(cfg, run.path.name, record["settled"]))


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


def _write_config(file: Path, cfg: Config, name: str) -> None:
    """Writes the resolved config of a new run; in that of an old one the number of levels alone."""
    if cfg.experiment_params.resume_expt_name:
        _record_levels(file, cfg)
    else:
        write_whole(file, dump_yaml(cfg.replace({"experiment_params": {"expt_name": name}})).encode())


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
    entries = [*saved_starts(path), {**describe(), **record}]
    write_whole(environment_file(path), json.dumps(entries, indent=1).encode())


def _record_failure(path: Path, error: Exception) -> None:
    """Notes the fault that ends a run at its last start, for who lists runs; the next start is without one."""
    entries = saved_starts(path)
    with contextlib.suppress(RunError, TypeError):  # the fault itself counts, say a full disk
        entries[-1:] = [{**entry, FAILED: lines_of(error)[0]} for entry in entries[-1:]]
        write_whole(environment_file(path), json.dumps(entries, indent=1).encode())


def tells_finished(cfg: Config) -> bool:
    """Whether the run that is resumed has no level left to train, which is told. Not under torchrun: ranks meet."""
    if started_by_launcher() or not has_finished(cfg):
        return False
    with open_run(cfg):  # notes a number of levels that is new
        return True


def print_levels(run: Run) -> None:
    """The table of levels that ends a run."""
    run.writer.flush()
    frame = pd.DataFrame(run.tables[SUMMARY], columns=run.tables.columns(SUMMARY))
    formatters = {"density": density_text}
    say("", str(run.path), frame.to_string(index=False, float_format=lambda x: f"{x:.4f}", formatters=formatters))
