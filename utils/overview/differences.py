"""The options in which two saved runs differ."""

from pathlib import Path

from harness_params import SCHEMA
from utils.config.effects import without_effect
from utils.config.sources import as_text
from utils.runs.records import settled_options
from utils.runs.saved import saved_config

NAMES = {"experiment_params.expt_name", "experiment_params.resume_expt_name", "experiment_params.resume_level"}


def differences(a: Path, b: Path) -> list[tuple[str, str, str]]:
    """(section.key, value in a, value in b) of each option that differs, the runs' names left out.

    A value of auto tells what it came to when the run began; an option without effect in its run says so.

    Raises:
        DataError: the config of a run is missing or damaged.
    """
    first, second = _values(a), _values(b)
    return [(path, _told(*first[path]), _told(*second[path])) for path in first if first[path][0] != second[path][0]]


def differences_text(found: list[tuple[str, str, str]], names: tuple[str, str], width: int) -> str:
    """The differences as a table; where it would be wider than `width`, each option above its two values."""
    lines = [("option", *names), *found]
    sizes = [max(len(line[n]) for line in lines) for n in range(3)]
    if sum(sizes) + 4 <= width:
        return "\n".join("  ".join(cell.ljust(size) for cell, size in zip(line, sizes)).rstrip() for line in lines)
    label = max(map(len, names))
    return "\n".join(
        "\n".join([path, *(f"  {name.ljust(label)}  {value}" for name, value in zip(names, values))])
        for path, *values in found
    )


def _told(value: str, unused: bool) -> str:
    return f"{value} (no effect)" if unused else value


def _values(run: Path) -> dict[str, tuple[str, bool]]:
    """{section.key: (value as text, whether it has no effect)} of a run."""
    cfg, settled = saved_config(run), settled_options(run)
    unused = {path for path, _ in without_effect(cfg, SCHEMA)}
    values: dict[str, tuple[str, bool]] = {}
    for path in SCHEMA.paths(lambda option: True):
        text = as_text(cfg.value(path)) or '""'
        text += f" ({settled[path]})" if text == "auto" and path in settled else ""
        values[path] = (text, path in unused)
    return {path: value for path, value in values.items() if path not in NAMES}
