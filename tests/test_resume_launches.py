"""torchrun and Slurm start one command again: its run goes on. Another launch of the same name is refused."""

import datetime
import json
import os
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest
import torch

from tests.conftest import ROOT
from tests.processes import rows_of
from tests.traps import KINDS, SHORT, DieAt, StopAt
from utils import distributed
from utils.processes.place import launch_id

IMP = KINDS["imp"]


def launched(run_id: str, restarts: int = 0) -> dict:
    """The environment of torchrun's only worker."""
    place = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1}
    return {**place, "TORCHELASTIC_RUN_ID": run_id, "TORCHELASTIC_RESTART_COUNT": restarts}


@pytest.mark.parametrize("run_id", ["job", "none"])
def test_a_launch_goes_on_with_its_run_whatever_its_count(fork, run_id):
    """The count is each machine's own: it stays 0 where a worker of another machine has died."""
    fork("run", status=143, trap=StopAt(5), env=launched(run_id), **IMP)
    fork("run", env=launched(run_id), **IMP).assert_same_figures(fork("whole", **IMP))


def test_another_launch_of_the_same_name_is_refused_at_each_attempt(fork):
    fork("run", env=launched("one"), **SHORT)
    for env in (launched("two"), launched("two", restarts=1), {}):
        assert "'run' exists in" in fork("run", status=2, env=env, **SHORT).last_line


@pytest.mark.parametrize("place", range(0, 6))
def test_a_launch_knows_its_run_from_its_first_write_on(fork, place):
    run = fork.start("run", trap=DieAt(place), env=launched("job"), **SHORT).finish(None)
    assert run.status == -signal.SIGKILL
    fork("run", env=launched("job"), **SHORT)


def test_launches_without_an_id_are_told_apart_by_their_process(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    mine = launch_id()
    assert len(mine.split()) == 3 and launch_id() == mine
    monkeypatch.setattr(os, "getppid", os.getpid)
    assert launch_id() not in (mine, "", "none")
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    assert launch_id() == ""


def test_resume_level_is_obeyed_once_a_launch(fork):
    again = {"resume": True, **IMP, "experiment_params.resume_level": 1}

    def seconds_of_level_1(**more) -> float:
        return fork("run", **more).csv("summary")["seconds"][1]

    first = seconds_of_level_1(**IMP)
    stopped = seconds_of_level_1(status=143, trap=StopAt(50), env=launched("one"), **again)
    gone_on = seconds_of_level_1(env=launched("one", restarts=1), **again)
    obeyed = seconds_of_level_1(env=launched("two"), **again)
    assert first != stopped == gone_on != obeyed
    fork("run", resume=True, **IMP).assert_same_figures(fork("whole", **IMP))


def test_options_that_torchrun_decides(fork):
    ignored = {"dist_params.nproc": 3, "dist_params.port": 29500}
    run = fork("run", env=launched("job"), **{**SHORT, **ignored, "dist_params.timeout_minutes": 5})
    notes = [f"harness: note: dist_params.{what} has no effect under torchrun" for what in ("port: 29500", "nproc: 3")]
    assert run.err.splitlines() == notes
    env = {**launched("job"), "WORLD_SIZE": 2, "RANK": 1}  # of any rank: none must wait for the others
    run = fork("alone", status=2, env=env, **SHORT, **{"dist_params.distributed": "false"})
    assert run.err == "harness: dist_params.distributed: False, but torchrun has started 2 processes\n"


def test_processes_started_anew_do_not_meet_the_old_ones():
    """Three ranks meet again and again in one store, each time later ranks find what earlier ones have left there."""
    store, names = torch.distributed.HashStore(), []
    for late in (0, 1, 2):
        found = {}

        def meet(rank: int, late: int = late, found: dict = found) -> None:
            time.sleep(0.1 * (rank == late))
            found[rank] = distributed.agreed_name(store, rank, 3, datetime.timedelta(seconds=20))

        threads = [threading.Thread(target=meet, args=(rank,)) for rank in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(found) == 3 and len(set(found.values())) == 1
        names.append(found[0])
    assert len(set(names)) == 3


# --- torchrun itself -------------------------------------------------------------------------------------------------

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")


def workers_of(torchrun: int) -> list[int]:
    """Its workers, which it starts in sessions of their own."""
    done = subprocess.run(["ps", "-o", "pid=", "--ppid", str(torchrun)], capture_output=True, text=True)
    return [int(pid) for pid in done.stdout.split()]


def wait_for_rows(process: subprocess.Popen, path: Path, rows: int) -> None:
    end = time.monotonic() + 120
    while rows_of(path, 0) < rows:
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.slow
def test_a_killed_worker_is_started_again_and_the_run_goes_on(launch, fork):
    options = {**IMP, "dist_params.nproc": 2, "experiment_params.epochs_per_level": 30}
    process = launch.start("run", program=(*TORCHRUN, "--max-restarts=1", "harness.py"), **options)
    wait_for_rows(process, launch.folder / "run", 2)
    first = workers_of(process.pid)
    assert len(first) == 2
    os.kill(first[1], signal.SIGKILL)
    done = launch.finish("run", process)
    assert done.status == 0, done.err
    assert len(json.loads((done.path / "artifacts" / "environment.json").read_text())) == 2
    done.assert_same_figures(fork("whole", **options))


@pytest.mark.slow
def test_workers_end_with_a_killed_torchrun(launch):
    options = {**IMP, "dist_params.nproc": 2, "experiment_params.epochs_per_level": 100000}
    process = launch.start("run", program=(*TORCHRUN, "harness.py"), **options)
    wait_for_rows(process, launch.folder / "run", 1)
    workers = workers_of(process.pid)
    assert len(workers) == 2
    process.kill()
    process.communicate()
    end = time.monotonic() + 5
    while any(Path(f"/proc/{pid}").exists() for pid in workers):
        assert time.monotonic() < end
        time.sleep(0.05)


# --- Slurm -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def slurm(tmp_path):
    """Starts configs/slurm.sh with programs that only note how they were called; `srun` is a script's text."""

    def start(srun: str, *words: str) -> subprocess.Popen:
        programs = {"srun": srun, "scontrol": "echo node1; echo node2", "scancel": 'kill -TERM "$(cat srun.pid)"'}
        for name, text in programs.items():
            file = tmp_path / name
            file.write_text(f'#!/bin/bash\necho "$$" >{name}.pid\necho "{name} $*" >>calls\n{text}\n')
            file.chmod(0o755)
        env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2"}
        env["SLURM_JOB_NODELIST"] = "node[1-2]"
        command = ["bash", str(ROOT / "configs" / "slurm.sh"), "configs/a.yaml", "mine", *words]
        return subprocess.Popen(command, cwd=tmp_path, env=env)

    return start


@pytest.mark.parametrize("status", [0, 3])
def test_slurm_job_ends_with_its_runs_status(slurm, status):
    assert slurm(f"exit {status}").wait(20) == status


@pytest.mark.parametrize(("status", "queued"), [(143, True), (0, False)])
def test_slurm_job_is_queued_again_unless_finished(slurm, tmp_path, status, queued):
    job = slurm(f"trap 'exit {status}' TERM; touch ready; while :; do sleep 0.05; done")
    end = time.monotonic() + 20
    while not (tmp_path / "ready").exists():
        assert time.monotonic() < end
        time.sleep(0.02)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(20) == 0
    calls = (tmp_path / "calls").read_text()
    assert "scancel --signal=TERM 7.0\n" in calls and ("scontrol requeue 7\n" in calls) == queued


def test_slurm_job_looks_for_the_run_where_it_is_put(slurm, tmp_path):
    (tmp_path / "there" / "mine").mkdir(parents=True)
    (tmp_path / "there" / "mine" / "expt_config.yaml").touch()
    for words, option in [((), "expt_name"), (("--experiment_params.base_dir=there",), "resume_expt_name")]:
        assert slurm("", *words).wait(20) == 0
        assert f"--experiment_params.{option}=mine" in (tmp_path / "calls").read_text().splitlines()[-1]
