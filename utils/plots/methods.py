"""The table of methods: how sparse a network is as good as the dense one, and after how many seconds it is there."""

from collections.abc import Sequence

import pandas as pd

from utils.errors import DataError
from utils.plots.groups import Group
from utils.plots.lines import dense_accuracy, sparsest_shared
from utils.wording import percent_text, places_for

TICKET_DENSITY = 0.1
# Percent. Rounding error of a mean; one image counts 1000 times more.
TIE = 1e-9


def time_to_ticket(
    summary: pd.DataFrame,
    dense_accuracy: float | None = None,
    density: float = TICKET_DENSITY,
    column: str = "final_test_acc",
) -> float | None:
    """Seconds from the run's start to its first network below `density` that is at least as accurate as the dense one.

    Seconds come from summary.csv: training and evaluation of all levels up to that network. The start of the program
    and the time between levels are not included.

    Args:
        summary: of one run, levels in order.
        dense_accuracy: percent; None = that of the run's own level 0, which must be dense.
        column: of `summary`, the accuracy.

    Returns:
        None if no level is such a network.

    Raises:
        DataError: `dense_accuracy` is None and level 0 is not dense.
    """
    if dense_accuracy is None:
        if summary["density"].iloc[0] != 1:
            raise DataError(f"level 0 has density {summary['density'].iloc[0]:g}: it is not a dense network")
        dense_accuracy = summary[column].iloc[0]
    found = (summary["density"] < density) & (summary[column] >= dense_accuracy - TIE)
    if not found.any():
        return None
    return float(summary["seconds"].cumsum()[found].iloc[0])


def method_table(
    groups: Sequence[Group], density: float = TICKET_DENSITY, column: str = "final_test_acc"
) -> pd.DataFrame:
    """One row per method, as text: seeds, dense accuracy, the sparsest network as good as dense, time to ticket.

    Numbers are means over seeds with the standard deviation (n - 1). Where some seeds may have no value, the row says
    how many have one. The lowest density is that of the sparsest network that all seeds have.

    Args:
        density: a ticket is below it.
        column: of the summary, the accuracy.
    """
    return pd.DataFrame([_method_row(group, groups, density, column) for group in groups])


def _method_row(group: Group, groups: Sequence[Group], density: float, column: str) -> dict[str, str | int]:
    dense = dense_accuracy([other for other in groups if other.training == group.training], column)
    runs = [rows for _, rows in group.frame.groupby("run", sort=False)]
    lowest = []  # per seed: the lowest density at which it is as accurate as dense
    for seed, levels in group.frame.groupby("seed"):
        as_good = levels[levels[column] >= dense.get(seed, float("inf")) - TIE]
        lowest.append(as_good["density"].min())
    times = []
    for rows in runs:
        accuracy = dense.get(rows["seed"].iloc[0])
        times.append(None if accuracy is None else time_to_ticket(rows, accuracy, density, column))
    matched = 100 * pd.Series(lowest, dtype=float).dropna()
    last = sparsest_shared(group)
    reached = pd.Series([seconds for seconds in times if seconds is not None], dtype=float)
    density_spread = _spread(matched, places_for(matched.mean(), 1) if len(matched) else 1)
    candidates = int((group.frame["density"] < density).sum()) if group.one_shot else len(runs)
    return {
        "method": group.label,
        "seeds": group.seeds,
        "dense acc. (%)": _spread(group.frame[group.frame["density"] == 1][column]),
        "lowest density (%)": percent_text(last["density"].mean()) if len(last) else "-",
        "acc. there (%)": _spread(last[column]),
        "lowest density >= dense acc. (%)": f"{density_spread} ({len(matched)} of {len(lowest)})"
        if len(dense)
        else "-",
        "time to ticket (s)": f"{_spread(reached, 0)} ({len(reached)} of {candidates} runs)" if len(dense) else "-",
        "total (s)": _spread(pd.Series([rows["seconds"].sum() for rows in runs]), 0),
    }


def _spread(values: pd.Series, digits: int = 2) -> str:
    """'mean ± deviation', 'mean' for a single value, '-' for none."""
    if not len(values):
        return "-"
    return f"{values.mean():.{digits}f}" + (f" ± {values.std():.{digits}f}" if len(values) > 1 else "")


def dense_notes(groups: Sequence[Group]) -> list[str]:
    """Whose dense networks stand in for those that methods lack: pruned once, or tickets of other runs."""
    lacking: dict[str, list[str]] = {}
    for group in groups:
        if group.shows_dense and (group.frame["density"] == 1).any():
            continue
        alike = [other for other in groups if other.training == group.training]
        owners = [other.label for other in alike if other.shows_dense and (other.frame["density"] == 1).any()]
        if owners:
            note = f"compared with the dense networks of {', '.join(owners)}, by seed"
        elif len(dense_accuracy(alike)):
            note = "compared with tickets at density 1: no other dense network is there"
        else:
            note = "no dense network to compare with"
        lacking.setdefault(note, []).append(group.label)
    return [f"{'; '.join(labels)}: {note}" for note, labels in lacking.items()]
