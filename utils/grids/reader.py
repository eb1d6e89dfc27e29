"""Values of a grid file: read one by one for utils/grids/grid.py, with all faults collected."""

import itertools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from utils.config.checkers import nearest
from utils.config.sources import as_text

GRID_KEYS = ("config", "base_dir", "jobs", "threads", "gpus", "mps", "seeds", "set", "runs")
# Options that the grid sets for each run, and where they come from.
SET_BY_GRID = {
    "experiment_params.seed": "seeds in the grid file",
    "experiment_params.base_dir": "base_dir in the grid file, or --base_dir",
    "experiment_params.expt_name": "the names in runs",
    "experiment_params.resume_expt_name": "a run that has begun is resumed",
    "experiment_params.resume_level": "a run goes on where it stands",
}


@dataclass(frozen=True)
class RunEntry:
    """One run of a grid file, not yet checked.

    Attributes:
        name: of the run, without its seed.
        config: path of its config file.
        options: {section.key: text} on top of the config file.
    """

    name: str
    config: str
    options: dict[str, str]


SEED = "{seed}"  # in an option of a run: the run's seed


def of_seed(entry: RunEntry, seed: int, base_dir: str, common: Mapping[str, str]) -> RunEntry:
    """The run of one seed, named for it, with `common` options below its own."""
    fixed = {"experiment_params.base_dir": base_dir, "experiment_params.seed": str(seed)}
    options = {key: text.replace(SEED, str(seed)) for key, text in {**common, **entry.options}.items()}
    return RunEntry(f"{entry.name.replace(SEED, str(seed))}_seed{seed}", entry.config, options | fixed)


@dataclass
class GridReader:
    """Reads the values of a grid file; collects their faults, so that all are printed at once."""

    faults: list[str] = field(default_factory=list)

    def check_keys(self, values: Mapping[str, Any]) -> None:
        for key in values.keys() - set(GRID_KEYS):
            near = nearest(key, GRID_KEYS)
            hint = f"did you mean {near}?" if near else f"one of {', '.join(GRID_KEYS)}"
            self.faults.append(f"{key}: unknown key of a grid: {hint}")

    def integer(self, values: Mapping[str, Any], key: str, default: int, least: int) -> int:
        text = values.get(key, default)
        if str(text).isascii() and str(text).isdigit() and int(text) >= least:
            return int(text)
        self.faults.append(f"{key}: {text!r} is not allowed: a whole number >= {least}")
        return default

    def choice(self, values: Mapping[str, Any], key: str, allowed: Sequence[str]) -> str:
        """One of `allowed`, whose first one is the default."""
        text = values.get(key, allowed[0])
        if text in allowed:
            return str(text)
        self.faults.append(f"{key}: {text!r} is not allowed: one of {', '.join(allowed)}")
        return allowed[0]

    def integers(self, values: Mapping[str, Any], key: str, default: list) -> tuple[int, ...]:
        entries = values.get(key, default)
        entries = entries if isinstance(entries, list) else [entries]
        if len({str(entry) for entry in entries}) != len(entries):
            self.faults.append(f"{key}: {entries!r} holds a number twice")
        return tuple(self.integer({key: entry}, key, 0, 0) for entry in entries)

    def devices(self, values: Mapping[str, Any], key: str) -> tuple[str, ...]:
        """CUDA_VISIBLE_DEVICES for each GPU. If that variable is set already, indices count within its list."""
        indices, inherited = self.integers(values, key, []), os.environ.get("CUDA_VISIBLE_DEVICES")
        if inherited is None:
            return tuple(map(str, indices))
        # CUDA reads up to the first invalid device; -1 is the usual way to hide the rest.
        names = list(itertools.takewhile(lambda name: name and name != "-1", map(str.strip, inherited.split(","))))
        beyond = [index for index in indices if index >= len(names)]
        reason = f"CUDA_VISIBLE_DEVICES={inherited} has {len(names)} devices"
        self.faults += [f"{key}: {index} is not allowed: {reason}" for index in beyond]
        return () if beyond else tuple(names[index] for index in indices)

    def mapping(self, values: Mapping[str, Any], key: str, where: str = "") -> dict[str, Any]:
        found = values.get(key)
        if found is None:
            return {}
        if not isinstance(found, dict):
            self.faults.append(f"{where}{key}: {found!r} is not allowed: a mapping is expected")
            return {}
        return found

    def options(self, values: Mapping[str, Any], where: str) -> dict[str, str]:
        """{section.key: text, as written after ``--section.key=``}."""
        found = {}
        for key, value in values.items():
            if isinstance(value, dict):
                keys = ", ".join(f"{key}.{inner}" for inner in list(value)[:2])
                self.faults.append(f"{where}: {key}: options are written with a dot, as in {keys or key + '.KEY'}")
            elif key in SET_BY_GRID:
                self.faults.append(f"{where}: {key}: the grid itself sets it: {SET_BY_GRID[key]}")
            else:
                found[key] = as_text(value)
        return found

    def entries(self, values: Mapping[str, Any]) -> list[RunEntry]:
        """The runs of the grid, without seeds."""
        entries: list[RunEntry] = []
        runs = self.mapping(values, "runs")
        if not runs:
            self.faults.append("runs: at least one run is expected: {NAME: {section.key: value, ...}, ...}")
        for name in runs:
            run, where = dict(self.mapping(runs, name, "runs: ")), f"run {name}"
            config = run.pop("config", values.get("config"))
            if not isinstance(config, str) or not config:
                self.faults.append(f"{where}: config: the path of a YAML file is expected, here or for the whole grid")
                continue
            entries += self._variants(name, config, run)
        names = [entry.name for entry in entries]
        twice = sorted({name for name in names if names.count(name) > 1})
        self.faults += [f"run {name}: two runs have this name" for name in twice]
        return entries

    def _variants(self, name: str, config: str, run: dict[str, Any]) -> list[RunEntry]:
        """One entry per combination of the values listed in ``each``."""
        where = f"run {name}"
        each = self.mapping(run, "each", f"{where}: ")
        run.pop("each", None)
        options = self.options(run, where)
        lists = {key: value if isinstance(value, list) else [value] for key, value in each.items()}
        self.faults += [f"{where}: each: {key}: at least one value is expected" for key in lists if not lists[key]]
        self.faults += [f"{where}: {key}: given twice, also in each" for key in lists.keys() & options.keys()]
        variants = []
        for choice in itertools.product(*lists.values()):
            chosen = self.options(dict(zip(lists, choice)), f"{where}: each")
            variants.append(RunEntry("_".join([name, *chosen.values()]), config, {**options, **chosen}))
        return variants
