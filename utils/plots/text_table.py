"""A table of text in a terminal."""

import textwrap
from collections.abc import Sequence

import pandas as pd

WIDTH = 100
GAP = 2  # blanks between columns
KEPT = " \u00b1 "  # never at the end of a line


def text_table(frame: pd.DataFrame, width: int = WIDTH) -> str:
    """The table in at most `width` columns: headers and cells that are too wide go on in further lines.

    The first column stands left, the others right. Single words are not cut: a table of very long ones is wider.
    """
    rows = [[str(name) for name in frame.columns], *([str(cell) for cell in row] for row in frame.to_numpy())]
    columns = list(zip(*rows, strict=True))
    least = [max(len(word) for cell in column for word in _words(cell)) for column in columns]
    room = width - GAP * (len(columns) - 1)
    widths = [max(map(len, column)) for column in columns]
    if sum(widths) > room:  # headers give way first
        widths = [max(small, *map(len, column[1:]), 1) for small, column in zip(least, columns)]
    while sum(widths) > room and widths != least:
        slack = [now - small for now, small in zip(widths, least)]
        widest = max(range(len(widths)), key=lambda place: (slack[place] > 0, widths[place]))
        widths[widest] -= 1
    lines = [line for number, row in enumerate(rows) for line in _lines(row, widths, bottom=number == 0)]
    return "\n".join(line.rstrip() for line in lines)


def _words(cell: str) -> list[str]:
    """What is not cut: words, 'mean \u00b1 deviation', and what stands in brackets."""
    return [word.replace("\0", " ") for word in _joined(cell).split()]


def _joined(cell: str) -> str:
    before, bracket, inside = cell.replace(KEPT, KEPT.replace(" ", "\0")).partition(" (")
    return before + bracket + inside.replace(" ", "\0")


def _lines(row: Sequence[str], widths: Sequence[int], bottom: bool) -> list[str]:
    cells = [textwrap.wrap(_joined(cell), width, break_long_words=False, break_on_hyphens=False) or [""]
             for cell, width in zip(row, widths)]  # fmt: skip
    height = max(map(len, cells))
    blank = [[""] * (height - len(cell)) for cell in cells]
    filled = [empty + cell if bottom else cell + empty for cell, empty in zip(cells, blank)]
    return [
        (" " * GAP)
        .join(
            f"{part:<{width}}" if place == 0 else f"{part:>{width}}"
            for place, (part, width) in enumerate(zip(line, widths))
        )
        .replace("\0", " ")
        for line in zip(*filled)
    ]
