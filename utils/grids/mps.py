"""Runs that share a GPU: whether through NVIDIA's Multi-Process Service (MPS), and with what share of it each.

Without MPS, processes on one GPU take turns, and a small network's kernels leave most of it idle in each turn.
"""

import contextlib
import math
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from utils.errors import ConfigError
from utils.grids.grid import Grid, runs_per_gpu
from utils.grids.mps_daemon import PROGRAM, ROOT, MpsRefusal, own_daemon, servers

PROBE_SECONDS = 60  # the first client waits until the daemon has started its server
PERCENTAGE = "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"


@dataclass(frozen=True)
class Sharing:
    """How runs share GPUs.

    Attributes:
        variables: environment variables of every run.
        gpus: CUDA_VISIBLE_DEVICES of the parallel slots, in turn; empty = as without MPS.
        message: what to tell the user; empty without MPS.
    """

    variables: Mapping[str, str] = field(default_factory=dict)
    gpus: tuple[str, ...] = ()
    message: str = ""

    def environment(self, slot: int) -> dict[str, str]:
        """Environment variables of a run in this slot, on top of its others."""
        gpu = {"CUDA_VISIBLE_DEVICES": self.gpus[slot % len(self.gpus)]} if self.gpus else {}
        return {**self.variables, **gpu}


def thread_share(runs: int) -> int:
    """Percentage of a GPU's threads that each of `runs` runs may use: twice an equal share, at most 100.

    NVIDIA's advice (Multi-Process Service, "Volta MPS Execution Resource Provisioning"): so runs overlap while some are
    idle, and none takes the whole GPU from the others.
    """
    return min(100, math.ceil(200 / runs))


@contextlib.contextmanager
def shared_gpus(grid: Grid, slots: int, note: Callable[[str], None]) -> Iterator[Sharing]:
    """How the runs of `grid` share GPUs; a daemon that was started for them is ended on exit.

    Args:
        slots: runs that will be in progress at a time.
        note: told why `auto` does without MPS; not called where there is no GPU.

    Raises:
        ConfigError: `mps: on`, and MPS cannot be used.
    """
    runs = runs_per_gpu(slots, grid.gpus)
    if grid.mps == "off" or runs < 2:
        yield Sharing()
        return
    with contextlib.ExitStack() as stack:
        try:
            sharing = _started(grid, runs, stack)
        except MpsRefusal as refusal:
            stack.close()
            if grid.mps == "on":
                raise ConfigError(f"mps: on is not allowed here: {refusal}") from refusal
            note(f"mps: auto is off here: {refusal}")
            sharing = Sharing()
        yield sharing


def _started(grid: Grid, runs: int, stack: contextlib.ExitStack) -> Sharing:
    """The sharing of `runs` runs per GPU, with a daemon of its own unless one answers already.

    Raises:
        MpsRefusal: MPS cannot be used; with `auto` only where there is a GPU.
    """
    gpus = gpu_names(grid.gpus)
    if not gpus and grid.mps == "auto":
        return Sharing()
    if not gpus:
        raise MpsRefusal("there is no GPU")
    if len(gpus) < len(grid.gpus):
        raise MpsRefusal(f"CUDA shows {len(gpus)} of the {len(grid.gpus)} gpus")
    if not shutil.which(PROGRAM):
        raise MpsRefusal(f"there is no {PROGRAM} on PATH")
    share = os.environ.get(PERCENTAGE) or str(thread_share(runs))
    message = f"{runs} runs share a GPU through {{}}, each with at most {share}% of its threads"
    if _daemon_answers():
        visible = {"CUDA_VISIBLE_DEVICES": ",".join(grid.gpus)} if grid.gpus else {}
        _try_out({**os.environ, **visible, PERCENTAGE: share}, gpus)
        return Sharing({PERCENTAGE: share}, (), message.format("the MPS daemon that was there before"))
    connection = stack.enter_context(own_daemon(",".join(gpus)))
    variables = {**connection, PERCENTAGE: share}
    _try_out({**os.environ, **variables, "CUDA_VISIBLE_DEVICES": ",".join(gpus)}, gpus)
    return Sharing(variables, tuple(gpus) if grid.gpus else (",".join(gpus),), message.format("MPS"))


def _daemon_answers() -> bool:
    """Whether this process's environment leads to an MPS daemon."""
    try:
        servers()
    except MpsRefusal:
        return False
    return True


def gpu_names(gpus: tuple[str, ...]) -> list[str]:
    """Names of `gpus`, or of all that this process sees, that mean the same under any CUDA_VISIBLE_DEVICES.

    Raises:
        MpsRefusal: the driver does not work.
    """
    given = ",".join(gpus) if gpus else os.environ.get("CUDA_VISIBLE_DEVICES")
    env = os.environ if given is None else {**os.environ, "CUDA_VISIBLE_DEVICES": given}
    with _probe(env) as found:
        pass
    entries = [entry.strip() for entry in (given or "").split(",")]
    # CUDA's UUID of a MIG instance does not say that it is one; it is used only where the user has named it.
    entries += [""] * len(found)
    return [entry if entry.startswith("MIG-") else f"GPU-{uuid}" for entry, uuid in zip(entries, found)]


def _try_out(env: Mapping[str, str], gpus: list[str]) -> None:
    """Check that a client of the daemon gets the GPUs, and gets them through MPS.

    Raises:
        MpsRefusal: it does not.
    """
    with _probe(env, "--hold") as found:
        missing = [gpu for gpu in gpus if gpu.startswith("GPU-") and gpu.removeprefix("GPU-") not in found]
        if missing or len(found) != len(gpus):
            raise MpsRefusal(f"its clients see {len(found)} of {len(gpus)} GPUs")
        if not servers(env):
            raise MpsRefusal("CUDA does not use the daemon")


@contextlib.contextmanager
def _probe(env: Mapping[str, str], *words: str) -> Iterator[list[str]]:
    """UUIDs of the GPUs that a process with these variables sees; with --hold, it uses them until the exit.

    Raises:
        MpsRefusal: CUDA reports an error, or does not answer.
    """
    probe = subprocess.Popen(
        [sys.executable, "-m", "utils.grids.cuda_probe", *words], cwd=ROOT, env=dict(env), text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    late = threading.Timer(PROBE_SECONDS, probe.kill)
    late.start()
    try:
        with probe:  # on exit its pipes are closed, which ends it, and it is waited for
            assert probe.stdout and probe.stderr
            found = []
            while line := probe.stdout.readline().strip():  # up to its empty line, or its end
                found.append(line)
            if not found and probe.wait():
                lines = probe.stderr.read().strip().splitlines()
                raise MpsRefusal(lines[-1] if lines else f"CUDA does not answer within {PROBE_SECONDS} s")
            yield found
    finally:
        late.cancel()
