"""200 levels in one go: what a process holds stays what it was at level 10, and levels follow each other as fast.

python -m tests.test_long_runs [FOLDER]      prints the figures at levels 10, 100 and 200
"""

import os
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import Launcher
from tests.processes import alive_in_session

LEVELS = 200
OPTIONS = {
    "prune_params.num_levels": LEVELS,
    "prune_params.prune_rate": 0.02,
    "experiment_params.epochs_per_level": 1,
    "optimizer.warmup_epochs": 0,
    "dataset.batch_size": 480,
    "dist_params.nproc": 2,
}


@dataclass
class Held:
    """What one process holds."""

    megabytes: float
    descriptors: int
    threads: int


def held(pid: int) -> Held:
    """Private and shared memory that is resident, open files, threads."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return Held(int(status["VmRSS"].split()[0]) / 1024, len(os.listdir(f"/proc/{pid}/fd")), int(status["Threads"]))


def watch(folder: Path, name: str) -> tuple[dict[int, dict[int, Held]], list[float]]:
    """({level: {pid: Held}}, [moment each level was done])."""
    process = Launcher(folder).start(name, **OPTIONS)
    table = folder / name / "metrics" / "summary.csv"
    seen: dict[int, dict[int, Held]] = {}
    moments: list[float] = []
    while process.poll() is None:
        levels = len(table.read_text().splitlines()) - 1 if table.exists() else 0
        if levels > len(moments):
            moments += [time.monotonic()] * (levels - len(moments))
            if levels < LEVELS:  # at the end they are leaving
                seen[levels] = {pid: held(pid) for pid in alive_in_session(process.pid)}
        time.sleep(0.01)
    _out, err = process.communicate()
    assert process.returncode == 0, err
    return seen, moments


def at(seen: dict[int, dict[int, Held]], level: int) -> dict[int, Held]:
    """What was held at the first level seen from `level` on."""
    return seen[min(known for known in seen if known >= level)]


def pace(moments: list[float], level: int) -> float:
    """Median seconds of the 10 levels up to `level`."""
    return statistics.median(b - a for a, b in zip(moments[level - 11 : level - 1], moments[level - 10 : level]))


@pytest.mark.slow
def test_nothing_grows_over_200_levels(tmp_path):
    seen, moments = watch(tmp_path, "long")
    assert len(moments) == LEVELS
    first, last = at(seen, 10), seen[max(seen)]
    assert max(seen) > LEVELS - 10 and first.keys() == last.keys() and len(first) >= 3
    for pid, before in first.items():
        after = last[pid]
        assert after.megabytes < 1.05 * before.megabytes, f"{before} -> {after}"
        assert after.descriptors <= before.descriptors and after.threads <= before.threads, f"{before} -> {after}"
    # Time on a machine that others use says little; what grows with the level would be far above this.
    assert pace(moments, LEVELS) < 2 * pace(moments, 20)


def main() -> None:
    """Prints one line a process and level."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp(prefix="long_"))
    folder.mkdir(parents=True, exist_ok=True)
    seen, moments = watch(folder, f"long_{os.getpid()}")
    for level in (10, 100, LEVELS - 1):
        for pid, now in at(seen, level).items():
            print(f"level {level:3d}  pid {pid}  {now.megabytes:7.1f} MB  {now.descriptors} fds  {now.threads} threads")
        print(f"level {level:3d}  {pace(moments, max(level, 11)):.3f} s a level (median of 10)")


if __name__ == "__main__":
    main()
