"""What a program prints. Output is best effort: a run does not fail because its words cannot be written.

    say("level 3 is done")     on stdout
    note("...")                on stderr: "harness: note: ..."
    warn("...")                on stderr: "harness: warning: level 3: ..."

Every note and every warning of a program goes through `note` and `warn`, Python's own warnings too; `program` gives the
name, `at_level` the level. Without a program, as where `utils.pruning_utils.prune` is called from a notebook, a warning
is a record of `logging`.
"""

import contextlib
import errno
import io
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import TextIO

log = logging.getLogger(__name__)

USUAL_PROGRAM = "harness"
WIPE = "\r\x1b[J"  # to the start of the cursor's row, then clears from there to the end of the screen
_program: ContextVar[str] = ContextVar("program", default="")
_level: ContextVar[int | None] = ContextVar("level", default=None)

# --- lines -----------------------------------------------------------------------------------------------------------


def say(*lines: str) -> None:
    """Print lines on stdout, as far as it takes them."""
    if lines:
        write_line("\n".join(lines), sys.stdout)


def complain(*lines: str) -> None:
    """Print lines on stderr, as far as it takes them."""
    if lines:
        write_line("\n".join(lines), sys.stderr)


def note(*texts: object) -> None:
    """Print "PROGRAM: note: TEXT" on stderr, a line for each."""
    for text in texts:
        complain(f"{_program.get() or USUAL_PROGRAM}: note: {text}")


def warn(text: str) -> None:
    """Print "PROGRAM: warning: level L: TEXT" on stderr; without a program, log TEXT as a warning."""
    if not _program.get():
        log.warning("%s", text)
        return
    level = _level.get()
    complain(f"{_program.get()}: warning: {'' if level is None else f'level {level}: '}{text}")


def is_terminal(stream: TextIO | None) -> bool:
    """Whether a stream is a terminal on which lines can change in place; not if it is closed."""
    with contextlib.suppress(OSError, ValueError):
        return stream is not None and stream.isatty() and os.environ.get("TERM") != "dumb"
    return False


def write_line(text: str, stream: TextIO | None) -> None:
    """Print a text on a stream, as far as the stream takes it."""
    with contextlib.suppress(OSError, ValueError):  # ValueError: the stream is closed
        try:
            print(text, file=stream, flush=True)
        except UnicodeEncodeError as error:
            print(text.encode(error.encoding, "backslashreplace").decode(error.encoding), file=stream, flush=True)


# --- who speaks ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def program(name: str) -> Iterator[None]:
    """Notes and warnings within, of this thread, name this program. Python's own warnings are told by `warn`."""
    token, before = _program.set(name), warnings.showwarning

    def show(message, category, filename, lineno, file=None, line=None) -> None:
        if file is not None or not _program.get():  # asked for elsewhere, or of another thread
            before(message, category, filename, lineno, file, line)
        else:
            warn(f"{category.__name__}: {' '.join(str(message).split())} ({Path(filename).name}:{lineno})")

    warnings.showwarning = show
    try:
        yield
    finally:
        warnings.showwarning = before
        _level.set(None)
        _program.reset(token)


def at_level(level: int) -> None:
    """Warnings of this thread name this level from now on, until the program ends."""
    _level.set(level)


# --- the streams of a command ----------------------------------------------------------------------------------------


def best_effort_streams(name: str = USUAL_PROGRAM) -> None:
    """Have no write to stdout or stderr fail in this process, which is a command's own.

    Characters that the encoding lacks are escaped. What a closed stream, a pipe without a reader or a full disk does
    not take is lost; with a full disk, a line on stderr says so.
    """
    for number, mode in ((0, os.O_RDONLY), (1, os.O_WRONLY), (2, os.O_WRONLY)):
        _ensure_open(number, mode)
    sys.stdout = _best_effort(sys.stdout, 1, name)
    sys.stderr = _best_effort(sys.stderr, 2, name)


def _ensure_open(number: int, mode: int) -> None:
    """Open /dev/null where a standard stream is closed: the next file that is opened would take its number."""
    try:
        os.fstat(number)
    except OSError:
        opened = os.open(os.devnull, mode)
        if opened != number:
            os.dup2(opened, number)
            os.close(opened)


def _best_effort(stream: TextIO | None, number: int, name: str) -> TextIO:
    encoding, lines, at_once = "utf-8", False, False
    if isinstance(stream, io.TextIOWrapper):
        if isinstance(getattr(stream.buffer, "raw", stream.buffer), _BestEffortFile):
            return stream  # called before
        encoding, lines, at_once = stream.encoding, stream.line_buffering, stream.write_through
    elif stream is not None:  # not Python's own: an IDE's, say
        return stream
    raw = _BestEffortFile(number, lambda error: _tell_of_loss(number, error, name))
    buffer = raw if at_once else io.BufferedWriter(raw)
    lines = lines or number == 2
    return io.TextIOWrapper(buffer, encoding, "backslashreplace", line_buffering=lines, write_through=at_once)


class _BestEffortFile(io.FileIO):
    """A file descriptor that takes all that is written to it; what it cannot write is lost.

    Args:
        lost: called with the first failure.
    """

    def __init__(self, number: int, lost: Callable[[OSError], None]):
        super().__init__(number, "w", closefd=False)
        self.lost, self.failed = lost, False

    def write(self, data) -> int:
        try:
            written = super().write(data)
        except OSError as error:
            if not self.failed:
                self.failed = True
                self.lost(error)
            written = None
        return len(memoryview(data).cast("B")) if written is None else written


def _tell_of_loss(number: int, error: OSError, name: str) -> None:
    if error.errno in (errno.EPIPE, errno.EIO, errno.EBADF):  # nobody reads it any more: no failure
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), number)
    elif number == 1:
        with contextlib.suppress(OSError):
            os.write(2, f"{name}: note: stdout cannot be written ({error.strerror}): what it lacks is lost\n".encode())
