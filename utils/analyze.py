"""Questions to finished runs: how masks agree, where signs change, whether networks are linearly connected, ...

    python -m utils.analyze COMMAND ... [--out TABLE.csv] [--figure FIG.png]

Each command prints a table. --out writes all of its rows as CSV; --figure draws them (.png, .pdf, .svg, .eps, .jpg).
A run is named by its directory, a checkpoint by its .pt file. Networks run on the GPU if there is one
(CUDA_VISIBLE_DEVICES= hides it).

Exit status: 0 done; 2 a fault of the command line or of --config; 1 a run, a checkpoint or data that do not fit. With a
fault nothing is written.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from utils.analysis.command import Command, Result, table_text
from utils.analysis.commands import barrier, drop, flops, overlap, sharpness, signs, stability
from utils.errors import report
from utils.files import write_whole
from utils.output import complain, program, say

PROGRAM = "analyze"
COMMANDS: dict[str, Command] = {
    "barrier": barrier.COMMAND,
    "drop": drop.COMMAND,
    "flops": flops.COMMAND,
    "overlap": overlap.COMMAND,
    "sharpness": sharpness.COMMAND,
    "signs": signs.COMMAND,
    "stability": stability.COMMAND,
}


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m utils.analyze", description=__doc__, formatter_class=raw)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        own = commands.add_parser(name, help=command.summary, description=command.text, formatter_class=raw)
        command.arguments(own)
        own.set_defaults(parser=own)
        own.add_argument("--out", type=Path, metavar="TABLE.csv", help="write all rows to this file")
        if command.draws:
            own.add_argument("--figure", type=Path, metavar="FIG.png", help="draw them into this file")
    return parser


def check_files(args: argparse.Namespace) -> None:
    """Raises ConfigError if --out or --figure cannot be written there."""
    from utils.plots.output import FIGURE_FORMATS, TABLE_FORMATS, check_file

    if args.out is not None:
        check_file("--out", args.out, TABLE_FORMATS)
    if getattr(args, "figure", None) is not None:
        check_file("--figure", args.figure, FIGURE_FORMATS)


def write(result: Result, args: argparse.Namespace) -> None:
    """Writes the CSV and the figure, where they are asked for.

    Raises:
        ConfigError: there is too much for one figure.
        RunError: a file cannot be written.
    """
    from utils.plots.output import DPI, write_file

    figure_file = getattr(args, "figure", None)
    if figure_file is not None and result.draw is not None:
        figure = result.draw()
        write_file("--figure", figure_file, lambda: figure.savefig(figure_file, dpi=DPI))
    if args.out is not None:
        write_whole(args.out, result.rows.to_csv(index=False).encode())


def main(argv: Sequence[str] | None = None) -> int:
    """Runs ``python -m utils.analyze``; returns its exit status."""
    args, rest = make_parser().parse_known_args(argv)
    if rest:  # the parser of all commands would not say which of them has no such argument
        args.parser.error(f"unrecognized arguments: {' '.join(rest)}")
    name = f"{PROGRAM} {args.command}"
    try:
        check_files(args)
        with program(name):
            result = COMMANDS[args.command].run(args)
            write(result, args)
    except Exception as error:  # a fault of the user's, or a bug: one clear line comes last
        return report(error, name)
    for note in result.notes:
        complain(f"{name}: note: {note}")
    say(table_text(result.screen))
    return 0


if __name__ == "__main__":
    from utils.processes.signals import exit_quietly

    exit_quietly(worker=False, program=PROGRAM)
    sys.exit(main())
