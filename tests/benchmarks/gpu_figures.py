"""Figures of gpu_check.py, out of what runs and benchmarks leave."""

import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

WARM_UP = 4  # epochs of each level that do not count: in the fourth, the last batch is captured as a CUDA graph


@dataclass
class Figure:
    """A measured figure; `ok` says whether it meets its target, None that it has none."""

    what: str
    value: float
    unit: str
    target: str = ""
    ok: bool | None = None

    def __str__(self) -> str:
        digits = 2 if self.value < 100 else 0
        verdict = {True: "met", False: "MISSED", None: ""}[self.ok]
        return f"| {self.what} | {self.value:,.{digits}f} {self.unit} | {self.target} | {verdict} |"


def table(figures: Iterable[Figure]) -> list[str]:
    """Lines of a Markdown table."""
    return ["| figure | measured | target | |", "|---|---|---|---|", *map(str, figures)]


def epochs_of(run: Path) -> list[pd.DataFrame]:
    """Rows of each level's epochs, of the levels in order."""
    folder = run / "metrics" / "epochwise_metrics"
    files = sorted(folder.glob("level_*_metrics.csv"), key=lambda file: int(file.name.split("_")[1]))
    return [pd.read_csv(file) for file in files]


def median_of(run: Path, column: str) -> float:
    """Median over the epochs of a run but each level's first `WARM_UP`."""
    return float(statistics.median(value for level in epochs_of(run) for value in level[column][WARM_UP:]))


def level_ratio(run: Path, images: int) -> float:
    """Wall time of a level over the time of its training steps: the median over the finished levels but the first.

    Wall time is that between the writing of two levels' checkpoints; `images` are those of an epoch.
    """
    ratios, levels = [], epochs_of(run)
    for level in range(1, len(levels)):
        before, after = (run / "checkpoints" / f"model_level_{number}.pt" for number in (level - 1, level))
        if after.exists():
            steps = float((images / levels[level]["images_per_second"]).sum())
            ratios.append((after.stat().st_mtime - before.stat().st_mtime) / steps)
    return statistics.median(ratios)


def bench_rows(text: str) -> dict[str, dict[str, str]]:
    """{row's label: {column: cell}} of the table that `python -m utils.benchmark` prints."""
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    return {cells[0]: dict(zip(lines[0][1:], cells[1:])) for cells in lines[2:]}


def rate(cell: str) -> float:
    """The median that a cell begins with: "1,234 (1,200-1,300)"."""
    return float(cell.split()[0].replace(",", ""))
