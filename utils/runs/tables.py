"""The CSVs of a run: columns, rows in memory, writing and reading. Imports no torch: figures and grids use it."""

import csv
import io
import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from harness_params import Config
from utils.errors import RunError
from utils.files import write_whole

SUMMARY_COLUMNS = [
    "level", "density", "sparsity", "final_test_acc", "max_test_acc", "final_test_loss", "epochs", "seconds",
]  # fmt: skip
PRUNED_ACCURACY = "pruned_test_acc"  # right after pruning, before rewinding and training
# Columns right of a table's own that older runs lack: read as not-a-number there, and written by all runs.
LATER_COLUMNS = {"summary": [PRUNED_ACCURACY]}
EPOCH_COLUMNS = ["epoch", "train_loss", "test_loss", "train_acc", "test_acc", "lr", "seconds", "images_per_second"]
LAYER_COLUMNS = ["level", "layer", "kept", "total", "density", "dead"]
# Further columns of runs with validation images; of runs with an average of the weights; and of those with both.
VALIDATION_COLUMNS = ["val_acc", "val_loss"]
BEST_COLUMNS = ["best_val_acc", "best_val_epoch", "best_val_test_acc"]
AVERAGE_COLUMNS = ["ema_test_acc", "ema_test_loss"]
AVERAGE_VALIDATION_COLUMNS = ["ema_val_acc", "ema_val_loss"]
FURTHER_COLUMNS = [*VALIDATION_COLUMNS, *BEST_COLUMNS, *AVERAGE_COLUMNS, *AVERAGE_VALIDATION_COLUMNS]
SUMMARY, LAYERS = "summary", "layerwise_density"

Row = dict[str, Any]


def epoch_table(level: int) -> str:
    """Name of the table of a level's epochs."""
    return f"epochwise_metrics/level_{level}_metrics"


def level_of(table: str) -> int:
    """The level of an `epoch_table`."""
    return int(table.rpartition("level_")[2].removesuffix("_metrics"))


def table_file(run: Path, table: str) -> Path:
    """CSV of a table by its name, in the directory of a run."""
    return run / "metrics" / f"{table}.csv"


def columns_of(table: str, validation: bool = False, average: bool = False) -> list[str]:
    """Columns of a table by its name.

    Args:
        validation: whether the run has validation images.
        average: whether the run has an average of the weights.
    """
    if table == LAYERS:
        return LAYER_COLUMNS
    columns = [*SUMMARY_COLUMNS, *LATER_COLUMNS[SUMMARY]] if table == SUMMARY else [*EPOCH_COLUMNS]
    if validation:
        columns += VALIDATION_COLUMNS + (BEST_COLUMNS if table == SUMMARY else [])
    if average:
        columns += AVERAGE_COLUMNS + (AVERAGE_VALIDATION_COLUMNS if validation else [])
    return columns


def is_evaluated(cfg: Config, epoch: int) -> bool:
    """Whether the network is evaluated after an epoch of a level's schedule: every N epochs, and after the last one."""
    e = cfg.experiment_params
    return (epoch + 1) % e.eval_every_epochs == 0 or epoch + 1 == e.epochs_per_level


def summary_row(level: int, density: float, epochs: list[Row], pruned_test_acc: float) -> Row:
    """A level's row of the summary.

    With validation images, the best epoch is that of the highest accuracy on them, the earliest of several.

    Args:
        density: 0 to 1.
        epochs: the rows of its epochs, of which the last one is evaluated.
        pruned_test_acc: see `PRUNED_ACCURACY`.
    """
    last, seconds = epochs[-1], sum(row["seconds"] for row in epochs)
    evaluated = [row for row in epochs if not math.isnan(row["test_acc"])]
    best = max(row["test_acc"] for row in evaluated)
    values = (level, density, 1 - density, last["test_acc"], best, last["test_loss"], len(epochs), seconds)
    row = dict(zip(columns_of(SUMMARY), (*values, pruned_test_acc)))
    if "val_acc" in last:
        chosen = max(evaluated, key=lambda row: row["val_acc"])  # max gives the first of equals
        row |= dict(zip(BEST_COLUMNS, (chosen["val_acc"], chosen["epoch"], chosen["test_acc"])))
    return row | {column: last[column] for column in FURTHER_COLUMNS if column in last}


class Tables:
    """The rows of each CSV of a run; a file is written whole whenever its table grows.

    A table's name is its file's below ``metrics/``, without ``.csv``.

    Args:
        folder: ``metrics/``.
        submit: queues a write.
        validation, average: see `columns_of`.
        added: called with a table's name and the rows that it gets.
    """

    def __init__(
        self,
        folder: Path,
        submit: Callable[[Callable[[], None]], object],
        validation: bool = False,
        average: bool = False,
        added: Callable[[str, list[Row]], None] = lambda table, rows: None,
    ):
        self._added = added
        self.folder, self._submit, self._validation, self._average = folder, submit, validation, average
        self._rows: dict[str, list[Row]] = {}

    def __getitem__(self, table: str) -> list[Row]:
        return self._rows.get(table, [])

    def add(self, table: str, rows: list[Row]) -> None:
        """Appends rows and queues the whole file."""
        self._rows.setdefault(table, []).extend(rows)
        self._added(table, rows)
        self._write(table)

    def start(self, table: str) -> None:
        """Empties a table. Its file stays until the first row is added."""
        self._rows[table] = []

    def drop(self, table: str) -> None:
        """Forgets the rows of a finished table. Its file stays."""
        self._rows.pop(table, None)

    def state_dict(self) -> dict[str, list[Row]]:
        """The rows of each table."""
        return {table: list(rows) for table, rows in self._rows.items()}

    def load_state_dict(self, state: dict[str, list[Row]]) -> None:
        """Takes the rows of `state`; the files stay until `rewrite`."""
        self._rows = {table: list(rows) for table, rows in state.items()}

    def rewrite(self) -> None:
        """Cuts the files back to the rows in memory; files of tables without rows are removed."""
        known = {epoch_table(row["level"]) for row in self[SUMMARY]} | set(self._rows)
        for path in self.folder.rglob("*.csv"):
            if str(path.relative_to(self.folder).with_suffix("")) not in known:
                path.unlink()
        for table in self._rows:
            self._write(table)

    def _write(self, table: str) -> None:
        """Queues the file of a table as it is now; nothing is written if the file is the same."""
        path = self.folder / f"{table}.csv"
        data = csv_text(self.columns(table), self._rows[table]).encode()

        def write() -> None:
            if not (path.exists() and path.read_bytes() == data):
                write_whole(path, data)

        self._submit(write)

    def columns(self, table: str) -> list[str]:
        """Columns of a table of this run."""
        return columns_of(table, self._validation, self._average)

    def read_levels(self, before: int) -> dict[str, list[Row]]:
        """The rows on disk of the levels before `before`, as a state of `load_state_dict`.

        Raises:
            RunError: a CSV is damaged, or lacks one of these levels.
        """
        state = {}
        for table in (SUMMARY, LAYERS):
            rows = [row for row in self._read(table) if row["level"] < before]
            if {row["level"] for row in rows} != set(range(before)):
                raise RunError(f"{self.folder / table}.csv does not hold each of levels 0 to {before - 1}")
            state[table] = rows
        return state

    def _read(self, table: str) -> list[Row]:
        path = self.folder / f"{table}.csv"
        try:
            # As text first: Python's float() brings every figure back as it was written, to the last bit.
            frame = pd.read_csv(path, dtype=str, keep_default_na=False)
        except FileNotFoundError:
            return []
        except (ValueError, OSError) as error:
            raise RunError(f"{path} is no readable CSV: {error}") from error
        expected = self.columns(table)
        for column in LATER_COLUMNS.get(table, []):
            if column not in frame:
                frame[column] = ""
        if list(frame.columns) != expected:
            raise RunError(f"{path} has columns {', '.join(frame.columns)}; expected {', '.join(expected)}")
        try:
            return [
                {str(key): _parsed(str(key), text) for key, text in row.items()} for row in frame.to_dict("records")
            ]
        except ValueError as error:
            raise RunError(f"{path} is no readable CSV: {error}") from error


def csv_text(columns: Sequence[str], rows: list[Row]) -> str:
    """A table as CSV; not-a-number is an empty cell. (pandas' own writer takes ten times as long, per epoch.)"""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(columns)
    older = dict.fromkeys(itertools.chain(*LATER_COLUMNS.values()), math.nan)  # rows of older runs lack these
    filled = ([row[column] for column in columns] for row in ({**older, **row} for row in rows))
    # Only not-a-number differs from itself.
    writer.writerows(["" if value != value else value for value in values] for values in filled)
    return buffer.getvalue()


def _parsed(column: str, text: str) -> Any:
    if column == "layer":
        return text
    if column == "dead":
        return text == "True"
    if text == "":  # how not-a-number is written
        return float("nan")
    return int(text) if column in ("level", "epoch", "epochs", "kept", "total", "best_val_epoch") else float(text)
