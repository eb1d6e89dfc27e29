"""What a run leaves in its directory: checkpoints, CSV logs and resume states.

Only rank 0 touches files. Everything it writes goes through one background writer in the order it was asked for, so a
resume state on disk never tells of a checkpoint that is not.
"""

import contextlib
import datetime
import fcntl
import hashlib
import io
import json
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import pandas as pd
import yaml
from torch import Tensor

from harness_params import Config, dump_yaml
from utils.errors import RunError
from utils.files import BackgroundWriter, load, pack, sha256, sweep_parts, write_whole
from utils.processes.place import launch_id
from utils.runs.directory import _lock_file, _never_began
from utils.runs.environment import describe
from utils.runs.states import saved_states, trained_levels
from utils.runs.tables import SUMMARY_COLUMNS, _columns, _parsed


class Run:
    """One run directory, opened by rank 0 for as long as the run lives.

    Attributes:
        path: the directory.
        tables: rows of each CSV by file name; written whole whenever they grow.
    """

    def __init__(self, path: Path, cfg: Config):
        self.path, self.cfg = path, cfg
        self.tables: dict[str, list[dict[str, Any]]] = {}
        self.writer = BackgroundWriter()
        self._queued: dict[Path, threading.Event] = {}
        self._generation = 0
        self._index: list[dict[str, Any]] = []

    # --- checkpoints -------------------------------------------------------------------------------------------------

    def checkpoint(self, name: str) -> Path:
        """Path of checkpoint ``model_{name}.pt``."""
        return self.path / "checkpoints" / f"model_{name}.pt"

    def save_checkpoint(self, name: str, state: dict[str, Tensor]) -> None:
        """Queues ``checkpoints/model_{name}.pt`` (a plain state_dict)."""
        self._submit(self.checkpoint(name), state)

    def load_checkpoint(self, name: str) -> dict[str, Tensor]:
        """The state_dict of ``checkpoints/model_{name}.pt``, once it is on disk.

        Raises:
            RunError: it is missing, damaged, or no longer what this run has written.
        """
        return self._read(self.checkpoint(name))

    def save_artifact(self, name: str, obj: Any) -> None:
        """Queues ``artifacts/{name}.pt``."""
        self._submit(self.path / "artifacts" / f"{name}.pt", obj)

    def load_artifact(self, name: str) -> Any:
        """Content of ``artifacts/{name}.pt``, as `load_checkpoint`."""
        return self._read(self.path / "artifacts" / f"{name}.pt")

    def remove_checkpoints(self, first_level: int) -> None:
        """Queues the removal of the checkpoints of `first_level` and later ones, which are to be trained again."""

        def remove() -> None:
            for path in (self.path / "checkpoints").glob("model_level_*.pt"):
                number = path.stem.removeprefix("model_level_")
                if number.isdecimal() and int(number) >= first_level:
                    path.unlink()

        self.writer.submit(remove)

    @property
    def _digests_file(self) -> Path:
        return self.path / "artifacts" / "checkpoints.json"

    def _submit(self, path: Path, obj: Any) -> None:
        self._queued[path] = self.writer.submit(lambda: self._write(path, obj))

    def _write(self, path: Path, obj: Any) -> None:
        """The file's digest first, beside the one before: whichever of the two a crash leaves, it is known."""
        data = pack(obj)
        digests = self._digests()
        digest = hashlib.sha256(data).hexdigest()
        old = [known for known in digests.get(path.name, []) if known != digest]
        digests[path.name] = [digest, *old][:2]
        write_whole(self._digests_file, json.dumps(digests, indent=1).encode())
        write_whole(path, data)

    def _read(self, path: Path) -> Any:
        if path in self._queued:
            self.writer.wait(self._queued[path])
        known = self._digests().get(path.name)
        if known and path.exists() and sha256(path) not in known:
            raise RunError(f"{path} was changed since this run wrote it: it is damaged, or another checkpoint")
        return load(path)

    def _digests(self) -> dict[str, list[str]]:
        try:
            digests = json.loads(self._digests_file.read_text())
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            raise RunError(f"{self._digests_file} is damaged: {error}; remove it to go on unchecked") from error
        if not isinstance(digests, dict):
            raise RunError(f"{self._digests_file} is damaged; remove it to go on unchecked")
        return digests

    # --- resume state ------------------------------------------------------------------------------------------------

    def save_state(self, state: dict[str, Any]) -> None:
        """Queues the resume state: the older of two generations is overwritten, then the index names it the newer.

        The index (``artifacts/state.json``) holds each generation's SHA-256; it is written last, so it never tells of a
        state that is not there.
        """
        self._generation ^= 1
        name = f"state_{self._generation}.pt"
        state = {**state, "tables": {table: list(rows) for table, rows in self.tables.items()}}
        self.writer.submit(lambda: self._write_state(name, state))

    def _write_state(self, name: str, state: dict[str, Any]) -> None:
        data = pack(state)
        write_whole(self.path / "artifacts" / name, data)
        entry = {"file": name, "sha256": hashlib.sha256(data).hexdigest()}
        entry |= {key: state[key] for key in ("level", "epoch", "step")}
        self._index = [entry, *(old for old in self._index if old["file"] != name)][:2]
        write_whole(self.path / "artifacts" / "state.json", json.dumps(self._index, indent=1).encode())

    def load_state(self) -> dict[str, Any] | None:
        """The newest undamaged resume state, or None when none was ever saved.

        Raises:
            RunError: states were saved, and every one of them is damaged.
        """
        entries = saved_states(self.path)
        if not entries:
            return None
        files = [(entry["file"], entry["sha256"]) for entry in entries]
        for position, (name, digest) in enumerate(files):
            path = self.path / "artifacts" / name
            if name in ("state_0.pt", "state_1.pt") and sha256(path) == digest:
                self._index, self._generation = entries[position:], int(name[6])
                return load(path)
            print(f"harness: {path} is damaged; trying the older state", file=sys.stderr)
        raise RunError(
            f"{self.path / 'artifacts'}: every saved state is damaged; start a level again with resume_level"
        )

    def is_finished(self) -> bool:
        """Whether this config only takes up the run's end: it resumes a run that has trained all of its levels."""
        e = self.cfg.experiment_params
        if not e.resume_expt_name or e.resume_level:
            return False
        return trained_levels(self.path) >= self.cfg.prune_params.num_levels

    # --- CSV logs ----------------------------------------------------------------------------------------------------

    def add_rows(self, table: str, rows: list[dict[str, Any]]) -> None:
        """Appends rows to ``metrics/{table}.csv`` and queues the whole file."""
        self.tables.setdefault(table, []).extend(rows)
        self.write_table(table)

    def write_table(self, table: str) -> None:
        """Queues ``metrics/{table}.csv`` as it now stands in memory; nothing when it stands so on disk."""
        buffer = io.StringIO()
        pd.DataFrame(self.tables[table], columns=_columns(table)).to_csv(buffer, index=False)
        path, data = self.path / "metrics" / f"{table}.csv", buffer.getvalue().encode()

        def write() -> None:
            if not (path.exists() and path.read_bytes() == data):
                write_whole(path, data)

        self.writer.submit(write, snapshot=False)

    def restore_tables(self, tables: dict[str, list[dict[str, Any]]]) -> None:
        """Cuts the CSVs on disk back to `tables`: files of levels it does not know go, the rest is rewritten."""
        self.tables = tables
        levels = {f"level_{row['level']}_metrics" for row in tables.get("summary", [])}
        levels |= {Path(name).name for name in tables}
        for path in (self.path / "metrics" / "epochwise_metrics").glob("level_*_metrics.csv"):
            if path.stem not in levels:
                path.unlink()
        for table in tables:
            self.write_table(table)

    def read_tables(self, before: int) -> dict[str, list[dict[str, Any]]]:
        """The rows on disk of the levels before `before`.

        Raises:
            RunError: a CSV is damaged, or does not hold each of those levels.
        """
        tables = {}
        for table in ("summary", "layerwise_density"):
            rows = [row for row in self._read_table(table) if row["level"] < before]
            if {row["level"] for row in rows} != set(range(before)):
                raise RunError(f"{self.path / 'metrics' / table}.csv does not hold each of levels 0 to {before - 1}")
            tables[table] = rows
        return tables

    def _read_table(self, table: str) -> list[dict[str, Any]]:
        path = self.path / "metrics" / f"{table}.csv"
        try:
            # As text first: Python's float() brings every figure back as it was written, to the last bit.
            frame = pd.read_csv(path, dtype=str, keep_default_na=False)
        except FileNotFoundError:
            return []
        except (ValueError, OSError) as error:
            raise RunError(f"{path} is no readable CSV: {error}") from error
        if list(frame.columns) != _columns(table):
            raise RunError(f"{path} has columns {', '.join(frame.columns)}; expected {', '.join(_columns(table))}")
        try:
            return [{key: _parsed(key, text) for key, text in row.items()} for row in frame.to_dict("records")]
        except ValueError as error:
            raise RunError(f"{path} is no readable CSV: {error}") from error


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


# The processes of a run that was just killed are gone within this time: a DataLoader's worker looks for its parent
# every 5 seconds, and holds the run's lock until then.
LOCK_SECONDS = 10.0


def print_levels(run: Run) -> None:
    """The table of levels that ends a run."""
    run.writer.flush()
    frame = pd.DataFrame(run.tables["summary"], columns=SUMMARY_COLUMNS)
    print(f"\n{run.path}")
    print(frame.to_string(index=False, float_format=lambda x: f"{x:.4f}"))
