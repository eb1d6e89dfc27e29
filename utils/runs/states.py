"""Resume states on disk, and where a run stands."""

import json
from pathlib import Path
from typing import Any

from utils.errors import RunError


def saved_states(run: Path) -> list[dict[str, Any]]:
    """The index of a run's resume states, newest first; empty when none was saved.

    Raises:
        RunError: it is damaged.
    """
    index = run / "artifacts" / "state.json"
    try:
        entries = json.loads(index.read_text())
        sound = [isinstance(entry["file"] + entry["sha256"], str) and entry["level"] >= 0 for entry in entries]
        if isinstance(entries, list) and entries and all(sound):
            return entries
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise RunError(f"{index} is damaged ({error}); start a level again with resume_level") from error
    raise RunError(f"{index} is damaged; start a level again with resume_level")


def trained_levels(run: Path) -> int:
    """How many levels a run has finished, by its newest resume state. Errors as `saved_states`."""
    return next((state["level"] for state in saved_states(run)), 0)
