"""CPU cores that this process may use. Imports nothing heavy: utils/run_grid.py asks, too."""

import os
from pathlib import Path


def available_cores() -> int:
    """As many as the process is bound to (``taskset``, Slurm); where the system cannot tell, all of the machine."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def share_of_cores(processes: int) -> int:
    """Threads of each of so many processes that share the cores, at least 1."""
    return max(1, available_cores() // processes)


def started_by_launcher() -> bool:
    """Whether torchrun, or a launcher that speaks as it does, started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ and "LOCAL_RANK" in os.environ


def started_rank() -> int:
    """This process's rank as its launcher gave it; 0 where there is none."""
    return int(os.environ.get("RANK", 0))


def launch_id() -> str:
    """Names the torchrun that started this process, the same when it starts the workers anew; empty without one.

    It is the ``--rdzv_id``, which a job that is queued again may keep. Without one torchrun says "none": then its own
    process is what tells it from others. (Its count of restarts tells nothing: each machine's torchrun keeps its own,
    and does not count the restarts that another machine caused.)
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
