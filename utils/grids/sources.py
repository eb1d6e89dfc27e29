"""Runs of a grid that start from tickets: which run each of them waits for."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from utils.errors import ConfigError
from utils.grids.grid_run import GridRun
from utils.grids.reader import GridReader


def with_sources(runs: Sequence[GridRun], names: Iterable[str], reader: GridReader) -> list[GridRun]:
    """The runs, each with the run of the grid that it waits for, checked against the disk as harness.py will check it.

    Faults go to `reader`.

    Args:
        names: of all runs of the grid; those that are missing in `runs` have faults of their own.
    """
    # Not at the top: it imports torch, which `--help` and a misspelt grid do not need.
    from utils.runs.directory import check_run_directory
    from utils.runs.ticket_source import check_planned_source, reads_source

    by_name, checked = {run.name: run for run in runs}, []
    for run in runs:
        after = _source_in_grid(run, names)
        if after in names and after not in by_name:
            continue
        waits = bool(after) and not by_name[after].finished and reads_source(run.cfg)
        try:
            check_run_directory(run.cfg, source_exists=not waits)
            if waits:
                check_planned_source(run.cfg, by_name[after].path, by_name[after].cfg)
        except ConfigError as error:
            reader.faults += [f"run {run.name}: {fault}" for fault in error.faults]
            continue
        checked.append(replace(run, after=after if waits else ""))
    reader.faults += [
        f"run {name}: its source starts, through other runs, from the run itself" for name in _circles(checked)
    ]
    return checked


def _source_in_grid(run: GridRun, names: Iterable[str]) -> str:
    """Name of the grid's run that this one starts from; "" if there is none."""
    source = run.cfg.ticket_params.source
    if not source:
        return ""
    if source in names:
        return source
    path, folder = Path(source).resolve(), run.path.parent.resolve()
    return path.name if path.parent == folder and path.name in names else ""


def _circles(runs: Sequence[GridRun]) -> list[str]:
    """Names of the runs that would wait for themselves."""
    after = {run.name: run.after for run in runs}
    found = []
    for name in after:
        seen, place = {name}, after[name]
        while place and place not in seen:
            seen.add(place)
            place = after.get(place, "")
        if place == name:
            found.append(name)
    return found
