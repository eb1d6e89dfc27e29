"""Software, hardware, code version and command line of a run."""

import contextlib
import datetime
import functools
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch


def describe() -> dict[str, Any]:
    """One entry of ``artifacts/environment.json``, in plain values."""
    return {
        "started": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": sys.argv,
        "folder": str(Path.cwd()),
        "host": platform.node(),
        "platform": platform.platform(),
        "processor": processor(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "cuda": torch.version.cuda if torch.cuda.is_available() else None,
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "processes": int(os.environ.get("WORLD_SIZE", 1)),
        "threads": torch.get_num_threads(),
        "git_commit": git_commit(),
        "git_dirty": git_commit() is not None and bool(_git("status", "--porcelain")),
    }


def processor() -> str:
    """Name of the CPU; that of its architecture where the system does not tell more."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
        if name:
            return name
    return platform.processor() or platform.machine()


@functools.cache
def git_commit() -> str | None:
    """Commit of the code that runs; None outside a git checkout.

    None, too, where an outer repository does not track this code: its commit says nothing of it.
    """
    return _git("rev-parse", "HEAD") if _git("ls-files", "--error-unmatch", Path(__file__).name) else None


def _git(*words: str) -> str | None:
    here = Path(__file__).parent
    try:
        done = subprocess.run(["git", "-C", str(here), *words], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
