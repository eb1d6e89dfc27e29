"""A grid as commands, one per run, for those who start the runs themselves."""

import os
import shlex

from utils.grids.grid import Grid, share_text
from utils.grids.grid_run import GridRun
from utils.grids.process import HARNESS


def listing(grid: Grid) -> str:
    """One command per unfinished run, ready to paste; comments tell which run must be finished before another.

    Sources come before the runs that start from them, else runs are in the order of the grid.
    """
    lines = [f"# {share_text(grid)}"]
    for run in in_order(grid.runs):
        if run.finished:
            lines.append(f"# {run.name}: finished")
            continue
        if run.after:
            lines.append(f"# {run.name} starts from {run.after}: once that is finished")
        lines.append(command(run))
    return "\n".join(lines)


def command(run: GridRun) -> str:
    """The shell command that starts or resumes a run, from the current directory."""
    script = os.path.relpath(HARNESS)
    return shlex.join(["python", str(HARNESS) if script.startswith("..") else script, *run.words])


def in_order(runs: tuple[GridRun, ...]) -> list[GridRun]:
    """The runs, each after the one that it waits for. (`checked_on_disk` has refused circles.)"""
    placed: dict[str, GridRun] = {}
    by_name = {run.name: run for run in runs}

    def place(run: GridRun) -> None:
        if run.name not in placed:
            if run.after:
                place(by_name[run.after])
            placed[run.name] = run

    for run in runs:
        place(run)
    return list(placed.values())
