"""Figures and a table from the CSVs of runs.

    python -m utils.plot_results RUN... --out FIG.png [--kind accuracy|layers|curves|table|papers] ...

RUN is a run directory, a directory of run directories, or a table written by ``--kind table --out TABLE.csv``.

accuracy  test accuracy against density: logarithmic, densest left; mean and band over seeds; the dense network dotted;
          methods that prune once, at initialization, dashed (each of their points is a run of its own);
          of the last epoch of each level, or of another one (--metric)
layers    density of each layer: every level of one method, or one line per method, at the run and level closest to a
          density (--density)
curves    loss and accuracy against epochs: every level of one method, or one line per method, at the level closest to
          a density (--density) or at a given level (--level)
table     printed; with --out TABLE.csv, also all levels of all runs in one CSV, which `accuracy` and `table` can read
papers    printed as Markdown; with --out TABLE.csv, also as CSV: figures that papers published, from
          configs/papers/published.csv, beside those of the runs, and what differs between the runs' config and the
          paper's; a run is compared with the paper's experiment from which it differs least (--paper: only with these)

Runs that differ only in their seed are averaged; the legend shows in what the others differ. Points and levels that
some seeds lack are averaged over the seeds that have them, with a note on stderr. The file format follows the name:
.pdf, .svg and .eps are vector graphics, .png and .jpg have 200 dots per inch (--dpi).

Exit status: 0 done; 2 nothing drawn, with the reason on stderr.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from utils.errors import ConfigError, DataError, RunError, report
from utils.plots.figures import draw_accuracy, draw_curves, draw_layers
from utils.plots.groups import Group, group_runs, read_tidy, tidy
from utils.plots.lines import METRICS, check_metric, chosen_levels, dense_accuracy, fewer_seeds, sparsest_shared
from utils.plots.output import DPI, FIGURE_FORMATS, TABLE_FORMATS, check_file, write_file
from utils.plots.papers import markdown, paper_table
from utils.plots.published import published_configs, read_published
from utils.plots.runs import find_runs, has_finished_level, read_run

PROGRAM = "plot_results"
NOTHING_DRAWN = 2  # exit status, whatever the fault
TICKET_DENSITY = 0.1
# Percent. Rounding error of a mean; one image counts 1000 times more.
TIE = 1e-9
KINDS = ("accuracy", "layers", "curves", "table", "papers")
TABLES = ("table", "papers")


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
    candidates = int((group.frame["density"] < density).sum()) if group.one_shot else len(runs)
    return {
        "method": group.label,
        "seeds": group.seeds,
        "dense acc. (%)": _spread(group.frame[group.frame["density"] == 1][column]),
        "lowest density (%)": f"{100 * last['density'].mean():.3g}" if len(last) else "-",
        "acc. there (%)": _spread(last[column]),
        "lowest density >= dense acc. (%)": f"{_spread(matched, 1)} ({len(matched)} of {len(lowest)})",
        "time to ticket (s)": f"{_spread(reached, 0)} ({len(reached)} of {candidates} runs)",
        "total (s)": _spread(pd.Series([rows["seconds"].sum() for rows in runs]), 0),
    }


def _spread(values: pd.Series, digits: int = 2) -> str:
    """'mean ± deviation', 'mean' for a single value, '-' for none."""
    if not len(values):
        return "-"
    return f"{values.mean():.{digits}f}" + (f" ± {values.std():.{digits}f}" if len(values) > 1 else "")


def load_groups(paths: Sequence[str], kind: str = "accuracy", partial: bool = False) -> list[Group]:
    """The groups of runs that the command line names.

    Raises:
        ConfigError: a table beside other runs, or for a figure that needs run directories.
        DataError: a run is missing, damaged, or does not fit the others.
        RunError: a run is unfinished.
    """
    tables = [path for path in paths if path.endswith(".csv")]
    if tables:
        if len(paths) > 1:
            raise ConfigError(f"{tables[0]}: a table goes alone, not with other runs or tables")
        if kind in ("layers", "curves", "papers"):
            lacks = "no options" if kind == "papers" else "no layers and no epochs"
            raise ConfigError(f"{tables[0]}: --kind {kind} needs run directories: a table holds {lacks}")
        return read_tidy(Path(tables[0]))
    found = find_runs(paths)
    if partial:
        begun = [path for path in found if has_finished_level(path)]
        for path in found if begun else ():
            if path not in begun:
                print(f"{PROGRAM}: note: {path} is left out: no level is finished", file=sys.stderr)
        found = begun or found
    runs = [read_run(path, partial) for path in found]
    if kind == "papers":  # a table holds what a figure cannot: several data sets
        return [group for name in dict.fromkeys(run.dataset for run in runs)
                for group in group_runs([run for run in runs if run.dataset == name])]  # fmt: skip
    # In layers and curves, each starting density is a network of its own, not a point of a line.
    return group_runs(runs, by_start=kind in ("layers", "curves"))


def _parser() -> argparse.ArgumentParser:
    _, start, text = (__doc__ or "").partition("RUN is")
    parser = argparse.ArgumentParser(
        prog="python -m utils.plot_results", description=start + text,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run directory, directory of run directories, or table")
    parser.add_argument("--out", type=Path, help="file to write (required for figures)")
    parser.add_argument("--kind", choices=KINDS, default="accuracy")
    parser.add_argument("--metric", choices=tuple(METRICS), default="final",
                        help="accuracy, table, papers: test accuracy at the last epoch of each level, at the best "
                        "epoch by test accuracy, or at the best epoch by validation accuracy")  # fmt: skip
    parser.add_argument("--ylim", type=float, nargs=2, metavar=("LOW", "HIGH"),
                        help="accuracy: range of the y axis, in percent")  # fmt: skip
    parser.add_argument("--density", type=float,
                        help="layers, curves: per method, draw the run and level closest to this density, 0..1; "
                        "table: a ticket is below this density (default 0.1)")  # fmt: skip
    parser.add_argument("--level", type=int, help="curves: level to draw of each method (default: its last)")
    parser.add_argument("--paper", action="append", metavar="NAME",
                        help="papers: a config in configs/papers, as frankle2019_lenet; may be repeated")  # fmt: skip
    parser.add_argument("--partial", action="store_true", help="include the finished levels of unfinished runs")
    parser.add_argument("--title", default="", help="title above the figure")
    parser.add_argument("--dpi", type=int, default=DPI, help=f"dots per inch of .png and .jpg (default {DPI})")
    return parser


# Options that apply only to some kinds of figure.
ONLY = {
    "metric": ("accuracy", "table", "papers"),
    "ylim": ("accuracy",),
    "density": ("layers", "curves", "table"),
    "level": ("curves",),
    "paper": ("papers",),
}


def _check(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Raise ConfigError if options contradict each other or are out of range."""
    for name, kinds in ONLY.items():
        if getattr(args, name) != parser.get_default(name) and args.kind not in kinds:
            raise ConfigError(f"--{name}: only with --kind {' or '.join(kinds)} (it is {args.kind})")
    if args.out is None and args.kind not in TABLES:
        raise ConfigError("--out: a file to write is expected, as in --out FIG.png")
    if args.out is not None:
        check_file("--out", args.out, TABLE_FORMATS if args.kind in TABLES else FIGURE_FORMATS)
    if args.ylim is not None and not all(map(math.isfinite, args.ylim)):
        raise ConfigError(f"--ylim: {args.ylim[0]:g} {args.ylim[1]:g} is not allowed: finite numbers")
    for name in args.paper or ():
        if name not in published_configs():
            raise ConfigError(f"--paper: {name!r} is not allowed: one of {', '.join(published_configs())}")
    if args.density is not None and not 0 < args.density <= 1:
        raise ConfigError(f"--density: {args.density:g} is not allowed: above 0, at most 1")
    if args.density is not None and args.level is not None:
        raise ConfigError("--level: not with --density, which chooses the level")
    if args.dpi < 10:
        raise ConfigError(f"--dpi: {args.dpi} is not allowed: at least 10")


def draw(args: argparse.Namespace) -> None:
    """Draw the figure, or print and write the table.

    Raises:
        ConfigError, DataError, RunError: as `load_groups`; the file cannot be written.
    """
    groups = load_groups(args.runs, args.kind, args.partial)
    check_metric(groups, args.metric)
    if args.kind == "table":
        column, epoch = METRICS[args.metric]
        print(f"acc.: test accuracy, {epoch} of each level")
        print(method_table(groups, args.density or TICKET_DENSITY, column).to_string(index=False))
        if args.out:
            write_file("--out", args.out, lambda: tidy(groups).to_csv(args.out, index=False))
    elif args.kind == "papers":
        table, without = paper_table(groups, read_published(args.paper or ()), args.metric)
        print(
            f"Ours: test accuracy, {METRICS[args.metric][1]} of each level; mean ± standard deviation over n seeds.\n"
        )
        print(markdown(table))
        if without:
            print(f"{PROGRAM}: note: no published figure near a density of: {'; '.join(without)}", file=sys.stderr)
        if args.out:
            write_file("--out", args.out, lambda: table.to_csv(args.out, index=False))
    else:
        _draw_figure(groups, args)
    shown = chosen_levels(groups, args.density, args.level) if args.kind in ("layers", "curves") else None
    lacking = fewer_seeds(groups, shown)
    if lacking:
        print(f"{PROGRAM}: note: points with fewer seeds than others of their method: {lacking}", file=sys.stderr)


def _draw_figure(groups: Sequence[Group], args: argparse.Namespace) -> None:
    def draw_and_save() -> None:
        if args.kind == "accuracy":
            figure = draw_accuracy(groups, args.metric, args.ylim, args.title)
        elif args.kind == "layers":
            figure = draw_layers(groups, args.density, args.title)
        else:
            figure = draw_curves(groups, args.level, args.title, args.density)
        figure.savefig(args.out, dpi=args.dpi)

    write_file("--out", args.out, draw_and_save)


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``python -m utils.plot_results``; return its exit status."""
    parser = _parser()
    args = parser.parse_args(argv)
    try:
        _check(args, parser)
        draw(args)
    except (ConfigError, DataError, RunError) as error:
        report(error, PROGRAM)
        return NOTHING_DRAWN
    except OSError as error:  # a run that cannot be looked at: too long a name, a folder without permission
        report(DataError(str(error)), PROGRAM)
        return NOTHING_DRAWN
    return 0


if __name__ == "__main__":
    sys.exit(main())
