"""``sharpness``: largest eigenvalue and trace of the Hessian of the training loss."""

import argparse

from utils.analysis.command import Command, Result, level_numbers, network_arguments, progress
from utils.errors import ConfigError

TEXT = """\
Sharpness of the minima that checkpoints lie in: the largest eigenvalue and the trace of the Hessian
H of the mean training loss (with the config's label smoothing) over --images training images,
rounded up to whole batches, without augmentation. H is that of the free parameters: kept weights
and parameters without a mask. BatchNorm uses the checkpoint's statistics.

  eigenvalue   the largest one, by power iteration: v <- H v / |H v|, eigenvalue = v . H v; from a
               random start, until |H v - eigenvalue * v| <= --tolerance * eigenvalue or --most
               products. If the first one found is negative, -a, again with H + a.
  residual     |H v - eigenvalue * v|: an eigenvalue of H is at most that far away
  trace        the mean of z . H z over --samples vectors z of random signs (Hutchinson 1990);
  trace_error  the standard error of that mean

Products H v are two backward passes (Pearlmutter 1994); as in Yao et al. 2020, "PyHessian". Of
ReLU networks H is the Hessian almost everywhere."""

SCREEN = ["name", "level", "density", "eigenvalue", "residual", "iterations", "trace", "trace_error"]


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("sources", nargs="+", metavar="CKPT|RUN", help="checkpoints, or runs with their levels")
    parser.add_argument("--levels", help="of runs: only these levels, as in 0,5,10 (default: all that they share)")
    parser.add_argument("--images", type=int, default=1000, help="training images (default 1000; 0 = all)")
    parser.add_argument("--samples", type=int, default=30, help="random vectors of the trace (default 30)")
    parser.add_argument("--tolerance", type=float, default=1e-3, help="relative residual to stop at (default 0.001)")
    parser.add_argument("--most", type=int, default=200, help="products of the power iteration (default 200)")
    parser.add_argument("--seed", type=int, default=0, help="of the random vectors (default 0)")
    network_arguments(parser)


def _check(args: argparse.Namespace) -> None:
    for name, least in (("images", 0), ("samples", 1), ("most", 1), ("seed", 0)):
        if getattr(args, name) < least:
            raise ConfigError(f"--{name}: {getattr(args, name)} is not allowed: at least {least}")
    if not args.tolerance > 0:
        raise ConfigError(f"--tolerance: {args.tolerance:g} is not allowed: above 0")


def _run(args: argparse.Namespace) -> Result:
    asked = level_numbers(args)
    _check(args)
    # Here and not at the top: they import torch, which --help does not need.
    import pandas as pd

    from utils.analysis.networks import open_bench
    from utils.analysis.sharpness import Hessian, top_eigenvalue, trace
    from utils.analysis.sources import CHECKPOINT, common_levels, find_sources
    from utils.conv_type import density
    from utils.runs.loading import put_state

    sources = find_sources(args.sources)
    levels = common_levels(sources, asked)
    places = [(source, level) for source in sources for level in levels]
    rows, notes = [], []
    with open_bench(sources, args.config, args.data_root) as bench:
        batches = list(bench.images("train", args.images)())
        smoothing = bench.cfg.optimizer.label_smoothing
        for source, level in progress(places, len(places), "checkpoints"):
            put_state(bench.model, source.state(level), str(source.file(level)))
            hessian = Hessian(bench.model, batches, label_smoothing=smoothing)
            top = top_eigenvalue(hessian, args.seed, args.tolerance, args.most)
            found = trace(hessian, args.samples, args.seed)
            rows.append(
                {"name": source.name, "level": level, "density": density(bench.model), "parameters": hessian.size,
                 "images": hessian.images, "eigenvalue": top.value, "residual": top.residual,
                 "iterations": top.iterations, "converged": top.converged, "trace": found.value,
                 "trace_error": found.standard_error, "samples": found.samples}
            )  # fmt: skip
            if not top.converged:
                notes.append(f"{source.file(level)}: the eigenvalue has not converged; --most allows more products")
    frame = pd.DataFrame(rows)
    screen = frame[SCREEN]
    if levels == [CHECKPOINT]:
        frame, screen = frame.drop(columns="level"), screen.drop(columns="level")
    return Result(frame, screen, notes=notes)


COMMAND = Command("largest eigenvalue and trace of the loss's Hessian", TEXT, _arguments, _run, draws=False)
