"""The values of a grid file, as utils/grids/grid.py asks for them; what is wrong with them is collected."""

import itertools
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

GRID_KEYS = ("config", "base_dir", "jobs", "threads", "gpus", "seeds", "set", "runs")
# What the grid itself decides of each run, and by what.
OWN = {
    "experiment_params.seed": "seeds in the grid file",
    "experiment_params.base_dir": "base_dir in the grid file, or --base_dir",
    "experiment_params.expt_name": "the names in runs",
    "experiment_params.resume_expt_name": "a run that has begun is resumed",
    "experiment_params.resume_level": "a run goes on where it stands",
}


@dataclass
class GridReader:
    """Collects the faults of a grid file, so that all are told at once."""

    faults: list[str] = field(default_factory=list)

    def integer(self, values: Mapping[str, Any], key: str, default: int, least: int) -> int:
        text = values.get(key, default)
        if str(text).isascii() and str(text).isdigit() and int(text) >= least:
            return int(text)
        self.faults.append(f"{key}: {text!r} is not allowed: a whole number >= {least}")
        return default

    def integers(self, values: Mapping[str, Any], key: str, default: list) -> tuple[int, ...]:
        entries = values.get(key, default)
        entries = entries if isinstance(entries, list) else [entries]
        if len({str(entry) for entry in entries}) != len(entries):
            self.faults.append(f"{key}: {entries!r} holds a number twice")
        return tuple(self.integer({key: entry}, key, 0, 0) for entry in entries)

    def devices(self, values: Mapping[str, Any], key: str) -> tuple[str, ...]:
        """What CUDA_VISIBLE_DEVICES is to say for each GPU; where it says something, they are counted in its list."""
        indices, inherited = self.integers(values, key, []), os.environ.get("CUDA_VISIBLE_DEVICES")
        if inherited is None:
            return tuple(map(str, indices))
        # CUDA reads up to the first that is no device; -1 is the usual way to hide the rest.
        names = list(itertools.takewhile(lambda name: name and name != "-1", map(str.strip, inherited.split(","))))
        beyond = [index for index in indices if index >= len(names)]
        told = f"is not allowed: CUDA_VISIBLE_DEVICES={inherited} has {len(names)} devices"
        self.faults += [f"{key}: {index} {told}" for index in beyond]
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
        """{section.key: text as after ``--section.key=``}."""
        found = {}
        for key, value in values.items():
            if isinstance(value, dict):
                keys = ", ".join(f"{key}.{inner}" for inner in list(value)[:2])
                self.faults.append(f"{where}: {key}: options are written with a dot, as in {keys or key + '.KEY'}")
            elif key in OWN:
                self.faults.append(f"{where}: {key}: the grid itself sets it: {OWN[key]}")
            else:
                found[key] = _text(value)
        return found


def _text(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(_text(entry) for entry in value)
    return "null" if value is None else str(value)
