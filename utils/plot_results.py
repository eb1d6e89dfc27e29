"""Figures and a table from the CSVs of runs.

    python -m utils.plot_results RUN... --out FIG.png [--kind accuracy|layers|curves|table|papers] ...

RUN is a run directory, a directory of run directories, or a table written by ``--kind table --out TABLE.csv``.

accuracy  test accuracy against density: logarithmic, densest left; mean and band over seeds; the dense network dotted;
          methods that prune once, at initialization, dashed (each of their points is a run of its own);
          of the last epoch of each level, or of another one (--metric)
layers    density of each layer: every level of one method, or one line per method, at the run and level closest to a
          density (--density)
curves    loss and accuracy against epochs: every level of one method, or one line per method, at the level closest to
          a density (--density) or at a given level (--level); logarithmic axes (--log)
table     printed; with --out TABLE.csv, also all levels of all runs in one CSV, which `accuracy` and `table` can read
papers    printed as Markdown; with --out TABLE.csv, also as CSV: figures that papers published, from
          configs/papers/published.csv, beside those of the runs, and what differs between the runs' config and the
          paper's; a run is compared with the paper's experiment from which it differs least (--paper: only with these)

Runs that differ only in their seed are averaged; the legend shows in what the others differ. Points and levels that
some seeds lack are averaged over the seeds that have them, with a note on stderr. Among many runs, those that are
unfinished or damaged, or of another data set than most, are left out, with a note. A method has the same colour in all
figures; what is made of its tickets has shades of it. Points of several methods at one density are drawn side by side,
to the left and right of it. The file format follows the name:
.pdf, .svg and .eps are vector graphics, .png and .jpg have 200 dots per inch (--dpi).

Exit status: 0 done; 2 nothing drawn, with the reason on stderr.
"""

import argparse
import math
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

from utils.errors import ConfigError, DataError, RunError, report
from utils.output import best_effort_streams, note, program, say
from utils.plots.figures import LOG_AXES, draw_accuracy, draw_curves, draw_layers
from utils.plots.groups import Group, group_runs, read_tidy, tidy
from utils.plots.lines import METRICS, check_metric, chosen_levels, damaged, fewer_seeds
from utils.plots.methods import TICKET_DENSITY, dense_notes, method_table
from utils.plots.methods import time_to_ticket as time_to_ticket  # one of this command's public functions
from utils.plots.output import DPI, FIGURE_FORMATS, TABLE_FORMATS, check_file, write_file
from utils.plots.papers import markdown, paper_table
from utils.plots.published import published_configs, read_published
from utils.plots.runs import find_runs, read_runs
from utils.plots.text_table import WIDTH, text_table

PROGRAM = "plot_results"
NOTHING_DRAWN = 2  # exit status, whatever the fault
KINDS = ("accuracy", "layers", "curves", "table", "papers")
TABLES = ("table", "papers")


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
    runs, notes = read_runs(find_runs(paths), partial, one_dataset=kind != "papers")
    note(*notes)
    if kind == "papers":  # a table holds what a figure cannot: several data sets
        by_data = {run.dataset: [other for other in runs if other.dataset == run.dataset] for run in runs}
        return [group for members in by_data.values() for group in group_runs(members)]
    # In layers and curves, each starting density is a network of its own, not a point of a line.
    return group_runs(runs, by_start=kind in ("layers", "curves"))


def _readable(groups: list[Group], args: argparse.Namespace) -> list[Group]:
    """The groups without the runs whose tables of layers or epochs are damaged, with a note on each.

    Raises:
        ConfigError: as `chosen_levels`.
        DataError: all runs are damaged.
    """
    faults = damaged(chosen_levels(groups, args.density, args.level, args.last), args.kind)
    runs = [run for group in groups for run in group.runs]
    fit = [run for run in runs if run.path not in faults]
    if faults and not fit:
        raise next(iter(faults.values()))
    for fault in faults.values():
        note(f"left out: {fault}")
    return _readable(group_runs(fit, by_start=True), args) if faults else groups


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
    parser.add_argument("--last", type=int, metavar="N", help="layers, curves: only the last N levels of one method")
    parser.add_argument("--log", choices=tuple(LOG_AXES), help="curves: what is on logarithmic axes")
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
    "last": ("layers", "curves"),
    "log": ("curves",),
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
    if args.last is not None and args.last < 1:
        raise ConfigError(f"--last: {args.last} is not allowed: at least 1")
    for other in ("density", "level"):
        if args.last is not None and getattr(args, other) is not None:
            raise ConfigError(f"--last: not with --{other}, which draws one level of each method")
    if args.dpi < 10:
        raise ConfigError(f"--dpi: {args.dpi} is not allowed: at least 10")


def draw(args: argparse.Namespace) -> None:
    """Draw the figure, or print and write the table.

    Raises:
        ConfigError, DataError, RunError: as `load_groups`; the file cannot be written.
    """
    groups = load_groups(args.runs, args.kind, args.partial)
    if args.kind in ("layers", "curves"):
        groups = _readable(groups, args)
    check_metric(groups, args.metric)
    if args.kind == "table":
        column, epoch = METRICS[args.metric]
        say(f"acc.: test accuracy, {epoch} of each level")
        say(text_table(method_table(groups, args.density or TICKET_DENSITY, column)))
        say(*(textwrap.fill(line, WIDTH) for line in dense_notes(groups)))
        if args.out:
            write_file("--out", args.out, lambda: tidy(groups).to_csv(args.out, index=False))
    elif args.kind == "papers":
        table, without = paper_table(groups, read_published(args.paper or ()), args.metric)
        epoch = METRICS[args.metric][1]
        say(f"Ours: test accuracy, {epoch} of each level; mean ± standard deviation over n seeds.", "", markdown(table))
        if without:
            note(f"no published figure near a density of: {'; '.join(without)}")
        if args.out:
            write_file("--out", args.out, lambda: table.to_csv(args.out, index=False))
    else:
        _draw_figure(groups, args)
    several = args.kind in ("layers", "curves")
    shown = chosen_levels(groups, args.density, args.level, args.last) if several else None
    lacking = fewer_seeds(groups, shown)
    if lacking:
        note(f"points with fewer seeds than others of their method: {lacking}")


def _draw_figure(groups: Sequence[Group], args: argparse.Namespace) -> None:
    def draw_and_save() -> None:
        if args.kind == "accuracy":
            figure = draw_accuracy(groups, args.metric, args.ylim, args.title)
        elif args.kind == "layers":
            figure = draw_layers(groups, args.density, args.title, args.last)
        else:
            figure = draw_curves(groups, args.level, args.title, args.density, args.last, args.log)
        figure.savefig(args.out, dpi=args.dpi)

    write_file("--out", args.out, draw_and_save)


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``python -m utils.plot_results``; return its exit status."""
    parser = _parser()
    args = parser.parse_args(argv)
    try:
        _check(args, parser)
        with program(PROGRAM):
            draw(args)
    except (ConfigError, DataError, RunError) as error:
        report(error, PROGRAM)
        return NOTHING_DRAWN
    except OSError as error:  # a run that cannot be looked at: too long a name, a folder without permission
        report(DataError(str(error)), PROGRAM)
        return NOTHING_DRAWN
    return 0


if __name__ == "__main__":
    best_effort_streams(PROGRAM)
    sys.exit(main())
