"""Tasks of Slurm or MPI: copies of this program that srun or mpirun has started. Imports no torch."""

import itertools
import os

from utils.errors import ConfigError
from utils.processes.place import started_by_launcher

# By launcher of tasks: the variables that number a task, and that count them.
TASKS = {
    "Open MPI": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    "MPI": ("PMI_RANK", "PMI_SIZE"),
    "MVAPICH2": ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE"),
    "jsrun": ("JSM_NAMESPACE_RANK", "JSM_NAMESPACE_SIZE"),
    "Flux": ("FLUX_TASK_RANK", "FLUX_JOB_SIZE"),
}
# By which a run that a grid has started could take itself for one of several tasks.
TASK_VARIABLES = {
    "SLURM_STEP_ID", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", *itertools.chain(*TASKS.values())
}  # fmt: skip
# Slurm numbers from here on the steps that are no srun of the user's: a batch script, the shell of salloc.
SLURM_OWN_STEPS = 0xFFFFFFF0


def foreign_tasks() -> tuple[str, int]:
    """(launcher, number of tasks) where srun or mpirun has started several copies of this program; else ("", 1).

    The environment of a Slurm job alone says nothing: sbatch and salloc set SLURM_NTASKS, and a batch script is task 0,
    for one process. srun sets SLURM_STEP_ID, and counts the tasks of its step.
    """
    env = os.environ
    if started_by_launcher():
        return "", 1
    step, rank = _number(env.get("SLURM_STEP_ID"), SLURM_OWN_STEPS), _number(env.get("SLURM_PROCID"), 0)
    tasks = _number(env.get("SLURM_STEP_NUM_TASKS") or env.get("SLURM_NTASKS"), 1)
    if tasks > 1 and (step < SLURM_OWN_STEPS or (rank > 0 and "SLURM_STEP_ID" not in env)):
        return "srun", tasks
    for name, (task, count) in TASKS.items():
        if task in env and _number(env.get(count), 1) > 1:
            return name, _number(env.get(count), 1)
    return "", 1


def _number(text: str | None, otherwise: int) -> int:
    return int(text) if text is not None and text.isdecimal() else otherwise


def check_tasks(distributed: bool) -> None:
    """Check that no launcher but torchrun has started several copies of this program: each would be the whole run.

    Args:
        distributed: ``dist_params.distributed``; false says that each is a run of its own.

    Raises:
        ConfigError: one has.
    """
    launcher, tasks = foreign_tasks()
    if tasks > 1 and distributed:
        raise ConfigError(
            f"dist_params.distributed: true is not allowed here: {launcher} has started {tasks} tasks, each a copy of "
            "this run. For one run on all of them, have one task per machine start torchrun: srun --ntasks-per-node=1 "
            "torchrun --nnodes N --nproc_per_node GPUS ... harness.py ... (configs/slurm.sh); on one machine, start "
            "harness.py without it. For a run per task, each with its own expt_name: dist_params.distributed=false"
        )
