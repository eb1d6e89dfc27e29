"""``drop``: accuracy right after pruning, before training."""

import argparse

from utils.analysis.command import Command, Result, level_numbers, runs_arguments, selected

TEXT = """\
Test accuracy right after pruning, before rewinding and training: how much of what the network
could do hangs on the weights that a level prunes (Han et al. 2015, "Learning both Weights and
Connections for Efficient Neural Networks", figure 5: pruning with and without retraining). Each
run records it in summary.csv:

  pruned_test_acc  of level k: accuracy of the weights and BatchNorm statistics that end level
                   k - 1, under the masks of level k. Of level 0: of the network that the run
                   begins with, after pruning at initialization if there is any: the accuracy
                   of chance, but that of the ticket where a run began with one
                   (ticket_params); a note says so.
  before           final_test_acc of level k - 1; level 0 has none
  drop             before - pruned_test_acc, in percentage points
  recovered        final_test_acc of level k - pruned_test_acc; level 0, which prunes no trained
                   network, has none

--figure: accuracy against density, right after pruning and after training, two lines per
recipe (mean and range over runs that differ only in their seeds)."""

SCREEN = {
    "run": "run", "level": "level", "density": "density", "before": "before", "pruned_test_acc": "pruned",
    "drop": "drop", "final_test_acc": "trained", "recovered": "recovered",
}  # fmt: skip


def _run(args: argparse.Namespace) -> Result:
    asked = level_numbers(args)
    import pandas as pd

    from utils.analysis.figures import draw_drop
    from utils.analysis.recipes import recipes, with_recipes
    from utils.analysis.sources import common_levels, find_runs_only, notes_on_levels, notes_on_tickets
    from utils.errors import RunError
    from utils.runs.saved import read_summary
    from utils.runs.tables import PRUNED_ACCURACY

    sources = find_runs_only(args.sources)
    levels = common_levels(sources, asked)
    known = recipes(sources) if args.figure else {}
    parts = []
    for source in sources:
        summary = read_summary(source.path)
        if PRUNED_ACCURACY not in summary or summary[PRUNED_ACCURACY].isna().all():
            raise RunError(f"{source.path}: summary.csv has no {PRUNED_ACCURACY}: an older version of the harness ran")
        rows = summary[["level", "density", PRUNED_ACCURACY, "final_test_acc"]].copy()
        rows.insert(0, "run", source.name)
        rows["before"] = rows["final_test_acc"].shift()
        rows["drop"] = rows["before"] - rows[PRUNED_ACCURACY]
        rows["recovered"] = (rows["final_test_acc"] - rows[PRUNED_ACCURACY]).where(rows["level"] > 0)
        parts.append(rows[rows["level"].isin(levels)])
    notes = notes_on_levels(sources, levels, asked) + notes_on_tickets(sources)
    frame = pd.concat(parts, ignore_index=True)
    return Result(frame, selected(frame, SCREEN), lambda: draw_drop(with_recipes(frame, known)), notes)


COMMAND = Command("accuracy right after pruning, before training", TEXT, runs_arguments, _run)
