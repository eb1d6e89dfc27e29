"""Lines at the bottom of a terminal that change in place, while whatever else is printed goes above them.

(tqdm's bars and rich's live display leave pieces behind when a window becomes narrower than what they have drawn.)
"""

import contextlib
import math
import os
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any, TextIO

from tqdm import tqdm
from tqdm.utils import disp_len, disp_trim

from utils.output import WIPE, is_terminal

WIDTH, HEIGHT = 80, 24  # of a terminal that tells no size
BAR_COLUMNS = 6  # the least that a bar is good for
ECHO_COLUMNS = 4  # that stay free behind a line: the terminal writes ^C there


def terminal_size(stream: TextIO) -> tuple[int, int]:
    """(columns, rows) of a terminal at this moment."""
    with contextlib.suppress(OSError, ValueError):
        columns, rows = os.get_terminal_size(stream.fileno())
        return columns or WIDTH, rows or HEIGHT
    return WIDTH, HEIGHT


def bar_line(before: str, share: float, after: Sequence[str], columns: int, stream: TextIO) -> str:
    """A line that fills `columns`: a bar between two texts; without the bar where there is no room for it.

    Args:
        share: that is done, 0 to 1.
        after: texts behind the bar, the richest first: the first that leaves room for the bar; without a bar, the last.
        stream: tells the characters that a bar can have.
    """
    for text in after:
        room = columns - disp_len(before) - disp_len(text) - len(" || ")
        if room >= BAR_COLUMNS:
            blocks = tqdm.format_meter(share, 1.0, 0, ncols=room, ascii=not _has_blocks(stream), bar_format="{bar}")
            return f"{before} |{blocks}| {text}"
    line = f"{before}, {after[-1]}"
    return line if disp_len(line) <= columns else f"{after[-1]}, {before}"  # whose end may be cut off


def clock(seconds: float) -> str:
    """A time as mm:ss or h:mm:ss; "?" for one that nobody knows."""
    return "?" if math.isnan(seconds) else tqdm.format_interval(math.ceil(seconds))


def _has_blocks(stream: TextIO) -> bool:
    try:
        "\u2588\u258f".encode(stream.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def room_for_line(stream: TextIO) -> int:
    """Columns that a line may fill at this moment."""
    return max(1, terminal_size(stream)[0] - ECHO_COLUMNS - 1)


class StatusLines:
    """The lines at the bottom of a terminal. In a `with` block; at its end they are gone, and nothing is left of them.

    In the block what is written to sys.stdout and sys.stderr, also by those who have kept these streams (logging),
    goes above the lines. What writes to the terminal in another way, as C libraries and other processes do, appears
    behind the last line.

    Args:
        stream: where they are drawn: a terminal.
    """

    def __init__(self, stream: TextIO):
        self.stream = stream
        self.lines: Sequence[str] = ()  # as they are to be
        self._drawn: list[int] = []  # columns of each line that stands on the terminal
        self._size = (0, 0)  # of the terminal when they were drawn
        self._open_line = False  # whether what was written last ended in the middle of a line
        self._lock, self._process = threading.RLock(), os.getpid()
        self._plain: dict[int, tuple[TextIO, Callable[[str], int]]] = {}

    def __enter__(self) -> "StatusLines":
        for stream in {id(s): s for s in (self.stream, sys.stdout, sys.stderr) if is_terminal(s)}.values():
            self._plain[id(stream)] = stream, stream.write
            replaced: Any = stream
            replaced.write = self._above(stream.write)
        return self

    def __exit__(self, *exception: object) -> None:
        with self._lock:
            self.show(())
            for stream, _ in self._plain.values():
                del stream.write  # the class's own again
            self._plain.clear()

    def show(self, lines: Sequence[str]) -> None:
        """Draws these lines in place of those before. Does nothing outside the block, and where all is as it was."""
        with self._lock:
            same = lines == self.lines and self._drawn and terminal_size(self.stream) == self._size
            self.lines = lines
            if self._plain and not same and not self._open_line:
                self._put(self._erased() + self._drawing())

    def _above(self, plain: Callable[[str], int]) -> Callable[[str], int]:
        """The write of a stream while lines stand: they make room, and come back once the text's last line is whole."""

        def write(text: str) -> int:
            if os.getpid() != self._process or not text:  # a forked process knows nothing of the terminal
                return plain(text)
            with self._lock:
                self._put(self._erased())
                count = plain(text)
                self._open_line = not text.endswith("\n")
                if not self._open_line:
                    with contextlib.suppress(OSError, ValueError):
                        sys.stdout.flush()
                        sys.stderr.flush()
                    self._put(self._drawing())
                return count

        return write

    def _erased(self) -> str:
        """What takes the lines away; they may have been broken into several rows by a window made narrower."""
        columns, _ = terminal_size(self.stream)
        rows = sum(max(1, math.ceil(width / columns)) for width in self._drawn)
        drawn, self._drawn = self._drawn, []
        up = f"\x1b[{rows - 1}A" if rows > 1 else ""
        return f"{up}{WIPE}" if drawn else ""

    def _drawing(self) -> str:
        """What draws the lines: each in one row, with room behind it; those that find no row are left out."""
        self._size = _, rows = terminal_size(self.stream)
        lines = [disp_trim(line, room_for_line(self.stream)) for line in self.lines[: max(1, rows - 1)]]
        self._drawn = [disp_len(line) for line in lines]
        return "\n".join(lines)

    def _put(self, text: str) -> None:
        """Writes to the terminal itself; one that is gone is no fault of the run."""
        plain = self._plain.get(id(self.stream))
        if text and plain:
            with contextlib.suppress(OSError, ValueError):
                plain[1](text)
                self.stream.flush()
