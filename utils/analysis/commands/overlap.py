"""``overlap``: how many kept weights the masks of runs or checkpoints have in common."""

import argparse

from utils.analysis.command import Command, Result, level_numbers, progress, selected, shown_rows, source_arguments

TEXT = """\
How many kept weights two masks A and B have in common: per level, for the whole network and for
each layer. A, B, ...: runs (or folders of runs), compared at the levels that all of them have
finished; or checkpoints (.pt). Of more than two, every pair is compared.

For a layer or network of N weights, of which A keeps |A| and B keeps |B|:

  both            |A and B|
  iou             |A and B| / |A or B| (Jaccard 1912): 1 for equal masks, 0 for disjoint ones
  share_of_a      |A and B| / |A|; share_of_b likewise
  random_both     |A| |B| / N = d_A d_B N, d the densities: the exact mean of |A and B| over random
                  masks of these densities (hypergeometric distribution)
  random_iou      random_both / (|A| + |B| - random_both): the ratio of the means of numerator and
                  denominator; the mean of iou itself is larger by a term of order 1/N
  layerwise_both  as random_both, for masks that are random in each layer and keep each layer's own
                  density: the sum over layers of |A_l| |B_l| / N_l; layerwise_iou likewise

The whole network's iou is above random_iou already where the layers of both masks have similar
densities; what is above layerwise_iou is agreement on single weights.

The table has the whole network at each level; the layers, too, of a single pair and level. --out
has all. --figure: iou by layer, a line per level (mean over pairs); of several levels, also iou
against density (mean and range over pairs)."""

SCREEN = {
    "a": "A", "b": "B", "level": "level", "layer": "layer", "density_a": "dens. A", "density_b": "dens. B",
    "iou": "IoU", "random_iou": "random", "layerwise_iou": "layerwise", "share_of_a": "of A", "share_of_b": "of B",
}  # fmt: skip


def _run(args: argparse.Namespace) -> Result:
    asked = level_numbers(args)
    # Here and not at the top: they import torch, which --help does not need.
    import pandas as pd

    from utils.analysis.figures import draw_overlap
    from utils.analysis.overlap import WHOLE, overlap_rows
    from utils.analysis.sources import CHECKPOINT, common_levels, count_pairs, find_pairs, pairs
    from utils.runs.loading import masks_in

    sources = find_pairs(args.sources)
    levels = common_levels(sources, asked)
    rows = []
    for pair in progress(pairs(sources, levels), count_pairs(sources, levels), "pairs"):
        masks = [masks_in(state, label) for state, label in zip(pair.states, pair.labels)]
        for row in overlap_rows(masks[0], masks[1], pair.labels):
            total = row["total"]
            densities = {"density_a": row["kept_a"] / total, "density_b": row["kept_b"] / total}
            rows.append({"a": pair.names[0], "b": pair.names[1], "level": pair.level, **row, **densities})
    frame = pd.DataFrame(rows)
    figure_frame = frame
    screen = selected(shown_rows(frame, ["a", "b", "level"], WHOLE), SCREEN)
    if levels == [CHECKPOINT]:
        frame, screen = frame.drop(columns="level"), screen.drop(columns="level")
    if (screen["layer"] == WHOLE).all():
        screen = screen.drop(columns="layer")
    return Result(frame, screen, lambda: draw_overlap(figure_frame))


COMMAND = Command("kept weights that masks have in common", TEXT, source_arguments, _run)
