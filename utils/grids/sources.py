"""Runs of a grid that start from tickets: which run each of them waits for, and shares that keep them together."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from utils.errors import ConfigError
from utils.grids.grid_run import GridRun
from utils.grids.reader import GridReader


def with_sources(runs: Sequence[GridRun], names: Iterable[str]) -> list[GridRun]:
    """The runs, each with the run of the grid that it starts from. The disk is not looked at.

    Args:
        names: of all runs of the grid; those that are missing in `runs` have faults of their own.
    """
    return [replace(run, source=_source_in_grid(run, names)) for run in runs]


def share_of(runs: Sequence[GridRun], number: int, count: int) -> list[GridRun]:
    """Share `number` of `count`, from 1 on: whole chains of sources and their branches, in the order of the grid.

    The shares hold about as many epochs each. They follow from the grid file alone, not from what is finished, so that
    jobs which start at different times agree on them.
    """
    source = {run.name: run.source for run in runs}
    chains: dict[str, list[GridRun]] = {}
    for run in runs:
        chains.setdefault(_first(run.name, source), []).append(run)
    loads = [0] * count
    mine: set[str] = set()
    for chain in sorted(chains.values(), key=lambda chain: -_epochs(chain)):  # the longest first; equal ones in order
        place = loads.index(min(loads))
        loads[place] += _epochs(chain)
        mine |= {run.name for run in chain} if place == number - 1 else set()
    return [run for run in runs if run.name in mine]


def _first(name: str, source: Mapping[str, str]) -> str:
    """The run that a chain begins with; of a circle, which `checked_on_disk` refuses, one and the same."""
    seen: list[str] = []
    while name not in seen:
        seen.append(name)
        if not source.get(name):
            return name
        name = source[name]
    return min(seen[seen.index(name) :])


def _epochs(chain: Sequence[GridRun]) -> int:
    """The most epochs that the runs can have, by their configs alone."""
    return sum(run.cfg.prune_params.num_levels * run.cfg.experiment_params.epochs_per_level for run in chain)


def checked_on_disk(runs: Sequence[GridRun], names: Iterable[str], reader: GridReader) -> list[GridRun]:
    """The runs of `with_sources`, checked as harness.py will check them, each with the run that it waits for.

    Faults go to `reader`.

    Args:
        names: as `with_sources`.
    """
    # Not at the top: it imports torch, which `--help` and a misspelt grid do not need.
    from utils.runs.directory import check_run_directory
    from utils.runs.ticket_source import check_planned_source, reads_source

    by_name, checked = {run.name: run for run in runs}, []
    for run in runs:
        after = run.source
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
