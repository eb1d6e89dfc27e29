"""A terminal for tests: a pty, and the screen that a person would see, which breaks long lines anew when resized."""

import fcntl
import os
import pty
import re
import select
import struct
import sys
import termios

from tests.traps import MustBeMet

PIECES = re.compile(r"\x1b\[(\d*)([A-Za-z])|([\r\n])|([^\x1b\r\n]+)")


class Screen:
    """Whole lines and the cursor in them; rows follow from the width, as in terminals that break lines anew (tmux).

    Knows what `utils.status_lines` writes: text, CR, LF, cursor up, clear to the end of the screen.
    """

    def __init__(self, columns: int):
        self.columns = columns
        self.lines, self.row, self.column = [""], 0, 0  # row: index of the line; column: within the whole line
        self.fed = ""

    def feed(self, text: str) -> None:
        self.fed += text
        for number, command, control, plain in PIECES.findall(text):
            line = self.lines[self.row]
            if plain:
                self.lines[self.row] = line[: self.column] + plain + line[self.column + len(plain) :]
                self.column += len(plain)
            elif control == "\r":
                self.column -= self.column % self.columns or (self.columns if self.column else 0)
            elif control == "\n":
                self.row, self.column = self.row + 1, self.column % self.columns
                if self.row == len(self.lines):
                    self.lines.append("")
            elif command == "A":
                for _ in range(int(number)):
                    self._up()
            else:
                assert command == "J", command
                self.lines[self.row :] = [line[: self.column]]

    def _up(self) -> None:
        if self.column >= self.columns:
            self.column -= self.columns
        else:
            self.row -= 1
            above = max(0, len(self.lines[self.row]) - 1) // self.columns * self.columns
            self.column = above + self.column

    @property
    def text(self) -> list[str]:
        return [line.rstrip() for line in self.lines if line.strip()]


class Terminal:
    """A pty of a given width whose output goes to a `Screen`."""

    def __init__(self, columns: int):
        self.near, self.far = pty.openpty()
        self.name = os.ttyname(self.far)
        self.screen = Screen(columns)
        self.resize(columns)

    def resize(self, columns: int) -> None:
        self.read()
        fcntl.ioctl(self.far, termios.TIOCSWINSZ, struct.pack("4H", 24, columns, 0, 0))
        self.screen.columns = columns

    def read(self) -> None:
        """Takes over what has been written so far."""
        while select.select([self.near], [], [], 0)[0]:
            self.screen.feed(os.read(self.near, 1 << 16).decode())

    def close(self) -> None:
        self.read()
        os.close(self.near)
        os.close(self.far)


class Shown(MustBeMet):
    """A trap: the run's output goes to a terminal, with a note, a warning and a log line between epochs.

    Args:
        terminal: name of the pty.
        said: whether something is printed after each epoch.
    """

    def __init__(self, terminal: str, said: bool = False):
        self.terminal, self.said = terminal, said

    def lay(self) -> None:
        import logging
        import warnings

        handle = os.open(self.terminal, os.O_RDWR | os.O_NOCTTY)
        for number in (1, 2):
            os.dup2(handle, number)
        sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
        sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
        from utils.training.trainer import Trainer

        plain, log = Trainer.finish_epoch, logging.StreamHandler()

        def finish(trainer, level, epoch, tally, evaluate):
            self.met()
            figures = plain(trainer, level, epoch, tally, evaluate)
            if self.said:
                print(f"note {level} {epoch}", file=sys.stderr)
                warnings.warn(f"warning {level} {epoch}", stacklevel=1)
                log.emit(logging.LogRecord("x", logging.INFO, "", 0, f"log {level} {epoch}", None, None))
            return figures

        Trainer.finish_epoch = finish
