"""``stability``: the instability analysis of a run, from the training of the pairs to their barriers."""

import argparse
from pathlib import Path

from utils.analysis.command import Command, Result, check_line, data_argument, line_arguments, selected, whole_numbers
from utils.errors import ConfigError
from utils.output import is_terminal

TEXT = """\
Instability analysis (Frankle et al. 2020, "Linear Mode Connectivity and the Lottery Ticket
Hypothesis", sections 2 to 4): is a network stable to SGD noise from step n on, dense and under the
masks of sparser levels?

1. From each of --steps n of the run's level 0 (kept there by prune_params.save_steps), under the
   mask of each of --levels, one branch per data seed is trained to the end of the level: weights,
   momentum and schedule of step n, the run's config, another order and augmentation of the images.
   Branches are runs in --into; they are trained by the grid runner: started again, the command
   skips finished branches and resumes unfinished ones.
2. The barrier of each pair of branches that differ in their data seed alone:

  error_barrier  max over alpha of error(alpha) - (error(0) + error(1)) / 2, in percentage points,
                 on the line between the two networks; Frankle et al. call the network stable from
                 step n on where it is below 2. Of D data seeds there are D (D - 1) / 2 pairs.

The options of the line and BatchNorm statistics: see `barrier --help`.

--figure: error_barrier against density, a line per step (mean and range over pairs); of a single
level, against the step. --out has a row per point of each line."""

SCREEN = {
    "step": "step", "level": "level", "density": "density", "a": "A", "b": "B", "error_a": "err. A",
    "error_b": "err. B", "error_barrier": "error barrier", "loss_barrier": "loss barrier",
}  # fmt: skip


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="directory of a run with prune_params.save_steps")
    parser.add_argument("--steps", required=True, help="optimizer steps of level 0 to branch from, as in 0,100,500")
    parser.add_argument("--data_seeds", required=True, help="two or more data seeds, as in 1,2")
    parser.add_argument("--levels", default="0", help="levels whose masks are used (default 0)")
    parser.add_argument("--into", type=Path, metavar="DIR", help="folder of the branches (default: RUN_stability)")
    parser.add_argument("--jobs", type=int, default=1, help="branches that are trained at a time (default 1)")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads per branch (default: an equal share)")
    line_arguments(parser)
    data_argument(parser)


def _run(args: argparse.Namespace) -> Result:
    numbers = {name: whole_numbers(f"--{name}", getattr(args, name)) for name in ("steps", "levels", "data_seeds")}
    check_line(args)
    if len(numbers["data_seeds"]) < 2:
        raise ConfigError(f"--data_seeds: {args.data_seeds} is not allowed: two or more, which make a pair")
    if args.jobs < 1 or args.threads < 0:
        raise ConfigError("--jobs, --threads: at least 1 job; 0 threads (an equal share) or more")
    # Here and not at the top: they import torch, which --help does not need.
    import pandas as pd

    from utils.analysis.branches import branch_grid, branch_pairs, branches, check_branches
    from utils.analysis.figures import draw_stability
    from utils.analysis.lines import LineOptions, barriers_of, measured
    from utils.analysis.networks import open_bench
    from utils.analysis.sources import common_levels, find_sources, one_run

    source = one_run(args.run)
    check_branches(source.path, numbers["steps"], numbers["data_seeds"])
    common_levels([source], numbers["levels"])
    into = args.into or source.path.resolve().with_name(f"{source.path.resolve().name}_stability")
    found = branches(numbers["steps"], numbers["levels"], numbers["data_seeds"])
    _train(branch_grid(source.path, found, into, args.data_root, args.jobs, args.threads))
    steps = {branch.name: branch.step for branch in found}
    options = LineOptions(args.points, args.split, args.batchnorm, args.batchnorm_images)
    seeds = len(numbers["data_seeds"])
    count = len(found) * (seeds - 1) // 2
    runs = find_sources([str(into / found[0].name)])
    with open_bench(runs, None, args.data_root) as bench:
        frame = pd.DataFrame(measured(bench, lambda: branch_pairs(found, into), count, options))
    frame.insert(0, "step", frame["a"].map(steps))
    screen = barriers_of(frame, ["step"])
    for column in ("a", "b"):
        screen[column] = screen[column].str.rpartition("_")[2]
    return Result(frame, selected(screen, SCREEN), lambda: draw_stability(frame))


def _train(grid) -> None:
    """Trains what is unfinished; ends the program, with the grid's exit status, if it was stopped or a branch failed.

    The grid runner has said why.
    """
    import sys

    from utils.grids.runner import GridRunner

    if all(run.finished for run in grid.runs):
        return
    status = GridRunner(grid, terminal=is_terminal(sys.stdout), notes=False).run()
    if status:
        raise SystemExit(status)


COMMAND = Command("instability to SGD noise from given steps on, by trained pairs", TEXT, _arguments, _run)
