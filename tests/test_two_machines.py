"""`torchrun` on two machines (network namespaces), as README says: same figures, a lost machine, a new start."""

import os
import signal
import subprocess
import sys
import time

import pytest

from tests.conftest import ROOT, Finished, Launcher
from tests.namespaces import ADDRESSES, two_machines

# One level of many epochs for the machine that is lost in its middle.
TIMEOUT_MINUTES = 0.25


def start(launch: Launcher, spaces, name: str, **options) -> list[subprocess.Popen]:
    """One torchrun a machine; only the first writes to the run directory."""
    processes = []
    for node, space in enumerate(spaces):
        program = ["-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1", f"--node_rank={node}"]
        program += [f"--master_addr={ADDRESSES[0]}", "--master_port=29411", "harness.py"]
        # Machines need not share a disk: the second has a base_dir of its own.
        folder = launch.folder if node == 0 else launch.folder / "other"
        command = Launcher(folder).command(
            name, program=tuple(program), **{"dist_params.timeout_minutes": TIMEOUT_MINUTES, **options}
        )
        interface = f"{spaces[0].removesuffix('-0')}{node}"
        environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": interface}
        processes.append(
            subprocess.Popen(
                ["ip", "netns", "exec", space, *command],
                cwd=ROOT,
                env=environment,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        )
    return processes


def finish(processes: list[subprocess.Popen], timeout: float) -> list[tuple[int, str]]:
    """(exit status, stderr) of each; kills what does not end in time, and fails."""
    ended = []
    try:
        for process in processes:
            _, err = process.communicate(timeout=timeout)
            ended.append((process.returncode, err))
    except subprocess.TimeoutExpired:
        pytest.fail(f"a machine did not end within {timeout} s")
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    return ended


@pytest.mark.slow
def test_two_machines(launch):
    with two_machines() as spaces:
        one = launch("one")
        ended = finish(start(launch, spaces, "two"), timeout=240)
        assert [status for status, _ in ended] == [0, 0], ended
        two = Finished(launch.folder / "two", 0, "", "")
        assert not (launch.folder / "other" / "two").exists()
        for level in range(3):
            a, b = (run.csv(f"epochwise_metrics/level_{level}_metrics")["train_loss"] for run in (one, two))
            assert ((a - b) / a).abs().max() < 1e-3

        longer = {"experiment_params.epochs_per_level": 60, "prune_params.num_levels": 2}
        processes = start(launch, spaces, "lost", **longer)
        rows = launch.folder / "lost/metrics/epochwise_metrics/level_0_metrics.csv"
        end = time.monotonic() + 200
        while not rows.exists() and time.monotonic() < end:
            time.sleep(0.1)
        os.killpg(processes[1].pid, signal.SIGKILL)
        lost = time.monotonic()
        status, err = finish(processes[:1], timeout=60 * TIMEOUT_MINUTES + 30)[0]
        assert status != 0
        assert "Connection" in err or "timeout" in err.lower()
        print(f"the other machine ended {time.monotonic() - lost:.1f} s after the loss", file=sys.stderr)

        again = {**longer, "experiment_params.resume_expt_name": "lost"}
        ended = finish(start(launch, spaces, "lost", **again), timeout=240)
        assert [status for status, _ in ended] == [0, 0], ended
        summary = Finished(launch.folder / "lost", 0, "", "").csv("summary")
        assert list(summary["epochs"]) == [60, 60]
