#!/usr/bin/env bash
# Two machines of eight GPUs under Slurm; sbatch configs/slurm.sh CONFIG NAME [--section.key=value ...]
#
# Slurm sends SIGUSR1 five minutes ahead of the time limit: the state is saved, and the script queues itself again, to
# go on where the run stands. torchrun starts the workers anew up to three times after a fault (elastic restart); they
# resume from the last saved state. The job's number names the launch (--rdzv_id): a --experiment_params.resume_level
# is obeyed once, not again at each restart. A job whose run fails ends with the run's status.
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

# A run that is there is resumed, else one is started. Give a base_dir here, not in CONFIG, which is not looked into.
base_dir=experiments
for word in "$@"; do
    case $word in --experiment_params.base_dir=*) base_dir=${word#*=} ;; esac
done
name_option=expt_name
[ -e "$base_dir/$name/expt_config.yaml" ] && name_option=resume_expt_name

# What torchrun waits for a state to be saved, as --shutdown_timeout; by itself it waits 30 s.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=120
srun torchrun --nnodes "$SLURM_JOB_NUM_NODES" --nproc_per_node 8 --max-restarts 3 \
    --rdzv_backend c10d --rdzv_endpoint "$head:29400" --rdzv_id "$SLURM_JOB_ID" \
    harness.py --config "$config" "--experiment_params.$name_option=$name" "$@" &
run=$!

queue_again() {
    scancel --signal=TERM "$SLURM_JOB_ID.0"
    wait "$run" || scontrol requeue "$SLURM_JOB_ID" # unless it has just finished
    exit
}
trap queue_again USR1
wait "$run"
