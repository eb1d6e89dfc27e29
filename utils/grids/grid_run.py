"""One run of a grid: its command line, its checked config, and its progress, read from its CSVs."""

import contextlib
import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from harness_params import Config, Note, unused_alone
from utils.errors import DataError
from utils.runs.records import saved_ticket


@dataclass(frozen=True)
class Progress:
    """How far a run is.

    Attributes:
        levels: number of finished levels.
        epochs: number of epochs trained so far, over all levels.
        density: of the last finished level, a fraction; None before the first level ends.
        accuracy: on the test set after the last evaluated epoch, in percent; None before the first one.
    """

    levels: int = 0
    epochs: int = 0
    density: float | None = None
    accuracy: float | None = None


@dataclass(frozen=True)
class GridRun:
    """One run of a grid.

    Attributes:
        name: of the run directory.
        words: the command line after ``harness.py``.
        cfg: the config that these words stand for, checked.
        processes: number of processes that the run starts.
        after: name of the run of the same grid that it starts from; "" = it waits for none.
    """

    name: str
    words: tuple[str, ...]
    cfg: Config
    processes: int = 1
    after: str = ""

    @property
    def path(self) -> Path:
        return Path(self.cfg.experiment_params.base_dir) / self.name

    @property
    def begun(self) -> bool:
        return begun(self.path)

    @property
    def notes(self) -> list[Note]:
        """The notes that harness.py will print for this run: mostly options without effect."""
        return [*self.cfg.notes, *(unused_alone(self.cfg) if self.processes == 1 else [])]

    @property
    def epochs(self) -> int:
        """Number of epochs over all levels.

        With a ``rewind_step`` level 1 tells in which epoch it begins, and a ticket of a rewind point is read when the
        run starts: until then, this is the most that it can be.
        """
        e, p = self.cfg.experiment_params, self.cfg.prune_params
        first = p.rewind_epoch if e.training_type == "wr" else 0
        if e.training_type == "wr" and p.rewind_step:
            first = self._first_epoch_of_level_1()
        ticket = saved_ticket(self.path) if self.cfg.ticket_params.source else None
        skipped = ticket.get("first_epoch", 0) if ticket else 0
        return e.epochs_per_level - skipped + (p.num_levels - 1) * (e.epochs_per_level - first)

    def _first_epoch_of_level_1(self) -> int:
        """0 before the first epoch of level 1 has ended, and where the CSV is damaged, which `progress` reports."""
        from utils.runs.tables import EPOCH_COLUMNS, epoch_table, table_file

        with contextlib.suppress(DataError, ValueError, TypeError):
            rows = _rows(table_file(self.path, epoch_table(1)), EPOCH_COLUMNS)
            return int(rows[0]["epoch"]) if rows else 0
        return 0

    def progress(self) -> Progress:
        """Progress from the run's CSVs; zeros before the first one exists.

        Raises:
            DataError: a CSV is damaged.
        """
        # Not at the top: `--help` needs no tables.
        from utils.runs.tables import EPOCH_COLUMNS, SUMMARY, SUMMARY_COLUMNS, epoch_table, table_file

        summary = table_file(self.path, SUMMARY)
        levels = _rows(summary, SUMMARY_COLUMNS)
        table = table_file(self.path, epoch_table(len(levels)))
        epochs = _rows(table, EPOCH_COLUMNS) if len(levels) < self.cfg.prune_params.num_levels else []
        try:
            return Progress(
                len(levels),
                sum(int(row["epochs"]) for row in levels) + len(epochs),
                float(levels[-1]["density"]) if levels else None,
                _accuracy(levels, epochs),
            )
        except (TypeError, ValueError) as error:  # TypeError: a row that ends too soon
            raise DataError(f"{summary.parent}: not a number in {summary.name} or {table.name}: {error}") from error

    @property
    def finished(self) -> bool:
        return self.progress().levels >= self.cfg.prune_params.num_levels


def begun(path: Path) -> bool:
    """True if a run can be resumed at `path`.

    The config decides, not the directory: the directory is created first, and writing the config may fail (full disk).
    """
    return (path / "expt_config.yaml").exists()


def _rows(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """Rows of a CSV that must hold `columns`; [] if there is no file."""
    try:
        with open(path, newline="") as file:  # renamed into place whole: never half a row
            reader = csv.DictReader(file)
            missing = [column for column in columns if column not in (reader.fieldnames or ())]
            if missing:
                raise DataError(f"{path}: missing columns: {', '.join(missing)}")
            return list(reader)
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: not a readable CSV: {error}") from error


def _accuracy(levels: Sequence[dict[str, str]], epochs: Sequence[dict[str, str]]) -> float | None:
    """Test accuracy after the last epoch that was evaluated, in percent; the cells of the others are empty."""
    cells = [row["test_acc"] for row in epochs if row["test_acc"] != ""]
    if cells:
        return float(cells[-1])
    return float(levels[-1]["final_test_acc"] or "nan") if levels else None
