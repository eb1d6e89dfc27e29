"""CPU cores, rank and launch of this process. Imports no torch."""

import contextlib
import os
from pathlib import Path


def available_cores() -> int:
    """Number of cores that this process is bound to (``taskset``, Slurm); all cores if the system does not say."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def share_of_cores(processes: int) -> int:
    """Threads per process if so many processes share the cores, at least 1."""
    return max(1, available_cores() // processes)


def started_by_launcher() -> bool:
    """Whether torchrun, or a launcher that sets the same variables, started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ and "LOCAL_RANK" in os.environ


def started_rank() -> int:
    """Rank of this process as set by its launcher; 0 without one."""
    return int(os.environ.get("RANK", 0))


def torchrun_words(script: str) -> list[str]:
    """The words that started torchrun, this process's parent, up to `script`; "torchrun" alone if they are unknown.

    They are read on Linux alone.
    """
    with contextlib.suppress(OSError, ValueError):
        words = Path(f"/proc/{os.getppid()}/cmdline").read_text().split("\0")
        words = words[1 : words.index(script)]  # without the interpreter
        if words and Path(words[0]).name == "torchrun":
            return ["torchrun", *words[1:]]
        if words:
            return ["python", *words]
    return ["torchrun"]


def launch_id() -> str:
    """ID of the current torchrun launch, stable across restarts; empty without torchrun.

    The ``--rdzv_id``, which a requeued job may keep. Without one torchrun says "none": then boot, process id and start
    time of torchrun identify it. (Its count of restarts cannot be part of it: the torchrun of each machine keeps its
    own, and does not count restarts that another machine caused.)
    """
    run_id = os.environ.get("TORCHELASTIC_RUN_ID", "")
    if run_id != "none":
        return run_id
    parent = os.getppid()
    try:
        started = Path(f"/proc/{parent}/stat").read_text().rsplit(")", 1)[1].split()[19]
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {parent} {started}"
    except OSError:  # not Linux
        return ""
