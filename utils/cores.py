"""CPU cores that this process may use. Imports nothing heavy: utils/run_grid.py asks, too."""

import os


def available_cores() -> int:
    """As many as the process is bound to (``taskset``, Slurm); where the system cannot tell, all of the machine."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def share_of_cores(processes: int) -> int:
    """Threads of each of so many processes that share the cores, at least 1."""
    return max(1, available_cores() // processes)
