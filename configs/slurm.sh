#!/usr/bin/env bash
# Two machines of eight GPUs under Slurm; sbatch configs/slurm.sh CONFIG NAME [--section.key=value ...]
#
# Slurm sends SIGUSR1 five minutes ahead of the time limit: the state is saved, and the script queues itself again, to
# go on where the run stands. torchrun starts the workers anew up to three times after a fault (elastic restart); they
# resume from the last saved state.
#SBATCH --job-name=tickets
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
set -uo pipefail

config=$1
name=$2
shift 2
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

# A run that is there is resumed, else one is started; torchrun's own restarts find it by its name.
name_option=expt_name
[ -e "experiments/$name/expt_config.yaml" ] && name_option=resume_expt_name

srun torchrun --nnodes "$SLURM_JOB_NUM_NODES" --nproc_per_node 8 --max-restarts 3 \
    --rdzv_backend c10d --rdzv_endpoint "$head:29400" --rdzv_id "$SLURM_JOB_ID" \
    harness.py --config "$config" "--experiment_params.$name_option=$name" "$@" &
trap 'scancel --signal=TERM "$SLURM_JOB_ID.0"; wait; scontrol requeue "$SLURM_JOB_ID"' USR1
wait
