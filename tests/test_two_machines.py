"""`torchrun` on two machines (network namespaces), as README says: same figures, a lost machine, a new start."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT, Finished, Launcher
from tests.namespaces import ADDRESSES, INTERFACE, kill_all, pids_in, two_machines, unplug
from tests.processes import rows_of
from tests.test_resume_launches import workers_of

pytestmark = pytest.mark.slow

TIMEOUT_MINUTES = 0.25
# One level of many epochs for the machine that is lost in its middle.
LONG = {"experiment_params.epochs_per_level": 60, "prune_params.num_levels": 2}


def start(launch: Launcher, spaces: list[str], name: str, elastic: bool = False, **options) -> list[subprocess.Popen]:
    """One torchrun a machine; only the first writes to the run directory. `elastic` as in configs/slurm.sh."""
    processes = []
    for node, space in enumerate(spaces):
        program = ["-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1"]
        if elastic:
            program += ["--max-restarts=3", "--rdzv_backend=c10d", f"--rdzv_endpoint={ADDRESSES[0]}:29411"]
            # Namespaces have no names, by which the first would find out that the endpoint is its own.
            program += ["--rdzv_id=7", f"--local_addr={ADDRESSES[node]}", f"--rdzv_conf=is_host={1 - node}"]
        else:
            program += [f"--node_rank={node}", f"--master_addr={ADDRESSES[0]}", "--master_port=29411"]
        program.append("harness.py")
        # Machines need not share a disk: the second has a base_dir of its own.
        folder = launch.folder if node == 0 else launch.folder / "other"
        options = {"dist_params.timeout_minutes": TIMEOUT_MINUTES, **options}
        command = Launcher(folder).command(name, program=tuple(program), **options)
        environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": INTERFACE}
        processes.append(
            subprocess.Popen(
                ["ip", "netns", "exec", space, *command], cwd=ROOT, env=environment, text=True,
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, start_new_session=True,
            )
        )  # fmt: skip
    return processes


def finish(process: subprocess.Popen, space: str, timeout: float) -> tuple[int, str]:
    """(exit status, stderr) of a machine's torchrun; fails when it does not end in time, or leaves anything behind."""
    try:
        _, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        kill_all(space)
        pytest.fail(f"a machine did not end within {timeout} s: {process.communicate()}")
    assert not pids_in(space)
    return process.returncode, err


def finish_both(processes: list[subprocess.Popen], spaces: list[str]) -> None:
    ended = [finish(process, space, timeout=240) for process, space in zip(processes, spaces)]
    assert [status for status, _ in ended] == [0, 0], ended


def wait_for_rows(path: Path, rows: int, processes: list[subprocess.Popen]) -> None:
    end = time.monotonic() + 200
    while rows_of(path, 0) < rows:
        ended = [process.communicate() for process in processes if process.poll() is not None]
        assert not ended and time.monotonic() < end, ended
        time.sleep(0.05)


def test_same_figures_as_one_process(launch):
    one = launch("one")
    with two_machines() as spaces:
        finish_both(start(launch, spaces, "two"), spaces)
    two = Finished(launch.folder / "two", 0, "", "")
    assert not (launch.folder / "other" / "two").exists()
    for level in range(3):
        a, b = (run.csv(f"epochwise_metrics/level_{level}_metrics")["train_loss"] for run in (one, two))
        gap = ((a - b) / a).abs().max()
        print(f"level {level}: train_loss of two machines differs by {gap:.1e} at most")
        assert gap < 1e-3


@pytest.mark.parametrize("lost", ["killed", "unplugged"])
def test_a_machine_is_lost(launch, lost):
    """The other ends with a line that says so, and a new pair goes on where the run stands."""
    with two_machines() as spaces:
        processes = start(launch, spaces, "lost", **LONG)
        wait_for_rows(launch.folder / "lost", 2, processes)
        if lost == "unplugged":
            unplug(spaces[1])
        kill_all(spaces[1])
        begin = time.monotonic()
        status, err = finish(processes[0], spaces[0], timeout=60 * TIMEOUT_MINUTES + 30)
        print(f"{lost}: the other machine ended {time.monotonic() - begin:.1f} s later:\n{err}")
        assert status != 0
        faults = [line for line in err.splitlines() if line.startswith("harness: ") and " note: " not in line]
        assert len(faults) == 1 and "a worker was lost" in faults[0]
        if lost == "unplugged":
            return
        rows = rows_of(launch.folder / "lost", 0)
        again = {"experiment_params.expt_name": None, "experiment_params.resume_expt_name": "lost"}
        begun = launch.folder / "lost/metrics/epochwise_metrics/level_0_metrics.csv"
        before = begun.read_text().splitlines()[:rows]
        finish_both(start(launch, spaces, "lost", **LONG, **again), spaces)
    assert begun.read_text().splitlines()[:rows] == before
    assert list(Finished(launch.folder / "lost", 0, "", "").csv("summary")["epochs"]) == [60, 60]


def test_a_worker_of_either_machine_is_killed(launch):
    """torchrun starts all workers anew, on the other machine without counting it: the run goes on."""
    with two_machines() as spaces:
        processes = start(launch, spaces, "run", elastic=True, **LONG)
        rows = 2
        for process in processes[::-1]:
            wait_for_rows(launch.folder / "run", rows, processes)
            rows = rows_of(launch.folder / "run", 0) + 2
            os.kill(workers_of(process.pid)[0], signal.SIGKILL)
        finish_both(processes, spaces)
    run = Finished(launch.folder / "run", 0, "", "")
    assert list(run.csv("summary")["epochs"]) == [60, 60]
    assert len(json.loads((run.path / "artifacts" / "environment.json").read_text())) == 3


def test_machines_left_by_a_killed_test_are_removed():
    with two_machines():  # skips where none can be made
        subprocess.run(["ip", "netns", "add", "tickets_9999999_0"], check=True, timeout=20)
    with two_machines() as spaces:
        assert set(spaces) <= set(os.listdir("/run/netns")) and "tickets_9999999_0" not in os.listdir("/run/netns")
