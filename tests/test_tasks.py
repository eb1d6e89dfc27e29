"""Copies of a run that srun or mpirun has started are refused; one task, a batch script and torchrun are not."""

import pytest

from utils.processes.tasks import TASKS, foreign_tasks

STEP = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_NTASKS": "4"}
CASES = {
    "nothing": ({}, 1),
    "srun, its first task": ({**STEP, "SLURM_PROCID": "0"}, 4),
    "srun, its last task": ({**STEP, "SLURM_PROCID": "3"}, 4),
    "srun of one task in a job of four": ({**STEP, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, 1),
    "a batch script": ({"SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_JOB_ID": "7"}, 1),
    "the shell of salloc": ({"SLURM_NTASKS": "4", "SLURM_JOB_ID": "7"}, 1),
    "salloc's interactive step": ({**STEP, "SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1"}, 1),
    "a later task without a step": ({"SLURM_NTASKS": "2", "SLURM_PROCID": "1"}, 2),
    "torchrun under srun": ({**STEP, "RANK": "0", "WORLD_SIZE": "8", "LOCAL_RANK": "0"}, 1),
    "Open MPI": ({"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"}, 2),
    "MPICH": ({"PMI_RANK": "0", "PMI_SIZE": "3"}, 3),
    "MPICH, one": ({"PMI_RANK": "0", "PMI_SIZE": "1"}, 1),
    "no number": ({"PMI_RANK": "0", "PMI_SIZE": "many"}, 1),
}


@pytest.mark.parametrize("case", CASES)
def test_tasks_are_counted(case, monkeypatch):
    known = [
        *STEP,
        "SLURM_PROCID",
        "RANK",
        "WORLD_SIZE",
        "LOCAL_RANK",
        *(name for pair in TASKS.values() for name in pair),
    ]
    for name in known:
        monkeypatch.delenv(name, raising=False)
    env, tasks = CASES[case]
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert foreign_tasks()[1] == tasks


def test_copies_of_a_run_are_refused_unless_each_is_its_own(fork):
    env = {**STEP, "SLURM_PROCID": "1"}
    run = fork("copies", status=2, env=env)
    assert "srun has started 4 tasks" in run.last_line and "torchrun" in run.last_line and not run.path.exists()
    fork("own", env=env, **{"dist_params.distributed": "false", "prune_params.num_levels": 1})
