"""Grid files: read, checked as a whole, and laid out as runs. The format is described in utils/run_grid.py."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness_params import load_config
from utils.config.options import show
from utils.config.sources import read_yaml
from utils.errors import ConfigError
from utils.grids.grid_run import GridRun, begun
from utils.grids.reader import GRID_KEYS, GridReader, RunEntry, of_seed
from utils.grids.sources import checked_on_disk, share_of, with_sources

MOST_RUNS = 100_000  # a longer grid is a slip in a product of lists


@dataclass(frozen=True)
class Grid:
    """The runs of a grid file, in starting order: all runs of the first seed, then all of the second, ...

    Attributes:
        runs: the runs.
        parallel: number of runs at a time.
        threads: CPU threads per run, all its processes together; 0 = an equal share of the cores.
        gpus: CUDA_VISIBLE_DEVICES of the parallel slots, in turn; empty = every run sees all GPUs.
        mps: whether runs that share a GPU do so through MPS: auto, on or off.
        share: (I, N) where these are share I of N of the file's runs.
    """

    runs: tuple[GridRun, ...]
    parallel: int = 1
    threads: int = 0
    gpus: tuple[str, ...] = ()
    mps: str = "auto"
    share: tuple[int, int] = (1, 1)


def read_grid(path: str, overrides: Mapping[str, str] | None = None, share: tuple[int, int] = (1, 1)) -> Grid:
    """Read a grid file and check the config of every run in it.

    Args:
        overrides: {grid key or section.key: text} from the command line. They win over the file, but may not change
            an option that a run sets itself.
        share: (I, N) = the runs of share I of N alone (`utils.grids.sources.share_of`). The configs of all are checked,
            but only these against the disk, where the others may be at work.

    Raises:
        ConfigError: all faults of the file and of its runs; nothing has been started or created.
    """
    given = dict(overrides or {})
    # The file's own name, without "--config": the grid file is no option here.
    values, faults = read_yaml(path, where=show(path), expected="config, seeds, runs, ... are expected")
    reader = GridReader(faults)
    values |= {key: value for key, value in given.items() if key in GRID_KEYS}
    reader.check_keys(values)
    overrides = reader.options({key: value for key, value in given.items() if key not in GRID_KEYS}, "command line")
    seeds = reader.integers(values, "seeds", [0])
    if not seeds:
        reader.faults.append("seeds: at least one is expected")
    common = reader.options(reader.mapping(values, "set"), "set")
    if "threads" in given:  # on the command line, which wins over the file
        common.pop("dist_params.threads", None)
    parallel, threads, gpus, mps = _resources(values, reader)
    entries = reader.entries(values)
    reader.faults += _faults_of_overrides(overrides, entries)
    if not reader.faults and len(entries) * len(seeds) > MOST_RUNS:
        reader.faults.append(f"runs: {len(entries) * len(seeds)} runs; at most {MOST_RUNS}")
    base_dir = str(values.get("base_dir") or "./experiments")
    named = [
        of_seed(entry, seed, base_dir, common | overrides)
        for seed in (seeds if not reader.faults else ())
        for entry in entries
    ]
    return Grid(checked_runs(named, threads, bool(gpus), reader, share), parallel, threads, gpus, mps, share)


def checked_runs(
    entries: Sequence[RunEntry],
    threads: int = 0,
    one_gpu: bool = False,
    reader: GridReader | None = None,
    share: tuple[int, int] = (1, 1),
) -> tuple[GridRun, ...]:
    """The runs of a grid, each of them checked as harness.py will check it.

    Args:
        entries: runs with their final names and all of their options, base_dir and seed included.
        threads, one_gpu: see `_checked_run`.
        reader: has the faults that were found so far.
        share: see `read_grid`.

    Raises:
        ConfigError: all faults; nothing has been started or created.
    """
    reader = reader or GridReader()
    checked = [_checked_run(entry, threads, one_gpu, reader) for entry in entries]
    names = {entry.name for entry in entries}
    runs = share_of(with_sources([run for run in checked if run], names), *share)
    runs = checked_on_disk(runs, names, reader)
    if reader.faults:
        raise ConfigError(list(dict.fromkeys(reader.faults)))
    return tuple(runs)


def runs_per_gpu(parallel: int, gpus: Sequence[str]) -> int:
    """Number of runs that share a GPU, of `parallel` at a time; without `gpus` each run sees, and may use, all GPUs."""
    return -(-parallel // max(1, len(gpus)))


def _resources(values: Mapping[str, Any], reader: GridReader) -> tuple[int, int, tuple[str, ...], str]:
    """(runs at a time, threads per run, GPUs, whether through MPS)."""
    threads, gpus = reader.integer(values, "threads", 0, 0), reader.devices(values, "gpus")
    parallel = reader.integer(values, "jobs", max(1, len(gpus)), 1)
    if parallel < len(gpus):
        reader.faults.append(f"jobs: {parallel} leaves some of {len(gpus)} gpus unused; at least {len(gpus)}")
    mps = reader.choice(values, "mps", ("auto", "on", "off"))
    if mps == "on" and runs_per_gpu(parallel, gpus) < 2:
        reader.faults.append(f"mps: on is not allowed: no GPU is shared by runs (jobs: {parallel}, {len(gpus)} gpus)")
    return parallel, threads, gpus, mps


def _faults_of_overrides(overrides: Mapping[str, str], entries: Sequence[RunEntry]) -> list[str]:
    """Faults of options on the command line that runs set themselves: the names of those runs would become wrong."""
    faults = []
    for key in overrides:
        names = [entry.name for entry in entries if key in entry.options]
        if names:
            others = f" and {len(names) - 1} more" if len(names) > 1 else ""
            faults.append(f"command line: {key}: set by run {names[0]}{others}; change it in the grid file")
    return faults


def _checked_run(entry: RunEntry, threads: int, one_gpu: bool, reader: GridReader) -> GridRun | None:
    """The run, its options checked as harness.py will check them; None if they have faults, which go to `reader`.

    Args:
        threads: divided among the run's processes, unless its options set dist_params.threads; 0 = left to the harness.
        one_gpu: whether the run will see exactly one GPU.
    """
    from utils.distributed import default_nproc  # not at the top: torch, which `--help` and a misspelt grid do not need

    words = ["--config", entry.config, *(f"--{key}={value}" for key, value in entry.options.items())]
    try:
        resumed = begun(Path(entry.options["experiment_params.base_dir"]).expanduser() / entry.name)
        words.append(f"--experiment_params.{'resume_expt_name' if resumed else 'expt_name'}={entry.name}")
        cfg = load_config(words)
        d = cfg.dist_params
        processes = (d.nproc or (1 if one_gpu else default_nproc(0))) if d.distributed else 1
        if threads and "dist_params.threads" not in entry.options:
            # As an option, because a small MLP ignores OMP_NUM_THREADS.
            words.append(f"--dist_params.threads={max(1, threads // processes)}")
            cfg = load_config(words)
    except ConfigError as error:
        reader.faults += [f"run {entry.name}: {fault}" for fault in error.faults]
        return None
    return GridRun(entry.name, tuple(words), cfg, processes)


def share_text(grid: Grid) -> str:
    """The line that a grid begins with: its share, if it has one, and `summary`."""
    number, count = grid.share
    share = f"share {number}/{count}: " if count > 1 else ""
    return share + (summary(grid.runs) if grid.runs else "no run: there are fewer chains of runs than shares")


def summary(runs: Sequence[GridRun]) -> str:
    """One line: how many runs are finished, to resume and to start."""
    done = sum(run.finished for run in runs)
    half = sum(run.begun and not run.finished for run in runs)
    return f"{len(runs)} runs: {done} finished before, {half} to resume, {len(runs) - done - half} to start"


def distinct_notes(runs: Sequence[GridRun]) -> list[str]:
    """Each note of the runs once; a note that only some runs have ends with their number."""
    counts = Counter(note for run in runs for note in run.notes)
    return [f"{note}{f' ({n} of {len(runs)} runs)' if n < len(runs) else ''}" for note, n in counts.items()]
