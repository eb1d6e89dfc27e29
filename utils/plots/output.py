"""Files that figures and tables are written to: which names are allowed, and writing them."""

from collections.abc import Callable, Sequence
from pathlib import Path

from utils.errors import ConfigError, DataError, RunError

FIGURE_FORMATS = (".png", ".pdf", ".svg", ".eps", ".jpg")
TABLE_FORMATS = (".csv",)
DPI = 200  # dots per inch of .png and .jpg


def check_file(option: str, path: Path, formats: Sequence[str]) -> None:
    """Checks the name of a file to write, before any work.

    Raises:
        ConfigError: it ends in none of `formats`, or its folder does not exist.
    """
    if path.suffix.lower() not in formats:
        raise ConfigError(f"{option}: {path}: ends in none of {', '.join(formats)}")
    if not path.parent.is_dir():
        raise ConfigError(f"{option}: {path.parent}: no such directory")


def write_file(option: str, path: Path, write: Callable[[], None]) -> None:
    """Calls `write`, which writes `path`.

    Raises:
        RunError: the file cannot be written. ConfigError and DataError of `write` pass through.
    """
    try:
        write()
    except (ConfigError, DataError):  # ValueErrors, too
        raise
    except (OSError, ValueError) as error:  # ValueError: matplotlib's, for a bad formula in a title or a name
        raise RunError(f"{option}: {path}: cannot be written: {error}") from error
