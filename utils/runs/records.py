"""What a run has noted of its starts, in ``artifacts/environment.json``. Imports no torch: figures use it."""

import json
from pathlib import Path
from typing import Any


def environment_file(run: Path) -> Path:
    """The file of a run that holds one entry per start."""
    return run / "artifacts" / "environment.json"


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


def redraws(ticket: dict[str, Any] | None) -> int:
    """How often weights were drawn anew on the way to a run: by its ticket, its source's ticket, and so on."""
    if not ticket:
        return 0
    return int(ticket["weights"] in ("reinit", "init_signs")) + redraws(ticket.get("ticket"))
