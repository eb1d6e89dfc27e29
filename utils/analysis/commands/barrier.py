"""``barrier``: loss and error along the line between two networks."""

import argparse

from utils.analysis.command import (
    Command,
    Result,
    check_line,
    level_numbers,
    line_arguments,
    network_arguments,
    selected,
    source_arguments,
)

TEXT = """\
Loss and error along the line between two networks, and the barrier on it (Frankle et al. 2020,
"Linear Mode Connectivity and the Lottery Ticket Hypothesis", section 2). A, B, ...: runs (or
folders of runs), compared at the levels that all of them have finished; or checkpoints (.pt). Of
more than two, every pair is compared.

  w(alpha)       (1 - alpha) w_A + alpha w_B, alpha = 0, 1/(P-1), ..., 1 at --points P
  error          misclassified images of --split, in percent
  loss           mean cross entropy over the images of --split, without label smoothing, in nats
  error_barrier  max over alpha of error(alpha) - (error(0) + error(1)) / 2, in percentage points;
                 Frankle et al. call two networks linearly connected where it is below 2
  loss_barrier   the same of the loss

Masks: both networks must have the same one. With --union a weight is kept where either keeps it;
the line is the same, since a pruned weight is 0. The column density is that of this mask.

BatchNorm: `recompute` (default) sets the running mean and variance of each layer, at every alpha,
ends included, to the mean of the batches' own statistics over --batchnorm_images training images
(rounded up to whole batches of the run's batch size, in one fixed random order, without
augmentation). `interpolate` mixes the saved statistics as the weights are mixed; barriers are then
larger, since the variance of mixed activations shrinks (Jordan et al. 2023, "REPAIR"). A network
without BatchNorm has the same barrier with both.

Images are not augmented. With dataset.drop_last in the config, --split train leaves out the images
of the incomplete last batch. Arithmetic is float32.

The table and --figure have the barriers: of one level, error and loss along each line; of several,
error_barrier against density (mean and range over pairs). --out has a row per point."""

SCREEN = {
    "a": "A", "b": "B", "level": "level", "density": "density", "error_a": "error A", "error_b": "error B",
    "error_max": "highest", "error_barrier": "error barrier", "loss_barrier": "loss barrier",
}  # fmt: skip


def _arguments(parser: argparse.ArgumentParser) -> None:
    source_arguments(parser)
    parser.add_argument("--union", action="store_true", help="the masks may differ: keep what either keeps")
    line_arguments(parser)
    network_arguments(parser)


def _run(args: argparse.Namespace) -> Result:
    asked = level_numbers(args)
    check_line(args)
    # Here and not at the top: they import torch, which --help does not need.
    import pandas as pd

    from utils.analysis.figures import draw_barriers
    from utils.analysis.lines import LineOptions, barriers_of, measured
    from utils.analysis.networks import open_bench
    from utils.analysis.sources import CHECKPOINT, common_levels, count_pairs, find_pairs, pairs

    sources = find_pairs(args.sources)
    levels = common_levels(sources, asked)
    options = LineOptions(args.points, args.split, args.batchnorm, args.batchnorm_images, args.union)
    with open_bench(sources, args.config, args.data_root) as bench:
        count = count_pairs(sources, levels)
        frame = pd.DataFrame(measured(bench, lambda: pairs(sources, levels), count, options))
    found = barriers_of(frame)
    screen = selected(found, SCREEN)
    rows = frame
    if levels == [CHECKPOINT]:
        rows, screen = frame.drop(columns="level"), screen.drop(columns="level")
    return Result(rows, screen, lambda: draw_barriers(frame))


COMMAND = Command("loss and error along the line between networks", TEXT, _arguments, _run)
