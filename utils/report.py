"""A report of runs: one HTML file that opens in any browser and loads nothing from elsewhere.

    python -m utils.report RUN... --out REPORT.html [--density 0.2 0.05] [--metric final|max|best_val] [--no_overlap]

RUN is a run directory, or a directory of run directories. The report has:

methods      seeds, dense accuracy, the sparsest network as good as dense, time to ticket; the runs
accuracy     test accuracy against density, logarithmic or linear, with the values under the mouse and as a table
layers       density of each layer: all methods near a density, or every level of one method
curves       loss and accuracy against epochs, likewise
overlap      kept weights that masks share, beside random masks, by pairs of methods near a density; needs checkpoints
config       the options in which the runs differ, and those that they share
environment  machines, versions and commits that the runs noted

Lines and colours are those of utils.plot_results. A run that cannot be read is left out, and an unfinished one has its
finished levels: notes on stderr and in the report name them.

Exit status: 0 done; 2 a fault of the command line; 1 runs that are missing or do not belong together. With a fault
nothing is written.
"""

import argparse
import datetime
import sys
from collections.abc import Sequence
from pathlib import Path

from utils.errors import ConfigError, report
from utils.output import complain, say

PROGRAM = "report"
FORMATS = (".html", ".htm")


def make_parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    _, start, text = (__doc__ or "").partition("RUN is")
    parser = argparse.ArgumentParser(
        prog="python -m utils.report", description=start + text, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run directory, or directory of run directories")
    parser.add_argument("--out", type=Path, required=True, metavar="REPORT.html", help="file to write")
    parser.add_argument("--title", default="", help="title of the page (default: data set and model)")
    parser.add_argument("--metric", default="final", metavar="final|max|best_val",
                        help="test accuracy at the last epoch of each level, at the best epoch by test accuracy, or at "
                        "the best epoch by validation accuracy (default final)")  # fmt: skip
    parser.add_argument("--density", type=float, nargs="+", metavar="D",
                        help="densities, 0..1, at which methods are compared by layers, curves and masks (default: "
                        "three that the methods reach)")  # fmt: skip
    parser.add_argument("--no_overlap", action="store_true", help="leave out the overlap of masks: read no checkpoints")
    return parser


def check(args: argparse.Namespace) -> None:
    """Raise ConfigError if an option is out of range, or the file cannot be written there."""
    from utils.plots.lines import METRICS
    from utils.plots.output import check_file

    check_file("--out", args.out, FORMATS)
    if args.metric not in METRICS:
        raise ConfigError(f"--metric: {args.metric} is not allowed: one of {', '.join(METRICS)}")
    for density in args.density or ():
        if not 0 < density <= 1:
            raise ConfigError(f"--density: {density:g} is not allowed: above 0, at most 1")


def write_report(args: argparse.Namespace) -> list[str]:
    """Write the page; return the notes for stderr.

    Raises:
        DataError: as `read_study`.
        RunError: the file cannot be written.
    """
    # Here and not at the top: --help answers at once.
    from utils.files import write_whole
    from utils.plot_results import method_table
    from utils.reports import overlap, page, pictures, tables
    from utils.reports.study import read_study

    study = read_study(args.runs, args.density, args.metric)
    methods = method_table(study.methods, column=study.column)
    contents = page.Contents(
        title=args.title or study.subject,
        facts=_facts(len(study.runs), len(methods)),
        notes=study.notes,
        accuracy=f"Accuracy is that of the test images, {study.epoch} of each level.",
        methods=methods,
        runs=tables.runs_table(study),
        accuracy_pictures=pictures.draw(pictures.accuracy_plans(study), "accuracy"),
        points=pictures.points_table(study),
        layers=pictures.draw(pictures.layer_plans(study), "layers"),
        curves=pictures.draw(pictures.curve_plans(study), "curves"),
        config=tables.config_tables(study),
        environment=tables.environment_tables(study),
    )
    if args.no_overlap:
        contents.overlap_note = "Left out (--no_overlap)."
    elif len(study.runs) < 2:
        contents.overlap_note = "There is one run only: masks of two or more are compared."
    elif not overlap.has_checkpoints(study):
        contents.overlap_note = "The runs have no checkpoints, which hold the masks."
    else:
        contents.overlaps = overlap.overlaps(study)
    write_whole(args.out, page.render(contents).encode(errors="backslashreplace"))  # names of files may be no UTF-8
    return study.notes


def _facts(runs: int, methods: int) -> str:
    now = datetime.datetime.now(datetime.timezone.utc)
    return f"{runs} run{'s' * (runs != 1)}, {methods} method{'s' * (methods != 1)}; made {now:%Y-%m-%d %H:%M} UTC"


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``python -m utils.report``; return its exit status."""
    args = make_parser().parse_args(argv)
    try:
        check(args)
        notes = write_report(args)
    except Exception as error:  # a fault of the user's, or a bug: one clear line comes last
        return report(error, PROGRAM)
    complain(*(f"{PROGRAM}: note: {note}" for note in notes))
    say(f"{args.out}: {args.out.stat().st_size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    from utils.processes.signals import exit_quietly

    exit_quietly(worker=False, program=PROGRAM)
    sys.exit(main())
