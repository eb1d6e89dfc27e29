"""The tables of a report: runs, the options in which they differ, and what they ran on."""

from collections.abc import Sequence
from typing import Any

import pandas as pd

from harness_params import SCHEMA, Config
from utils.config.options import Role, show
from utils.reports.study import Study
from utils.runs.records import saved_starts
from utils.wording import percent_text

# Of an entry of environment.json: told start by start, or elsewhere in the report.
NO_FACTS = {"started", "command", "folder", "ticket"}
PLACES = SCHEMA.paths(lambda option: option.role is Role.PLACE)  # they differ, and mean nothing


def runs_table(study: Study) -> pd.DataFrame:
    """One row per run: its method and seed, how far it is, its last level."""
    labels = {path: group.label for group in study.methods for path in group.frame["run"].unique()}
    rows = []
    for run in study.runs:
        last = run.summary.iloc[-1]
        rows.append({
            "run": study.names[run.path],
            "method": labels[str(run.path)],
            "seed": str(run.seed),
            "levels": f"{len(run.summary)} of {run.planned}",
            "last density (%)": percent_text(last["density"], digits=4),
            "accuracy there (%)": f"{last[study.column]:.2f}",
            "seconds": f"{run.summary['seconds'].sum():.0f}",
            "folder": str(run.path),
        })  # fmt: skip
    return pd.DataFrame(rows)


# --- options ---------------------------------------------------------------------------------------------------------


def config_tables(study: Study) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """(differing options by method, differing options by run, options that all runs share).

    A cell of the first one has the values of all runs of a method, each once. Options that only say where files and
    processes are, such as the run's name, are in none of them.
    """
    options = {str(run.path): _options(run.cfg) for run in study.runs}
    differing = [path for path in next(iter(options.values())) if len({o[path] for o in options.values()}) > 1]
    by_method: dict[str, Sequence[str]] = {"option": differing}
    for group in study.methods:
        runs = group.frame["run"].unique()
        by_method[group.label] = [", ".join(_in_order({options[run][path] for run in runs})) for path in differing]
    by_run = [
        {"run": study.names[run.path], **{path: options[str(run.path)][path] for path in differing}}
        for run in study.runs
    ]
    first = next(iter(options.values()))
    shared = [{"option": path, "value": value} for path, value in first.items() if path not in differing]
    return pd.DataFrame(by_method), pd.DataFrame(by_run), pd.DataFrame(shared)


def _in_order(values: set[str]) -> list[str]:
    """Numbers by size, words by the alphabet."""
    try:
        return sorted(values, key=float)
    except ValueError:
        return sorted(values)


def _options(cfg: Config) -> dict[str, str]:
    """{section.key: value as text}, without places."""
    flat = {f"{section}.{key}": value for section, keys in cfg.to_dict().items() for key, value in keys.items()}
    return {path: show(value) for path, value in flat.items() if path not in PLACES}


# --- environment -----------------------------------------------------------------------------------------------------


def environment_tables(study: Study) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """(what all starts of all runs share, one row per different environment, one row per run).

    Environments are numbered from 1 in the order in which runs name them. A run that was resumed elsewhere has several.
    """
    starts = {run.path: saved_starts(run.path) for run in study.runs}
    numbers: dict[tuple[tuple[str, str], ...], int] = {}
    used: dict[int, set[str]] = {}
    by_run = []
    for path, entries in starts.items():
        own = list(dict.fromkeys(numbers.setdefault(_facts(entry), len(numbers) + 1) for entry in entries))
        for number in own:
            used.setdefault(number, set()).add(study.names[path])
        by_run.append({
            "run": study.names[path],
            "environment": ", ".join(map(str, own)) or "not noted",
            "starts": str(len(entries)),
            "first start": str(entries[0].get("started", "")) if entries else "",
            "last command": _command(entries[-1].get("command")) if entries else "",
        })  # fmt: skip
    found = [dict(facts) for facts in numbers]
    keys = list(dict.fromkeys(key for facts in found for key in facts))
    shared = [key for key in keys if len({facts.get(key) for facts in found}) == 1]
    rows = [
        {"environment": str(number), "runs": str(len(used[number])),
         **{key: facts.get(key, "") for key in keys if key not in shared}}
        for number, facts in enumerate(found, start=1)
    ]  # fmt: skip
    same = [{"fact": key, "value": found[0][key]} for key in shared]
    return pd.DataFrame(same), pd.DataFrame(rows), pd.DataFrame(by_run)


def _facts(entry: dict[str, Any]) -> tuple[tuple[str, str], ...]:
    return tuple((key.replace("_", " "), show(value)) for key, value in entry.items() if key not in NO_FACTS)


def _command(words: Any) -> str:
    return " ".join(map(str, words)) if isinstance(words, list) else ""
