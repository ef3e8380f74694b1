#!/usr/bin/env bash
# A run under SLURM, one process for each GPU:
#   sbatch scripts/launch/slurm.sh CONFIG /shared/runs/NAME [options of vmoe train]
# This one was compiled for the 8 H100 of a node (69.2 GB of the 85 GB of each, not run;
# docs/results/compiled.md). With N nodes use data=N and a batch N times as large:
#   sbatch --nodes=1 scripts/launch/slurm.sh configs/imagenet21k_b16.py /shared/runs/b16 \
#       --mesh data=1,expert=8 --batch-size 4096 --model.dtype bfloat16
# Set nodes, GPUs and time below or as options of sbatch. Two minutes before the time limit (set
# more for a large model) SLURM sends SIGTERM; every process saves, and the job requeues itself and
# resumes. All nodes need access to the run folder. DRY_RUN=1 prints the command without running it.
#SBATCH --job-name=vmoe
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

if (($# < 2)); then
  echo "usage: sbatch $0 CONFIG WORKDIR [options of vmoe train]" >&2
  exit 2
fi
config=$1 workdir=$2
shift 2
# If one process exits, srun kills the others; the same command resumes from the checkpoint.
# Some versions of srun ignore the number of cores that sbatch gave a task.
cores=${SLURM_CPUS_PER_TASK:-12}
command=(srun --kill-on-bad-exit=1 --cpus-per-task="$cores" vmoe train --config "$config" --workdir "$workdir" --distributed "$@")
if [[ ${DRY_RUN:-} ]]; then
  echo "${command[@]}"
  exit
fi
status=0
"${command[@]}" || status=$?
if ((status == 75)); then # stopped by a signal after saving a checkpoint
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
