"""``signs``: how many kept weights have the sign that they had at initialization."""

import argparse

from utils.analysis.command import Command, Result, level_numbers, progress, run_arguments, selected, shown_rows

TEXT = """\
How many of a level's kept weights still have the sign that they had when training began: per level,
for the whole network and for each layer. Zhou et al. 2019 ("Deconstructing Lottery Tickets") find
that the signs are what a ticket needs of its initial weights; Gadhikar & Burkholz 2024 ("Masks,
Signs, And Learning Rate Rewinding") compare how ways of rewinding change signs.

  share_init    |{i kept: sign(w_i at initialization) = sign(w_i at the end of the level)}| / kept,
                from model_init.pt and model_level_{k}.pt, over the weights that level k keeps
  share_rewind  the same with the weights at the rewind point (model_rewind.pt), where a run has one
  same_init, same_rewind  the numbers of such weights

Signs that are independent of those at initialization would give 0.5. With training_type imp or wr
each level starts at those very weights again, so the share says how many signs this level has kept;
with lrr, how many are left after all levels so far.

The table has the whole network at each level; the layers, too, of a single level. --out has all.
--figure: share_init by layer, a line per level."""

SCREEN = {
    "level": "level", "layer": "layer", "density": "density", "kept": "kept",
    "share_init": "as at init.", "share_rewind": "as at rewind",
}  # fmt: skip


def _run(args: argparse.Namespace) -> Result:
    asked = level_numbers(args)
    from pathlib import Path

    import pandas as pd

    from utils.analysis.figures import draw_signs
    from utils.analysis.overlap import WHOLE
    from utils.analysis.signs import sign_rows
    from utils.analysis.sources import common_levels, one_run
    from utils.runs.loading import masks_in, read_state

    source = one_run(args.run)
    levels = common_levels([source], asked)
    folder = Path(args.run) / "checkpoints"
    earlier = {"init": read_state(folder / "model_init.pt")}
    if (folder / "model_rewind.pt").exists():
        earlier["rewind"] = read_state(folder / "model_rewind.pt")
    rows = []
    for level in progress(levels, len(levels), "levels"):
        state = source.state(level)
        for row in sign_rows(masks_in(state, str(source.file(level))), state, earlier):
            rows.append({"level": level, **row, "density": row["kept"] / row["total"]})
    frame = pd.DataFrame(rows)
    columns = {column: name for column, name in SCREEN.items() if column in frame}
    screen = selected(shown_rows(frame, ["level"], WHOLE), columns)
    return Result(frame, screen, lambda: draw_signs(frame))


COMMAND = Command("signs of kept weights at initialization and at the end", TEXT, run_arguments, _run)
