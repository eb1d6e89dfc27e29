"""What a command of utils/analyze.py is: its words, its arguments, and the result that it gives back."""

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

import pandas as pd
from tqdm import tqdm

from utils.errors import ConfigError
from utils.output import is_terminal

if TYPE_CHECKING:
    from matplotlib.figure import Figure

T = TypeVar("T")
SCREEN_WIDTH = 100  # characters of a table's lines
STATISTICS_IMAGES = 10_000  # --batchnorm_images
SHORTEST_NAME = 12  # characters that a name keeps in a table that is too wide


@dataclass
class Result:
    """What a command has found.

    Attributes:
        rows: what --out writes.
        screen: what is printed: some of the rows and columns, under short names.
        draw: makes the figure that --figure writes; None if there is nothing to draw.
        notes: lines for stderr.
    """

    rows: pd.DataFrame
    screen: pd.DataFrame
    draw: "Callable[[], Figure] | None" = None
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Command:
    """One command.

    Attributes:
        summary: one line, for the list of commands.
        text: what --help says: the figures by equation and paper, the columns of the CSV.
        arguments: adds the command's own arguments to its parser.
        run: does the work. It imports torch where it needs it, so that --help answers at once.
        draws: whether it has a figure.
    """

    summary: str
    text: str
    arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], Result]
    draws: bool = True


def progress_bar(total: int, what: str) -> tqdm:
    """A progress bar on stderr, where that is a terminal."""
    return tqdm(total=total, desc=what, disable=not is_terminal(sys.stderr), file=sys.stderr, leave=False)


def progress(items: Iterable[T], total: int, what: str) -> Iterator[T]:
    """The same items, with a `progress_bar`."""
    with progress_bar(total, what) as bar:
        for item in items:
            yield item
            bar.update()


def source_arguments(parser: argparse.ArgumentParser) -> None:
    """Two or more sources, and --levels."""
    parser.add_argument("sources", nargs="+", metavar="RUN|CKPT", help="two or more runs, or two or more checkpoints")
    parser.add_argument("--levels", help="only these levels, as in 0,5,10 (default: all that the runs share)")


def run_arguments(parser: argparse.ArgumentParser) -> None:
    """One run, and --levels."""
    parser.add_argument("run", metavar="RUN", help="directory of a run")
    parser.add_argument("--levels", help="only these levels, as in 0,5,10 (default: all finished ones)")


def runs_arguments(parser: argparse.ArgumentParser) -> None:
    """One or more runs, and --levels."""
    parser.add_argument("sources", nargs="+", metavar="RUN", help="directory of a run, or a folder of runs")
    parser.add_argument("--levels", help="only these levels, as in 0,5,10 (default: all that the runs share)")


def network_arguments(parser: argparse.ArgumentParser) -> None:
    """--config and --data_root of the commands that evaluate networks."""
    parser.add_argument("--config", metavar="FILE", help="network and data of checkpoints that lie in no run")
    data_argument(parser)


def data_argument(parser: argparse.ArgumentParser) -> None:
    """--data_root, for runs, which have their config."""
    parser.add_argument("--data_root", metavar="PATH", help="folder of the images (default: as in the run's config)")


def line_arguments(parser: argparse.ArgumentParser) -> None:
    """How barriers are measured."""
    parser.add_argument("--points", type=int, default=31, help="points on the line, both ends included (default 31)")
    parser.add_argument(
        "--split", choices=("test", "validation", "train"), default="test", help="images of the figures"
    )
    parser.add_argument("--batchnorm", choices=("recompute", "interpolate"), default="recompute",
                        help="BatchNorm statistics on the line (default recompute)")  # fmt: skip
    parser.add_argument("--batchnorm_images", type=int, default=STATISTICS_IMAGES, metavar="N",
                        help=f"training images of recompute; 0 = all (default {STATISTICS_IMAGES})")  # fmt: skip


def check_line(args: argparse.Namespace) -> None:
    """Raises ConfigError if the arguments of `line_arguments` are out of range."""
    if args.points < 2:
        raise ConfigError(f"--points: {args.points} is not allowed: at least 2, the ends of the line")
    if args.batchnorm_images < 0:
        raise ConfigError(f"--batchnorm_images: {args.batchnorm_images} is not allowed: 0 (all) or more")
    if args.batchnorm == "interpolate" and args.batchnorm_images != STATISTICS_IMAGES:
        raise ConfigError(f"--batchnorm_images: {args.batchnorm_images} has no effect with --batchnorm interpolate")


def level_numbers(args: argparse.Namespace) -> list[int] | None:
    """The levels of --levels; None without it. Raises ConfigError for anything but numbers."""
    return None if args.levels is None else whole_numbers("--levels", args.levels)


def whole_numbers(option: str, text: str, least: int = 0) -> list[int]:
    """'0,5,10' as numbers, each once, in the given order.

    Raises:
        ConfigError: a part is no whole number, or below `least`.
    """
    numbers = []
    for part in text.split(","):
        if not part.strip().isdecimal() or int(part) < least:
            raise ConfigError(f"{option}: {text!r} is not allowed: whole numbers from {least} on, as in {least},5,10")
        numbers.append(int(part))
    return list(dict.fromkeys(numbers))


def table_text(frame: pd.DataFrame) -> str:
    """The frame as text, at most `SCREEN_WIDTH` characters wide where shorter names can do that."""
    text = _text(frame)
    for column in [c for c in frame if frame[c].map(lambda value: isinstance(value, str)).all()]:
        excess = max(map(len, text.splitlines())) - SCREEN_WIDTH
        longest = int(frame[column].map(len).max()) if len(frame) else 0
        if excess > 0 and longest > SHORTEST_NAME:
            room = max(SHORTEST_NAME, longest - excess)
            frame = frame.copy()
            frame[column] = [_shortened(value, room) for value in frame[column]]
            text = _text(frame)
    return text


def _text(frame: pd.DataFrame) -> str:
    shown = frame.astype(object).where(frame.notna(), "-")
    return shown.to_string(index=False, float_format=lambda value: f"{value:.4g}")


def _shortened(name: str, room: int) -> str:
    """The end of a name, which tells layers and runs apart better than its beginning."""
    return name if len(name) <= room else "…" + name[1 - room :]


def selected(frame: pd.DataFrame, columns: dict[str, str]) -> pd.DataFrame:
    """Columns of a frame under the names that the screen shows."""
    return frame[list(columns)].rename(columns=columns)


def shown_rows(frame: pd.DataFrame, keys: Sequence[str], whole: str) -> pd.DataFrame:
    """The rows of whole networks; those of the layers too, where there is a single combination of `keys`."""
    return frame if len(frame[list(keys)].drop_duplicates()) == 1 else frame[frame["layer"] == whole]
