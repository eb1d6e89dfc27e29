#!/usr/bin/env bash
# A grid as a Slurm array, a share of its runs per job:
#
#   sbatch --array=1-8 configs/slurm_array.sh GRID.yaml [--jobs=N] [--section.key=value ...]
#
# Job I of N works on `run_grid --only I/N`. The shares follow from GRID, the options and N: give the same ones again. To
# start some of the jobs again, say the array's size: SHARES=8 sbatch --array=3,5 configs/slurm_array.sh GRID.yaml ...
#
# Slurm sends SIGUSR1 five minutes ahead of the time limit: the runs save their state, and the job queues itself again,
# to go on where they stand. A job with failed runs ends with run_grid's status.
#SBATCH --job-name=grid
#SBATCH --array=1-4
#SBATCH --ntasks=1
#SBATCH --gpus=1
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --output=slurm-%A_%a.out
set -uo pipefail

share="$SLURM_ARRAY_TASK_ID/${SHARES:-$SLURM_ARRAY_TASK_COUNT}"
# Not through srun: this is one task, and run_grid starts the runs.
python -m utils.run_grid "$@" --only "$share" &
grid=$!

queue_again() {
    kill -TERM "$grid"
    wait "$grid" || scontrol requeue "$SLURM_JOB_ID" # unless it has just finished
    exit
}
trap queue_again USR1
wait "$grid"
