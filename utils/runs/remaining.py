"""How far a run is and how long it still takes, from its config and its tables. Imports no torch: grids use it."""

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness_params import Config
from utils.errors import DataError
from utils.runs.records import saved_ticket

Cells = Mapping[str, Any]  # a row of a table: numbers, or their text as a CSV has it


# --- pure: from the config and the rows ------------------------------------------------------------------------------


def first_epochs(
    cfg: Config, levels: Sequence[Cells], epochs: Sequence[Cells], known: tuple[int, int] = (0, 0)
) -> tuple[int, int]:
    """The epoch of the schedule at which level 0 begins, and that at which each later level begins.

    The rows tell, once there are any; before, the config does.

    Args:
        levels, epochs: as `seconds_left`.
        known: what neither config nor rows tell: the epoch of a ticket's weights ``rewind``, that of ``rewind_step``.
    """
    e, p = cfg.experiment_params, cfg.prune_params
    told = [e.epochs_per_level - int(row["epochs"]) for row in levels[:2]]
    if len(levels) < 2 and epochs:
        told.append(int(epochs[0]["epoch"]))
    by_epoch = e.training_type == "wr" and not p.rewind_step
    planned: list[int] = [known[0], p.rewind_epoch if by_epoch else known[1] if e.training_type == "wr" else 0]
    begins = [*told, *planned[len(told) :]]
    return begins[0], begins[1]


def total_epochs(cfg: Config, levels: Sequence[Cells], epochs: Sequence[Cells], known: tuple[int, int] = (0, 0)) -> int:
    """Number of epochs over all levels of a run. Args: as `first_epochs`."""
    first, later = first_epochs(cfg, levels, epochs, known)
    per_level = cfg.experiment_params.epochs_per_level
    return per_level - first + (cfg.prune_params.num_levels - 1) * (per_level - later)


def epochs_trained(levels: Sequence[Cells], epochs: Sequence[Cells]) -> int:
    """Number of finished epochs. Args: as `seconds_left`."""
    return sum(int(row["epochs"]) for row in levels) + len(epochs)


def seconds_per_epoch(levels: Sequence[Cells], epochs: Sequence[Cells]) -> float:
    """Mean over the level in progress and the one before it, evaluation included; NaN before the first epoch has ended.

    The run's first epoch, which compiles and captures, is left out as long as only level 0 tells.

    Args: as `seconds_left`.
    """
    if levels:
        rows = [(float(levels[-1]["seconds"]), int(levels[-1]["epochs"]))]
        rows += [(float(row["seconds"]), 1) for row in epochs]
    else:
        rows = [(float(row["seconds"]), 1) for row in (epochs[1:] or epochs)]
    count = sum(number for _, number in rows)
    return sum(seconds for seconds, _ in rows) / count if count else math.nan


def seconds_left(
    cfg: Config,
    levels: Sequence[Cells],
    epochs: Sequence[Cells],
    *,
    done: float = 0.0,
    epoch_seconds: float = math.nan,
    level_change: float = 0.0,
    known: tuple[int, int] = (0, 0),
) -> float:
    """Seconds until a run has trained all its levels; NaN while nothing has been measured, 0 once it is finished.

    Args:
        levels: rows of ``summary.csv``, one per finished level: numbers, or text as csv.DictReader reads it.
        epochs: rows of the level in progress, of ``epochwise_metrics/level_{len(levels)}_metrics.csv``.
        done: finished share of the epoch in progress, 0 to 1.
        epoch_seconds: seconds per epoch that the caller has measured; NaN = `seconds_per_epoch` of the rows.
        level_change: seconds between two levels: pruning, rewinding, saving. No row holds them.
        known: as `first_epochs`.
    """
    to_come = cfg.prune_params.num_levels - len(levels)
    if to_come <= 0:
        return 0.0
    rate = seconds_per_epoch(levels, epochs) if math.isnan(epoch_seconds) else epoch_seconds
    left = total_epochs(cfg, levels, epochs, known) - epochs_trained(levels, epochs) - done
    return max(left, 0.0) * rate + (to_come - 1) * level_change


# --- from a run's directory ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Progress:
    """How far a run is.

    Attributes:
        levels: number of finished levels.
        epochs: number of epochs trained so far, over all levels.
        total: number of epochs over all levels. With a ``rewind_step`` level 1 tells in which epoch it begins, and a
            ticket of a rewind point is read when the run starts: until then, this is the most that it can be.
        density: of the last finished level, a fraction; None before the first level ends.
        accuracy: on the test set after the last evaluated epoch, in percent; None before the first one.
        best: the highest of all evaluated epochs, in percent; None before the first one.
        epoch_seconds: see `seconds_per_epoch`.
        seconds_left: see `seconds_left`.
    """

    levels: int = 0
    epochs: int = 0
    total: int = 0
    density: float | None = None
    accuracy: float | None = None
    best: float | None = None
    epoch_seconds: float = math.nan
    seconds_left: float = math.nan


def read_progress(run: Path, cfg: Config) -> Progress:
    """How far the run in a directory is, by its CSVs; nothing done before the first one exists.

    Raises:
        DataError: a CSV is damaged.
    """
    # Not at the top: `--help` needs no tables.
    from utils.runs.tables import EPOCH_COLUMNS, SUMMARY, SUMMARY_COLUMNS, epoch_table, table_file

    summary = table_file(run, SUMMARY)
    levels = _rows(summary, SUMMARY_COLUMNS)
    table = table_file(run, epoch_table(len(levels)))
    epochs = _rows(table, EPOCH_COLUMNS) if len(levels) < cfg.prune_params.num_levels else []
    ticket = saved_ticket(run) if cfg.ticket_params.source else None
    known = (int(ticket.get("first_epoch", 0)) if ticket else 0, 0)
    try:
        return Progress(
            len(levels),
            epochs_trained(levels, epochs),
            total_epochs(cfg, levels, epochs, known),
            float(levels[-1]["density"]) if levels else None,
            _accuracy(levels, epochs),
            _best(levels, epochs),
            seconds_per_epoch(levels, epochs),
            seconds_left(cfg, levels, epochs, known=known),
        )
    except (TypeError, ValueError) as error:  # TypeError: a row that ends too soon
        raise DataError(f"{summary.parent}: not a number in {summary.name} or {table.name}: {error}") from error


def seconds_left_of_all(runs: Sequence[Progress], parallel: int) -> float:
    """Seconds until several runs are trained, `parallel` at a time; NaN while nothing has been measured.

    A run that has no epoch yet is taken to need as long per epoch as the others do on average.
    """
    measured = [run.epoch_seconds for run in runs if not math.isnan(run.epoch_seconds)]
    mean = sum(measured) / len(measured) if measured else math.nan
    left = [(run.total - run.epochs) * mean if math.isnan(run.seconds_left) else run.seconds_left for run in runs]
    return max([*left, sum(left) / parallel]) if left else 0.0


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


def _best(levels: Sequence[dict[str, str]], epochs: Sequence[dict[str, str]]) -> float | None:
    """Highest test accuracy of all evaluated epochs, in percent."""
    cells = [*(row["max_test_acc"] for row in levels), *(row["test_acc"] for row in epochs)]
    return max((float(cell) for cell in cells if cell != ""), default=None)
