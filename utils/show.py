"""A table of runs: which are running, how far each is, and in which options two of them differ.

    python -m utils.show [RUN ...] [--csv FILE.csv]
    python -m utils.show diff A B

RUN is a run or a folder of runs, of grids too: all that lies below it is shown (default: experiments/). A name alone is
that of a run in experiments/. --csv writes the same to a file, in numbers, with the fault of each failed or damaged
run. `diff` tells the options in which two runs differ.

    state      running: a process has the run locked; stopped: by a signal, or killed; finished: all levels are trained;
               failed: its last start ended with a fault; damaged: its files cannot be read
    level      finished levels / levels to train
    density    of the last finished level
    last, best test accuracy in percent: after the last evaluated epoch, and the highest of all
    time left  to the end of the last level, as fast as in the last two levels

Lines are at most as wide as the terminal, and 100 characters. A stopped or failed run is resumed by
`python harness.py --resume FOLDER`.

Exit status: 0; 1 a run that is asked for is damaged (diff), or the CSV cannot be written; 2 no such run or option.
"""

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from utils.config.run_folder import find_run
from utils.errors import ConfigError, report
from utils.output import best_effort_streams, say

DEFAULT = "experiments"
WIDTH = 100  # the most, and where there is no terminal


def parse(words: Sequence[str]) -> tuple[list[str], str]:
    """(runs and folders, file of --csv or "").

    Raises:
        ConfigError: one fault per word that is neither.
    """
    runs, file, faults, rest = [], "", [], list(words)
    while rest:
        name, equals, value = rest.pop(0).partition("=")
        if name == "--csv":
            file = value if equals else rest.pop(0) if rest else ""
            if not file.endswith(".csv"):
                faults.append(f"--csv: {file!r} is not allowed: the name of a file that ends in .csv")
        elif name.startswith("-"):
            faults.append(f"{name}: unknown option: --csv FILE.csv is the only one (see --help)")
        else:
            runs.append(f"{name}{equals}{value}")
    if faults:
        raise ConfigError(faults)
    return runs, file


def folders(words: Sequence[str]) -> list[Path]:
    """What the words name: folders, or runs in the default folder.

    Raises:
        ConfigError: there is no such folder and no such run.
    """
    return [Path(word) if Path(word).is_dir() else find_run(word, DEFAULT, "RUN") for word in words]


def show(words: Sequence[str]) -> None:
    """Print the table of the runs that `words` name, and write it to the file of --csv."""
    named, file = parse(words)
    from utils.files import write_whole
    from utils.overview.rows import find_all_runs, read_row
    from utils.overview.table import table_csv, table_text

    chosen = folders(named) or [Path(DEFAULT)]
    rows = [read_row(path) for path in find_all_runs(chosen)]
    if file:
        write_whole(Path(file), table_csv(rows).encode())
    say(table_text(rows, _width()) if rows else f"no runs in {' '.join(map(str, chosen))}")


def diff(words: Sequence[str]) -> None:
    """Print the options in which two runs differ."""
    if len(words) != 2:
        raise ConfigError(f"diff: two runs are expected, not {len(words)}: python -m utils.show diff A B")
    a, b = (find_run(word, DEFAULT, "diff") for word in words)
    from utils.overview.differences import differences, differences_text

    found = differences(a, b)
    text = differences_text(found, (words[0], words[1]), _width())
    say(text if found else f"{a} and {b} have the same options")


def _width() -> int:
    return min(WIDTH, shutil.get_terminal_size((WIDTH, 24)).columns)


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``python -m utils.show``; return its exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    if "--help" in words or "-h" in words:
        say(__doc__ or "")
        return 0
    try:
        diff(words[1:]) if words[:1] == ["diff"] else show(words)
    except Exception as error:  # a fault of the user's, or a bug: one clear line comes last
        return report(error, "show")
    return 0


if __name__ == "__main__":
    best_effort_streams("show")
    sys.exit(main())
