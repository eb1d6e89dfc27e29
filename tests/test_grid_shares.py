"""run_grid --list and --only I/N, and the Slurm array that works with them."""

import itertools
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness_params import load_config, make_config
from tests.conftest import ROOT
from tests.plot_helpers import write_run
from tests.test_run_grid import CONFIG, write
from utils.grids.grid import read_grid
from utils.grids.grid_run import GridRun
from utils.grids.process import environment
from utils.grids.sources import share_of
from utils.processes.tasks import foreign_tasks
from utils.run_grid import main

SHORT = {"prune_params.num_levels": 2, "experiment_params.epochs_per_level": 2}
BRANCH = {"ticket_params.source": "imp_seed{seed}", "ticket_params.weights": "reinit", "prune_params.num_levels": 1}
# Branches stand before their sources: in a list they come after them.
RUNS = {
    "far": {**BRANCH, "ticket_params.source": "near_seed{seed}"},
    "near": BRANCH,
    "imp": {},
    "lrr": {"experiment_params.training_type": "lrr", "optimizer.milestones": [0.5, 0.75]},
}


def grid_file(folder: Path, **more) -> str:
    return write(folder, base_dir=str(folder / "my runs"), set=SHORT, runs=RUNS, seeds=[0, 1], **more)


# --- --list ----------------------------------------------------------------------------------------------------------


def test_a_list_is_commands_to_paste(tmp_path, capsys, monkeypatch):
    """In a shell they give the words that the grid starts its runs with; sources come first, and comments say so."""
    path = grid_file(tmp_path, threads=1)
    assert main([path, "--list", "--optimizer.lr=0.2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "# 8 runs: 0 finished before, 0 to resume, 8 to start"
    commands = [shlex.split(line) for line in lines if not line.startswith("#")]
    assert {tuple(words[:2]) for words in commands} == {("python", "harness.py")}
    grid = read_grid(path, {"optimizer.lr": "0.2"})
    assert sorted(words[2:] for words in commands) == sorted(list(run.words) for run in grid.runs)
    names = [load_config(words[2:]).experiment_params.expt_name for words in commands]
    for seed in (0, 1):
        order = [names.index(f"{name}_seed{seed}") for name in ("imp", "near", "far")]
        assert order == sorted(order)
        assert lines[lines.index(f"# near_seed{seed} starts from imp_seed{seed}: once that is finished") + 1].count(
            f"expt_name=near_seed{seed}"
        )
    assert not (tmp_path / "my runs").exists()
    monkeypatch.chdir(tmp_path)
    assert main([path, "--list"]) == 0
    assert f"python {ROOT}/harness.py --config" in capsys.readouterr().out


def test_a_list_leaves_out_what_is_finished(tmp_path, capsys):
    write_run(tmp_path / "runs", "a_seed0", [90, 91])
    write_run(tmp_path / "runs", "b_seed0", [90], planned=2)
    path = write(tmp_path, set={"prune_params.num_levels": 2}, runs={"a": {}, "b": {}, "c": {}})
    assert main([path, "--list"]) == 0
    first, a, b, c = capsys.readouterr().out.splitlines()
    assert (first, a) == ("# 3 runs: 1 finished before, 1 to resume, 1 to start", "# a_seed0: finished")
    assert "resume_expt_name=b_seed0" in b and "expt_name=c_seed0" in c


# --- --only ----------------------------------------------------------------------------------------------------------


CONFIGS = {levels: make_config({"prune_params": {"num_levels": levels}}) for levels in (1, 2, 40)}


@given(
    planned=st.lists(st.tuples(st.integers(-3, 12), st.sampled_from([1, 2, 40])), max_size=12),
    count=st.integers(1, 6),
)
def test_shares_hold_whole_chains_and_each_run_once(planned, count):
    """Whatever starts from what, circles too: they are told of in the check that follows."""
    runs = []
    for number, (source, levels) in enumerate(planned):
        name = f"run{source}" if 0 <= source < len(planned) and source != number else ""
        runs.append(GridRun(f"run{number}", (), CONFIGS[levels], source=name))
    shares = [share_of(runs, number, count) for number in range(1, count + 1)]
    names = [[run.name for run in share] for share in shares]
    assert sorted(itertools.chain(*names)) == sorted(run.name for run in runs)
    for share, inside in zip(shares, names):
        assert all(run.source in inside for run in share if run.source)
        assert inside == [run.name for run in runs if run.name in inside], "in the grid's order"


def test_shares_are_even_and_do_not_change_with_what_is_finished(tmp_path):
    path = grid_file(tmp_path)

    def names(number: int) -> list[str]:
        return [run.name for run in read_grid(path, share=(number, 3)).runs]

    before = [names(number) for number in (1, 2, 3)]
    assert before == [
        ["far_seed0", "near_seed0", "imp_seed0"], ["far_seed1", "near_seed1", "imp_seed1"], ["lrr_seed0", "lrr_seed1"],
    ]  # fmt: skip
    write_run(tmp_path / "my runs", "imp_seed0", [90, 91], **{"experiment_params.epochs_per_level": 2})
    write_run(tmp_path / "my runs", "lrr_seed1", [90], seed=1, **SHORT | RUNS["lrr"])
    assert sorted(names(2)) == sorted(before[1]) and sorted(names(3)) == sorted(before[2])


def test_what_other_shares_do_is_no_fault(tmp_path, capsys):
    """Another job may have begun a run since; a run that cannot be resumed is its own share's fault."""
    path = write(tmp_path, set=SHORT, runs={"a": {}, "b": {}})
    other = write_run(tmp_path / "runs", "b_seed0", [90], planned=2, **{"optimizer.lr": 0.7})
    assert other.exists()
    assert [run.name for run in read_grid(path, share=(1, 2)).runs] == ["a_seed0"]
    assert main([path, "--list", "--only=2/2"]) == 2
    assert "run b_seed0: optimizer.lr: 0.1 would change the experiment" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["0/4", "5/4", "1", "1/", "/2", "a/b", "1/2/3", "-1/2", "1.0/2"])
def test_what_is_no_share(text, tmp_path, capsys):
    assert main([grid_file(tmp_path), "--only", text]) == 2
    fault = f"--only: {text!r} is not allowed: I/N, share I of N, with I from 1 to N"
    assert capsys.readouterr().err == f"run_grid: {fault}\n"


def test_a_share_without_a_run_says_so(tmp_path, capsys):
    assert main([write(tmp_path), "--only", "2/2"]) == 0
    assert capsys.readouterr().out == "run_grid: share 2/2: no run: there are fewer chains of runs than shares\n"


# --- Slurm -----------------------------------------------------------------------------------------------------------

STEP = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_NTASKS": "4", "SLURM_PROCID": "2"}


def test_copies_of_a_grid_are_refused_but_with_a_share_each(tmp_path, monkeypatch, capsys):
    for name, value in STEP.items():
        monkeypatch.setenv(name, value)
    assert main([write(tmp_path)]) == 2
    told = capsys.readouterr().err
    assert told.startswith("run_grid: srun has started 4 tasks, each a copy of this grid.") and "--only I/N" in told
    assert main([write(tmp_path), "--list"]) == 0, "it starts nothing"
    assert main([write(tmp_path), "--list", "--only=1/4"]) == 0
    env = environment(read_grid(write(tmp_path)), 0)
    monkeypatch.setattr(os, "environ", env)
    assert foreign_tasks() == ("", 1), "a run of the grid is one task"


@pytest.fixture
def array_job(tmp_path):
    """Starts configs/slurm_array.sh as a batch job of an array; scontrol only notes how it was called."""
    (tmp_path / "scontrol").write_text(f'#!/bin/bash\necho "$*" >>{tmp_path}/calls\n')
    (tmp_path / "scontrol").chmod(0o755)
    search = f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    job = {"SLURM_JOB_ID": "71", "SLURM_ARRAY_JOB_ID": "70", "SLURM_NTASKS": "1", "SLURM_PROCID": "0"}

    def start(task: int, *words: str, **env: str) -> subprocess.Popen:
        variables = {**os.environ, **job, "PATH": search, "SLURM_ARRAY_TASK_ID": str(task), "OMP_NUM_THREADS": "1"}
        command = ["bash", str(ROOT / "configs" / "slurm_array.sh"), *words]
        return subprocess.Popen(command, cwd=ROOT, env=variables | env, stdout=subprocess.PIPE, text=True)

    return start


def test_a_slurm_job_runs_its_share(array_job, tmp_path):
    path = write(tmp_path, config=CONFIG, set=SHORT, runs={"a": {}, "b": {}})
    job = array_job(2, path, "--threads=1", SLURM_ARRAY_TASK_COUNT="2")
    out, _ = job.communicate(timeout=300)
    assert job.returncode == 0, out
    assert out.splitlines()[0].startswith("run_grid: share 2/2: 1 runs: 0 finished before, 0 to resume, 1 to start")
    assert not (tmp_path / "runs" / "a_seed0").exists()
    assert len(pd.read_csv(tmp_path / "runs" / "b_seed0" / "metrics" / "summary.csv")) == 2
    again = array_job(2, path, "--threads=1", SHARES="2", SLURM_ARRAY_TASK_COUNT="1")
    assert "share 2/2: 1 runs: 1 finished before" in again.communicate(timeout=300)[0] and again.returncode == 0
    assert not (tmp_path / "calls").exists()


def test_a_slurm_job_at_its_time_limit_is_queued_again(array_job, tmp_path):
    path = write(tmp_path, config=CONFIG, set=SHORT | {"experiment_params.epochs_per_level": 100000}, runs={"a": {}})
    job = array_job(1, path, SLURM_ARRAY_TASK_COUNT="1")
    end = time.monotonic() + 300
    while not list((tmp_path / "runs").rglob("level_0_metrics.csv")):
        assert job.poll() is None and time.monotonic() < end
        time.sleep(0.1)
    job.send_signal(signal.SIGUSR1)
    out, _ = job.communicate(timeout=120)
    assert job.returncode == 0 and "stopped by SIGTERM with 1 of 1 runs left" in out
    assert (tmp_path / "calls").read_text() == "requeue 71\n"
    assert (tmp_path / "runs" / "a_seed0" / "artifacts" / "state.json").exists()
