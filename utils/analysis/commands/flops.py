"""``flops``: multiply-adds of one image and bytes of a checkpoint, dense and of kept weights alone."""

import argparse

from utils.analysis.command import (
    Command,
    Result,
    data_argument,
    level_numbers,
    progress,
    run_arguments,
    selected,
    shown_rows,
)

TEXT = """\
Multiply-adds of one training image, dense and of the kept weights alone, by layer and level; and
the bytes of each level's checkpoint in three formats.

  uses                how often a weight enters a product for one image: output positions of a
                      convolution, tokens of a linear layer (1 without tokens)
  multiply_adds       uses * weights (He et al. 2015 call them FLOPs; each is two floating-point
                      operations). Bias, normalization, activation and pooling do not count.
  kept_multiply_adds  uses * kept weights
  activations         products without weights (attention, fixed filters): in both sums of the
                      whole network, whatever the mask
  dense_bytes         float32 for all weights and statistics
  sparse_bytes        masked parameters as compressed sparse rows (CSR): a float32 and a 32-bit
                      column index per kept weight, a 32-bit pointer per row and one more
  bitmask_bytes       masked parameters as one bit per weight and a float32 per kept weight

These are counts of arithmetic and storage, not of time: ordinary kernels multiply zeros like other
numbers, so that an unstructured mask saves no time on them. Time is saved only by kernels made for
sparse weights, and by many of them only at low densities.

The table has the whole network at each level; the layers, too, of a single level. --out has all.
--figure: kept_multiply_adds by layer, a line per level."""

SCREEN = {
    "level": "level", "layer": "layer", "density": "density", "multiply_adds": "mult-adds",
    "kept_multiply_adds": "kept", "dense_bytes": "dense bytes", "sparse_bytes": "CSR", "bitmask_bytes": "bitmask",
}  # fmt: skip


def _arguments(parser: argparse.ArgumentParser) -> None:
    run_arguments(parser)
    data_argument(parser)


def _run(args: argparse.Namespace) -> Result:
    asked = level_numbers(args)
    # Here and not at the top: they import torch, which --help does not need.
    import pandas as pd

    from utils.analysis.figures import draw_costs
    from utils.analysis.flops import layer_costs, stored_bytes, weight_uses
    from utils.analysis.networks import open_bench
    from utils.analysis.overlap import WHOLE
    from utils.analysis.sources import common_levels, one_run
    from utils.state_dicts import check_weights

    source = one_run(args.run)
    levels = common_levels([source], asked)
    rows: list[dict] = []
    with open_bench([source], None, args.data_root) as bench:
        uses = weight_uses(bench.model, bench.data.image_shape)
        for level in progress(levels, len(levels), "levels"):
            state = source.state(level)
            check_weights(bench.model, state, str(source.file(level)))
            layers: list[dict] = [
                {"layer": cost.name, "uses": cost.uses, "weights": cost.weights, "kept": cost.kept,
                 "multiply_adds": cost.multiply_adds, "kept_multiply_adds": cost.kept_multiply_adds}
                for cost in layer_costs(uses, state)
            ]  # fmt: skip
            whole = {key: sum(row[key] for row in layers) for key in ("weights", "kept")}
            for key in ("multiply_adds", "kept_multiply_adds"):
                whole[key] = sum(row[key] for row in layers) + uses.activations
            stored = stored_bytes(state)
            sizes = {f"{name}_bytes": getattr(stored, name) for name in ("dense", "sparse", "bitmask")}
            rows.append({"level": level, "layer": WHOLE, **whole, "activations": uses.activations, **sizes})
            rows += [{"level": level, **row} for row in layers]
    frame = pd.DataFrame(rows).convert_dtypes()
    frame.insert(2, "density", frame["kept"] / frame["weights"])
    screen = selected(shown_rows(frame, ["level"], WHOLE), SCREEN)
    return Result(frame, screen, lambda: draw_costs(frame))


COMMAND = Command("multiply-adds and bytes, dense and of kept weights", TEXT, _arguments, _run)
