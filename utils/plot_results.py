"""Figures and a table from the CSVs of runs.

    python -m utils.plot_results RUN... --out FIG.png [--kind accuracy|layers|curves|table] ...

RUN is a run directory, a directory of run directories, or a table that ``--kind table --out TABLE.csv`` wrote.

accuracy  test accuracy against density: logarithmic, densest left; mean and band over seeds, the dense network dotted,
          methods pruned once at initialization dashed (there each point is a run of its own)
layers    density of each layer: of one method at every level, or of several methods next to one density (--density)
curves    loss and accuracy against epochs: of one method at every level, or of several methods next to one density or
          at one level (--density, --level)
table     printed; with --out TABLE.csv also all levels of all runs in one CSV, which `accuracy` and `table` read back

Runs that differ only in their seed are averaged; the legend tells what differs between the others. Points and levels
that some seeds lack are drawn of those that have them, with a note on stderr. The format follows the name: .pdf, .svg
and .eps are vectors, .png has 200 dots an inch (--dpi).

Exit status: 0 done; 2 nothing drawn, with one line on stderr that says why.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from matplotlib import pyplot as plt

from utils.plots.figures import METRICS, draw_accuracy, draw_curves, draw_layers
from utils.plots.lines import chosen_levels, dense_accuracy, fewer_seeds, sparsest_shared
from utils.plots.runs import Group, find_runs, group_runs, read_run, read_tidy, tidy

TICKET_DENSITY = 0.1
# Percent: a mean of equal accuracies may come out a last bit above them; one image is a thousand times as much.
TIE = 1e-9
KINDS = ("accuracy", "layers", "curves", "table")
FORMATS = (".png", ".pdf", ".svg", ".eps", ".jpg")


def time_to_ticket(
    summary: pd.DataFrame, dense_accuracy: float | None = None, density: float = TICKET_DENSITY
) -> float | None:
    """Seconds from the run's start to its first network below `density` that is at least as accurate as the dense one.

    Seconds are those of summary.csv: training and evaluation of all levels up to that one. Left out are the start of
    the program and what lies between levels.

    Args:
        summary: of one run, levels in order.
        dense_accuracy: percent, at the end of training; None = the run's own level 0, which must be dense.

    Returns:
        None when no level is such a network.

    Raises:
        ValueError: `dense_accuracy` is None and level 0 is not dense.
    """
    if dense_accuracy is None:
        if summary["density"].iloc[0] != 1:
            raise ValueError(f"level 0 has density {summary['density'].iloc[0]:g}: it says nothing of a dense network")
        dense_accuracy = summary["final_test_acc"].iloc[0]
    found = (summary["density"] < density) & (summary["final_test_acc"] >= dense_accuracy - TIE)
    if not found.any():
        return None
    return float(summary["seconds"].cumsum()[found].iloc[0])


def method_table(groups: Sequence[Group], density: float = TICKET_DENSITY) -> pd.DataFrame:
    """One row a method, as text: seeds, dense accuracy, the sparsest network as good as it, time to ticket.

    Figures are means over seeds with the standard deviation (n - 1); how many have one is told where not all must. The
    lowest density is that of the sparsest network that all seeds have.
    """
    rows = []
    for group in groups:
        dense = dense_accuracy([g for g in groups if g.training == group.training])
        own = [run for _, run in group.frame.groupby("run", sort=False)]
        best, times = [], []
        for seed, levels in group.frame.groupby("seed"):
            matching = levels[levels["final_test_acc"] >= dense.get(seed, float("inf")) - TIE]
            best.append(matching["density"].min())
        for run in own:
            accuracy = dense.get(run["seed"].iloc[0])
            times.append(None if accuracy is None else time_to_ticket(run, accuracy, density))
        matched = 100 * pd.Series(best, dtype=float).dropna()
        last = sparsest_shared(group)
        reached = pd.Series([t for t in times if t is not None], dtype=float)
        of = len(own) if not group.one_shot else int((group.frame["density"] < density).sum())
        rows.append(
            {
                "method": group.label,
                "seeds": group.seeds,
                "dense acc. (%)": _spread(group.frame[group.frame["density"] == 1]["final_test_acc"]),
                "lowest density (%)": f"{100 * last['density'].mean():.3g}" if len(last) else "-",
                "acc. there (%)": _spread(last["final_test_acc"]),
                "lowest density >= dense acc. (%)": f"{_spread(matched, 1)} ({len(matched)} of {len(best)})",
                "time to ticket (s)": f"{_spread(reached, 0)} ({len(reached)} of {of} runs)",
                "total (s)": _spread(pd.Series([run["seconds"].sum() for run in own]), 0),
            }
        )
    return pd.DataFrame(rows)


def _spread(values: pd.Series, digits: int = 2) -> str:
    """'mean ± deviation', 'mean' of one value, '-' of none."""
    if not len(values):
        return "-"
    return f"{values.mean():.{digits}f}" + (f" ± {values.std():.{digits}f}" if len(values) > 1 else "")


def load_groups(paths: Sequence[str], kind: str = "accuracy", partial: bool = False) -> list[Group]:
    """The groups that the command line's RUNs make.

    Raises:
        ValueError: a run is missing, unfinished or does not fit the others; a table for a figure that needs runs.
    """
    tables = [path for path in paths if path.endswith(".csv")]
    if tables:
        if len(paths) > 1:
            raise ValueError(f"{tables[0]}: a table goes alone, not with other runs or tables")
        if kind in ("layers", "curves"):
            raise ValueError(f"{tables[0]}: --kind {kind} needs run directories: a table holds no layers and no epochs")
        return read_tidy(Path(tables[0]))
    found = find_runs(paths)
    if partial:
        begun = [path for path in found if (path / "metrics" / "summary.csv").exists()]
        for path in found if begun else ():
            if path not in begun:
                print(f"plot_results: note: {path} is left out: not one level is finished", file=sys.stderr)
        found = begun or found
    runs = [read_run(path, partial) for path in found]
    # Elsewhere each run that starts at a density of its own is a network of its own.
    return group_runs(runs, by_start=kind in ("layers", "curves"))


def _parser() -> argparse.ArgumentParser:
    text = (__doc__ or "").partition("RUN is")[2]
    parser = argparse.ArgumentParser(
        prog="python -m utils.plot_results", description="RUN is" + text,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run directory, directory of them, or a table")
    parser.add_argument("--out", type=Path, help="file to write (all kinds but table need it)")
    parser.add_argument("--kind", choices=KINDS, default="accuracy")
    parser.add_argument("--metric", choices=tuple(METRICS), default="final",
                        help="accuracy: after the last epoch, or of the best (chosen on the test set)")  # fmt: skip
    parser.add_argument("--ylim", type=float, nargs=2, metavar=("LOW", "HIGH"), help="accuracy: percent shown")
    parser.add_argument("--density", type=float,
                        help="layers, curves: of each method the run and level next to this density, 0..1; "
                        "table: a ticket is below this (0.1)")  # fmt: skip
    parser.add_argument("--level", type=int, help="curves: level shown of each method (default: its last)")
    parser.add_argument("--partial", action="store_true", help="take the finished levels of unfinished runs")
    parser.add_argument("--title", default="", help="above the figure")
    parser.add_argument("--dpi", type=int, default=200, help="dots an inch of .png and .jpg (200)")
    return parser


# Options that only some kinds of figure have.
ONLY = {"metric": ("accuracy",), "ylim": ("accuracy",), "density": ("layers", "curves", "table"), "level": ("curves",)}


def _check(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    for name, kinds in ONLY.items():
        if getattr(args, name) != parser.get_default(name) and args.kind not in kinds:
            raise ValueError(f"--{name}: only with --kind {' or '.join(kinds)} (it is {args.kind})")
    allowed = (".csv",) if args.kind == "table" else FORMATS
    if args.out is None and args.kind != "table":
        raise ValueError("--out: a file to write is expected, as in --out FIG.png")
    if args.out is not None and args.out.suffix.lower() not in allowed:
        raise ValueError(f"--out: {args.out}: ends in none of {', '.join(allowed)}")
    if args.out is not None and not args.out.parent.is_dir():
        raise ValueError(f"--out: {args.out.parent}: no such directory")
    if args.density is not None and not 0 < args.density <= 1:
        raise ValueError(f"--density: {args.density:g} is not allowed: above 0, at most 1")
    if args.density is not None and args.level is not None:
        raise ValueError("--level: not with --density, which chooses the level")
    if args.dpi < 10:
        raise ValueError(f"--dpi: {args.dpi} is not allowed: at least 10")


def draw(args: argparse.Namespace) -> None:
    """Draws, or prints and writes, what the command line asks for. Raises ValueError as `load_groups`."""
    groups = load_groups(args.runs, args.kind, args.partial)
    if args.kind == "table":
        print(method_table(groups, args.density or TICKET_DENSITY).to_string(index=False))
        if args.out:
            tidy(groups).to_csv(args.out, index=False)
    else:
        _draw_figure(groups, args)
    shown = chosen_levels(groups, args.density, args.level) if args.kind in ("layers", "curves") else None
    lacking = fewer_seeds(groups, shown)
    if lacking:
        print(f"plot_results: note: of fewer seeds than the method's others: {lacking}", file=sys.stderr)


def _draw_figure(groups: Sequence[Group], args: argparse.Namespace) -> None:
    if args.kind == "accuracy":
        figure = draw_accuracy(groups, args.metric, args.ylim, args.title)
    elif args.kind == "layers":
        figure = draw_layers(groups, args.density, args.title)
    else:
        figure = draw_curves(groups, args.level, args.title, args.density)
    figure.savefig(args.out, dpi=args.dpi)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs ``python -m utils.plot_results``; returns its exit status."""
    parser = _parser()
    args = parser.parse_args(argv)
    try:
        _check(args, parser)
        draw(args)
    except (ValueError, OSError) as error:
        print(f"plot_results: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
