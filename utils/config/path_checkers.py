"""Strict checkers of paths and of runs' names, as utils/config/checkers.py has those of other types."""

import os
from typing import Any

from utils.config.checkers import Strict


class FilePath(Strict):
    """A path; `optional` also allows "". ``~`` is expanded, or mkdir would create a folder of that name."""

    kind = "path"

    def __init__(self, optional: bool = False):
        self.optional = optional
        self.empty = "" if optional else None

    def check(self, value: Any) -> str:
        if isinstance(value, os.PathLike):
            value = os.fspath(value)
        if not isinstance(value, str) or not value.isprintable() or (value and not value.strip()):
            raise self.refuse()
        if not value and not self.optional:
            raise self.refuse()
        return os.path.expanduser(value)

    def help(self) -> str:
        return 'a path, or ""' if self.optional else "a path"


class RunName(Strict):
    """The name of a run's folder inside base_dir, or ""."""

    kind = "name"
    empty = ""
    longest = 200  # bytes: file systems allow 255, and names of temporary files are longer than the final ones

    def check(self, value: Any) -> str:
        if value == "":
            return value
        if not isinstance(value, str) or not value.isprintable() or value != value.strip():
            raise self.refuse()
        if any(part in value for part in ("/", "\\", "..")) or value.startswith(".") or len(value) > self.longest:
            raise self.refuse()
        if len(value.encode()) > self.longest:
            raise self.refuse()
        if value.lower() in ("none", "null"):
            raise ValueError('"" for no name')
        return value

    def help(self) -> str:
        return (
            f'"" or a plain directory name: at most {self.longest} bytes, printable, no / or \\ or .., '
            "no leading dot, no spaces around it"
        )


class RunPath(RunName):
    """The name of a run, or its directory as a shell completes it; ``DIR/NAME`` without a slash at its end.

    ``~`` is expanded: a shell leaves it as it is behind the = of an option.
    """

    def check(self, value: Any) -> str:
        if not isinstance(value, str):
            raise self.refuse()
        folder, slash, name = value.rstrip("/").rpartition("/")
        if value and not name:
            raise self.refuse()
        return os.path.expanduser(folder + slash) + super().check(name)

    def help(self) -> str:
        return f"the directory of a run, or its name: {super().help()}"
