"""One run directory while its run lives: checkpoints, artifacts, resume states and tables, written in the background.

Only rank 0 touches files. Everything it writes goes through one background writer, in order, so a saved state never
refers to a missing checkpoint.
"""

import json
import threading
from pathlib import Path
from typing import Any

from torch import Tensor

from harness_params import Config
from utils.errors import RunError
from utils.files import BackgroundWriter, sha256, whole_file, write_whole
from utils.output import warn
from utils.runs.snapshots import Snapshot
from utils.runs.states import saved_states
from utils.runs.tables import SUMMARY, Row, Tables
from utils.runs.trackers import Tracking
from utils.runs.weights import load, save


class Run:
    """One run directory, opened by rank 0 for as long as the run lives.

    Attributes:
        path: the directory.
        tables: the CSVs.
        writer: writes everything, in the background and in order.
        tracking: what gets the rows of the tables, too; None before it is begun.
    """

    tracking: Tracking | None = None

    def __init__(self, path: Path, cfg: Config):
        self.path, self.cfg = path, cfg
        self.writer = BackgroundWriter()
        self.tables = Tables(
            path / "metrics",
            lambda write: self.writer.submit(write, snapshot=False),
            validation=cfg.dataset.validation_images > 0,
            average=cfg.experiment_params.ema_decay > 0,
            added=self._track,
        )
        self._queued: dict[Path, threading.Event] = {}
        self._generation = 0
        self._index: list[dict[str, Any]] = []

    def begin_tracking(self) -> None:
        """Rows that the tables get from now on also go to ``experiment_params.tracker``."""
        self.tracking = Tracking(self.path, self.cfg)

    def _track(self, table: str, rows: list[Row]) -> None:
        if self.tracking:
            self.tracking.add(table, rows, self.tables[SUMMARY])

    def close(self) -> None:
        """Ends the threads that write."""
        self.writer.close()
        if self.tracking:
            self.tracking.close()

    # --- checkpoints -------------------------------------------------------------------------------------------------

    def checkpoint(self, name: str) -> Path:
        """Path of checkpoint ``model_{name}.pt``."""
        return self.path / "checkpoints" / f"model_{name}.pt"

    def save_checkpoint(self, name: str, state: Snapshot) -> None:
        """Queues ``checkpoints/model_{name}.pt``, a plain state_dict."""
        self._submit(self.checkpoint(name), state)

    def save_level(self, level: int, state: Snapshot) -> None:
        """Queues the checkpoint of a level; ``model_level_{k}_ema.pt``, too, where weights are averaged."""
        self.save_checkpoint(f"level_{level}", state["model"])
        if "ema" in state:
            self.save_checkpoint(f"level_{level}_ema", state["ema"])

    def load_checkpoint(self, name: str) -> dict[str, Tensor]:
        """The state_dict of ``checkpoints/model_{name}.pt``, once it is on disk.

        Raises:
            RunError: it is missing, damaged, or no longer what this run has written.
        """
        return self._read(self.checkpoint(name))

    def save_artifact(self, name: str, content: Snapshot) -> None:
        """Queues ``artifacts/{name}.pt``."""
        self._submit(self.path / "artifacts" / f"{name}.pt", content)

    def load_artifact(self, name: str) -> Any:
        """Content of ``artifacts/{name}.pt``, as `load_checkpoint`."""
        return self._read(self.path / "artifacts" / f"{name}.pt")

    def remove_checkpoints(self, first_level: int) -> None:
        """Queues the removal of the checkpoints of `first_level` and later ones, which are to be trained again."""

        def remove() -> None:
            for path in (self.path / "checkpoints").glob("model_level_*.pt"):
                number = path.stem.removeprefix("model_level_").removesuffix("_ema")
                if number.isdecimal() and int(number) >= first_level:
                    path.unlink()

        self.writer.submit(remove)

    def _submit(self, path: Path, content: Snapshot) -> None:
        self._queued[path] = self.writer.submit(lambda: self._write(path, content))

    def _write(self, path: Path, content: Snapshot) -> None:
        """Digest first, beside the one before, so after a crash the old and the new file both pass the check."""
        with whole_file(path) as file:
            save(content.content(), file)
            self._note_digest(path.name, file.finish())

    def _note_digest(self, name: str, digest: str) -> None:
        file = _digests_file(self.path)
        digests = _digests(file)
        old = [known for known in digests.get(name, []) if known != digest]
        digests[name] = [digest, *old][:2]
        write_whole(file, json.dumps(digests, indent=1).encode())

    def _read(self, path: Path) -> Any:
        if path in self._queued:
            self.writer.wait(self._queued[path])
        return read_saved(path)

    # --- resume state ------------------------------------------------------------------------------------------------

    def save_state(self, state: Snapshot) -> None:
        """Queues a resume state, with the tables in it: the older of two files is overwritten, then the index names it.

        The index (``artifacts/state.json``) holds each generation's SHA-256; it is written last, in order, so it
        never refers to a missing state.
        """
        self._generation ^= 1
        name, tables = f"state_{self._generation}.pt", self.tables.state_dict()
        self.writer.submit(lambda: self._write_state(name, state, tables))

    def _write_state(self, name: str, state: Snapshot, tables: dict[str, list[Row]]) -> None:
        content = {**state.content(), "tables": tables}
        with whole_file(self.path / "artifacts" / name) as file:
            save(content, file)
            digest = file.finish()
        entry = {"file": name, "sha256": digest}
        entry |= {key: content[key] for key in ("level", "epoch", "step")}
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
            warn(f"{path} is damaged; trying the older state")
        raise RunError(
            f"{self.path / 'artifacts'}: every saved state is damaged; start a level again with resume_level"
        )


def read_saved(path: Path) -> Any:
    """The content of a checkpoint or artifact of a run, this one's or another's.

    Args:
        path: in the run's ``checkpoints/`` or ``artifacts/``.

    Raises:
        RunError: it is missing, damaged, or no longer what the run has written.
    """
    known = _digests(_digests_file(path.parent.parent)).get(path.name)
    if known and path.exists() and sha256(path) not in known:
        raise RunError(f"{path} was changed since this run wrote it: it is damaged, or another checkpoint")
    return load(path)


def _digests_file(run: Path) -> Path:
    return run / "artifacts" / "checkpoints.json"


def _digests(file: Path) -> dict[str, list[str]]:
    """{file name: SHA-256 of the last writes, newest first}."""
    try:
        digests = json.loads(file.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise RunError(f"{file} is damaged: {error}; remove it to go on unchecked") from error
    if not isinstance(digests, dict):
        raise RunError(f"{file} is damaged; remove it to go on unchecked")
    return digests
