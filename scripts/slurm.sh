#!/usr/bin/env bash
# A run under SLURM, one process for each GPU:
#   sbatch scripts/slurm.sh configs/vmoe_15b.py /shared/runs/15b [options of vmoe train]
# Nodes, GPUs and time are those below, or sbatch's own options. Two minutes before the time ends
# SLURM signals every process to save (more for a large model); the job then queues itself again
# and resumes. All nodes need to see the run folder. DRY_RUN=1 shows what would be run.
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
  echo "use: sbatch $0 CONFIG WORKDIR [options of vmoe train]" >&2
  exit 2
fi
config=$1 workdir=$2
shift 2
# If one process ends the others are ended too; the same command resumes from the checkpoint.
# Some versions of srun do not know how many cores sbatch gave a task.
cores=${SLURM_CPUS_PER_TASK:-12}
line=(srun --kill-on-bad-exit=1 --cpus-per-task="$cores" vmoe train --config "$config" --workdir "$workdir" --distributed "$@")
if [[ ${DRY_RUN:-} ]]; then
  echo "${line[@]}"
  exit
fi
status=0
"${line[@]}" || status=$?
if ((status == 75)); then # stopped by a signal, everything is saved
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
