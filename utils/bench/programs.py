"""Programs that the benchmark starts: this code, in the user's own folder."""

import os
from pathlib import Path

ROOT = Path(__file__).parents[2]


def with_this_code() -> dict[str, str]:
    """Environment variables with which ``python -m utils.NAME`` is this code in any folder.

    So the paths of a config, which are relative to the user's folder, mean the same there.
    """
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))}


def last_line(stderr: str) -> str:
    """What a program that failed said last."""
    lines = stderr.strip().splitlines()
    return lines[-1].strip() if lines else "no output on stderr"
