"""What a grid file asks for: read, checked as a whole, and laid out as runs. utils/run_grid.py runs them."""

import csv
import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness_params import Config, ConfigError, Note, load_config, unused_alone
from utils.config.checkers import nearest
from utils.config.sources import read_yaml
from utils.grids.reader import GRID_KEYS, GridReader

LONGEST_GRID = 100_000  # runs; more is a slip in a product of lists


@dataclass(frozen=True)
class Progress:
    """How far a run is, from its CSVs.

    Attributes:
        levels: finished ones.
        epochs: trained so far, over all levels.
        density, accuracy: of the last finished epoch's level, as far as told: fraction, percent.
    """

    levels: int = 0
    epochs: int = 0
    density: float | None = None
    accuracy: float | None = None


@dataclass(frozen=True)
class Job:
    """One run of a grid.

    Attributes:
        words: after ``harness.py``.
        cfg: what they come to, checked.
        processes: that it starts.
    """

    name: str
    words: tuple[str, ...]
    cfg: Config
    processes: int = 1

    @property
    def path(self) -> Path:
        return Path(self.cfg.experiment_params.base_dir) / self.name

    @property
    def begun(self) -> bool:
        return begun(self.path)

    @property
    def notes(self) -> list[Note]:
        """The notes that harness.py will print, most of them on options without effect."""
        return [*self.cfg.notes, *(unused_alone(self.cfg) if self.processes == 1 else [])]

    @property
    def epochs(self) -> int:
        """All epochs that the run trains."""
        e, p = self.cfg.experiment_params, self.cfg.prune_params
        later = e.epochs_per_level - (p.rewind_epoch if e.training_type == "wr" else 0)
        return e.epochs_per_level + (p.num_levels - 1) * later

    def progress(self) -> Progress:
        """What the run's CSVs tell; zeros when there are none yet."""
        levels = _rows(self.path / "metrics" / "summary.csv")
        table = self.path / "metrics" / "epochwise_metrics" / f"level_{len(levels)}_metrics.csv"
        current = _rows(table) if len(levels) < self.cfg.prune_params.num_levels else []
        last = levels[-1] if levels else {}
        accuracy = current[-1]["test_acc"] if current else last.get("final_test_acc")
        return Progress(
            len(levels),
            sum(int(row["epochs"]) for row in levels) + len(current),
            float(last["density"]) if last else None,
            None if accuracy is None else float(accuracy),
        )

    @property
    def finished(self) -> bool:
        return self.progress().levels >= self.cfg.prune_params.num_levels


def begun(path: Path) -> bool:
    """Whether a run can be resumed there: its directory is made before its config is, and the disk may be full."""
    return (path / "expt_config.yaml").exists()


def _rows(path: Path) -> list[dict[str, str]]:
    try:
        with open(path, newline="") as file:  # renamed into place whole: never half a row
            return list(csv.DictReader(file))
    except FileNotFoundError:
        return []


@dataclass(frozen=True)
class Grid:
    """A grid file's runs, in the order they start: all of the first seed, then all of the second, ...

    Attributes:
        jobs: the runs.
        parallel: how many run at a time.
        threads: of each run, all its processes together; 0 = a share of the cores.
        gpus: given to the parallel places in turn, as CUDA_VISIBLE_DEVICES names them; empty = all runs see all.
    """

    jobs: tuple[Job, ...]
    parallel: int = 1
    threads: int = 0
    gpus: tuple[str, ...] = ()


def read_grid(path: str, overrides: Mapping[str, str] | None = None) -> Grid:
    """Reads a grid file and checks the config of every run in it (see utils/run_grid.py for the format).

    Args:
        overrides: {grid key or section.key: text}, from the command line; they win over the file, but may not change
            what a run sets itself.

    Raises:
        ConfigError: naming every fault of the file and of all its runs; nothing has been started or created.
    """
    try:
        values, faults = read_yaml(path)
    except ConfigError as error:
        raise ConfigError([_named(path, text) for text in error.faults]) from None
    reader = GridReader([_named(path, text) for text in faults])
    given = dict(overrides or {})
    values |= {key: value for key, value in given.items() if key in GRID_KEYS}
    overrides = reader.options({key: value for key, value in given.items() if key not in GRID_KEYS}, "command line")
    for key in values.keys() - set(GRID_KEYS):
        near = nearest(key, GRID_KEYS)
        hint = f"did you mean {near}?" if near else f"one of {', '.join(GRID_KEYS)}"
        reader.faults.append(f"{key}: unknown key of a grid: {hint}")
    seeds = reader.integers(values, "seeds", [0])
    if not seeds:
        reader.faults.append("seeds: at least one is expected")
    common = reader.options(reader.mapping(values, "set"), "set")
    base_dir = str(values.get("base_dir") or "./experiments")
    threads, gpus = reader.integer(values, "threads", 0, 0), reader.devices(values, "gpus")
    parallel = reader.integer(values, "jobs", max(1, len(gpus)), 1)
    if parallel < len(gpus):
        reader.faults.append(f"jobs: {parallel} leaves some of {len(gpus)} gpus unused; at least {len(gpus)}")
    if "threads" in given:  # on the command line, which wins over the file
        common.pop("dist_params.threads", None)
    entries = _entries(values, reader)
    reader.faults += _faults_of_overrides(overrides, entries)
    if not reader.faults and len(entries) * len(seeds) > LONGEST_GRID:
        reader.faults.append(f"runs: {len(entries) * len(seeds)} runs; at most {LONGEST_GRID}")
    jobs = []
    for seed in seeds if not reader.faults else ():
        for name, config, options in entries:
            fixed = {"experiment_params.base_dir": base_dir, "experiment_params.seed": str(seed)}
            chosen = {**common, **overrides, **options, **fixed}
            job = _job(f"{name}_seed{seed}", config, chosen, threads, bool(gpus), reader)
            jobs += [job] if job else []
    if reader.faults:
        raise ConfigError(list(dict.fromkeys(reader.faults)))
    return Grid(tuple(jobs), parallel, threads, gpus)


def _named(path: str, text: str) -> str:
    return text.removeprefix("--config ").replace(
        "sections such as `optimizer:` with options below them are expected", "config, seeds, runs, ... are expected"
    )


def _entries(values: Mapping[str, Any], reader: GridReader) -> list[tuple[str, str, dict[str, str]]]:
    """(name, config file, {section.key: text}) of each run, without seeds."""
    entries: list[tuple[str, str, dict[str, str]]] = []
    runs = reader.mapping(values, "runs")
    if not runs:
        reader.faults.append("runs: at least one run is expected: {NAME: {section.key: value, ...}, ...}")
    for name in runs:
        run, where = dict(reader.mapping(runs, name, "runs: ")), f"run {name}"
        config = run.pop("config", values.get("config"))
        if not isinstance(config, str) or not config:
            reader.faults.append(f"{where}: config: the path of a YAML file is expected, here or for the whole grid")
            continue
        each = reader.mapping(run, "each", f"{where}: ")
        run.pop("each", None)
        options = reader.options(run, where)
        lists = {key: value if isinstance(value, list) else [value] for key, value in each.items()}
        reader.faults += [f"{where}: each: {key}: at least one value is expected" for key in lists if not lists[key]]
        reader.faults += [f"{where}: {key}: given twice, also in each" for key in lists.keys() & options.keys()]
        for choice in itertools.product(*lists.values()):
            chosen = reader.options(dict(zip(lists, choice)), f"{where}: each")
            entries.append(("_".join([name, *chosen.values()]), config, {**options, **chosen}))
    names = [name for name, _, _ in entries]
    twice = sorted({name for name in names if names.count(name) > 1})
    reader.faults += [f"run {name}: two runs have this name" for name in twice]
    return entries


def _faults_of_overrides(overrides: Mapping[str, str], entries: Sequence[tuple[str, str, dict[str, str]]]) -> list[str]:
    """The options of the command line that runs set themselves: the names of those runs would no longer be true."""
    faults = []
    for key in overrides:
        names = [name for name, _, options in entries if key in options]
        if names:
            others = f" and {len(names) - 1} more" if len(names) > 1 else ""
            faults.append(f"command line: {key}: set by run {names[0]}{others}; change it in the grid file")
    return faults


def _job(
    name: str, config: str, options: Mapping[str, str], threads: int, one_gpu: bool, reader: GridReader
) -> Job | None:
    """The run, checked as harness.py will check it; None with its faults told to `reader`.

    Args:
        threads: shared out to its processes, unless its options say how many each takes; 0 = left to the harness.
        one_gpu: whether it will see one GPU alone.
    """
    # They pull in torch, which `--help` and a misspelt grid don't need.
    from utils.distributed import default_nproc
    from utils.runs.directory import check_run_directory

    words = ["--config", config, *(f"--{key}={value}" for key, value in options.items())]
    try:
        resumed = begun(Path(options["experiment_params.base_dir"]).expanduser() / name)
        words.append(f"--experiment_params.{'resume_expt_name' if resumed else 'expt_name'}={name}")
        cfg = load_config(words)
        d = cfg.dist_params
        processes = (d.nproc or (1 if one_gpu else default_nproc(0))) if d.distributed else 1
        if threads and "dist_params.threads" not in options:
            # Not left to OMP_NUM_THREADS, of which a small MLP takes no notice.
            words.append(f"--dist_params.threads={max(1, threads // processes)}")
            cfg = load_config(words)
        check_run_directory(cfg)
    except ConfigError as error:
        reader.faults += [f"run {name}: {text}" for text in error.faults]
        return None
    return Job(name, tuple(words), cfg, processes)


def summary(jobs: Sequence[Job]) -> str:
    """One line: how many runs are finished, begun and new."""
    done = sum(job.finished for job in jobs)
    half = sum(job.begun and not job.finished for job in jobs)
    return f"{len(jobs)} runs: {done} finished before, {half} to resume, {len(jobs) - done - half} to start"


def distinct_notes(jobs: Sequence[Job]) -> list[str]:
    """Each note of the runs once, with how many it is of where that is not all: others may use what these do not."""
    counts = Counter(note for job in jobs for note in job.notes)
    return [f"{note}{f' ({n} of {len(jobs)} runs)' if n < len(jobs) else ''}" for note, n in counts.items()]
