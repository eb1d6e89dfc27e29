"""What a run has noted of its starts, in ``artifacts/environment.json``. Imports no torch: figures use it."""

import json
from pathlib import Path
from typing import Any

from utils.config.run_folder import PLUGIN_COPIES

FAILED = "failed"  # key of the fault that ended a start


def environment_file(run: Path) -> Path:
    """The file of a run that holds one entry per start."""
    return run / "artifacts" / "environment.json"


def plugin_copies(run: Path) -> Path:
    """The folder of a run's copies of its plugins."""
    return run / PLUGIN_COPIES


def saved_plugins(run: Path) -> list[dict[str, Any]]:
    """What a run has noted of its plugins (`Plugin.record`); [] if it has none, or nothing that can be read."""
    found: list = next((entry["plugins"] for entry in saved_starts(run) if entry.get("plugins")), [])
    try:
        return [
            {"file": str(each["file"]), "sha256": str(each["sha256"]), "adds": dict(each["adds"])} for each in found
        ]
    except (ValueError, TypeError, KeyError):
        return []


def noted_failure(run: Path) -> str:
    """The fault that ended a run's last start; "" if none did, or the run was killed before it could say so."""
    failure = next((entry.get(FAILED) for entry in reversed(saved_starts(run))), None)
    return failure if isinstance(failure, str) else ""


def saved_starts(run: Path) -> list[dict[str, Any]]:
    """What a run has noted, one entry per start; none if it has noted nothing that can be read."""
    try:
        entries = json.loads(environment_file(run).read_text())
    except (OSError, ValueError):
        return []
    return [entry for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []


def saved_ticket(run: Path) -> dict[str, Any] | None:
    """What a run has noted of the ticket that it began with; None if it has noted nothing that can be read."""
    return next((entry["ticket"] for entry in saved_starts(run) if entry.get("ticket")), None)


def settled_options(run: Path) -> dict[str, str]:
    """{section.key: value} of what "auto" came to when the run began; empty for a run of older code."""
    try:
        first = json.loads(environment_file(run).read_text())[0]["settled"]
        return {"experiment_params.precision": first["precision"], "dataset.loader": first["loader"]}
    except (OSError, ValueError, TypeError, LookupError):
        return {}


def redraws(ticket: dict[str, Any] | None) -> int:
    """How often weights were drawn anew on the way to a run: by its ticket, its source's ticket, and so on."""
    if not ticket:
        return 0
    return int(ticket["weights"] in ("reinit", "init_signs")) + redraws(ticket.get("ticket"))
