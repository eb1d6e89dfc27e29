"""Rows of runs as text, at most as wide as a terminal, and as a CSV."""

import math
from collections import Counter
from collections.abc import Sequence

from tqdm import tqdm

from utils.overview.rows import STATES, RunRow
from utils.runs.tables import csv_text

GAP = "  "
NARROWEST = 12  # characters that the method and the folder keep each
LEFT_OUT = ("best", "density", "time left", "last")  # columns, in the order in which a narrow terminal loses them
CSV_COLUMNS = [
    "folder", "state", "levels", "num_levels", "density", "last_test_acc", "best_test_acc", "method", "seconds_left",
    "fault",
]  # fmt: skip


def table_text(rows: Sequence[RunRow], width: int) -> str:
    """One line per run below a header, and the number of runs by state; no line is longer than `width`."""
    columns = {
        "state": [row.state for row in rows],
        "level": [f"{row.levels}/{row.planned}" if row.planned else "-" for row in rows],
        "density": [_number(row.density, ".4g") for row in rows],
        "last": [_number(row.last, ".2f") for row in rows],
        "best": [_number(row.best, ".2f") for row in rows],
        "method": [row.method or "-" for row in rows],
        "time left": [_duration(row) for row in rows],
        "folder": [str(row.path) for row in rows],
    }
    widths = {name: max(map(len, [name, *cells])) for name, cells in columns.items()}
    for name in LEFT_OUT:
        if _room(widths, width) < min(2 * NARROWEST, widths["method"] + widths["folder"]):
            del columns[name], widths[name]
    _share(widths, max(2, _room(widths, width)))
    lines = zip(*([name, *cells] for name, cells in columns.items()), strict=True)
    text = [GAP.join(_fitted(name, cell, widths[name]) for name, cell in zip(columns, line)) for line in lines]
    return "\n".join(line.rstrip()[:width] for line in (*text, counts(rows)))


def counts(rows: Sequence[RunRow]) -> str:
    """'3 runs: 1 running, 2 finished'."""
    number = Counter(row.state for row in rows)
    parts = [f"{number[state]} {state}" for state in STATES if number[state]]
    return f"{len(rows)} run{'s' if len(rows) > 1 else ''}: {', '.join(parts)}"


def table_csv(rows: Sequence[RunRow]) -> str:
    """All that is known of the runs, one line each."""
    cells = [
        (str(row.path), row.state, row.levels, row.planned, row.density, row.last, row.best, row.method,
         row.seconds_left, row.fault)
        for row in rows
    ]  # fmt: skip
    return csv_text(CSV_COLUMNS, [dict(zip(CSV_COLUMNS, line, strict=True)) for line in cells])


def _number(value: float, form: str) -> str:
    return "-" if math.isnan(value) else format(value, form)


def _duration(row: RunRow) -> str:
    """'03:20', '1:02:03'; nothing of a run that has no level left."""
    if row.state == "finished" or math.isnan(row.seconds_left):
        return "-"
    return tqdm.format_interval(row.seconds_left)


def _room(widths: dict[str, int], width: int) -> int:
    """Characters that are left for the method and the folder."""
    fixed = sum(size for name, size in widths.items() if name not in ("method", "folder"))
    return width - fixed - len(GAP) * (len(widths) - 1)


def _share(widths: dict[str, int], room: int) -> None:
    """Shares out what there is: a third to the method at least, and the rest to the folder, which names the run."""
    least = min(widths["method"], max(NARROWEST, room // 3), room // 2)
    widths["folder"] = min(widths["folder"], room - least)
    widths["method"] = min(widths["method"], room - widths["folder"])


def _fitted(name: str, cell: str, size: int) -> str:
    """A cell of a column. A folder keeps its end and a method its beginning, which tell them apart."""
    if len(cell) > size:
        cell = f"…{cell[1 - size :]}" if name == "folder" and size > 1 else f"{cell[: size - 1]}…"
    return cell.ljust(size) if name in ("state", "method", "folder") else cell.rjust(size)
