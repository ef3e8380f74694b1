#!/usr/bin/env bash
# A run on all workers of a TPU pod slice, each with the project in ~/vmoe and its environment made:
#   scripts/tpu_pod.sh [--dry-run] TPU_NAME ZONE configs/vmoe_15b.py gs-mount/runs/15b [options of vmoe train]
# The TPU itself numbers the processes. Ctrl-C only ends the connection; to save and stop:
#   gcloud compute tpus tpu-vm ssh TPU_NAME --zone ZONE --worker all --command 'pkill -TERM vmoe'
# The same command then resumes. All workers need to see the run folder.
set -euo pipefail

show=
if [[ ${1:-} == --dry-run ]]; then
  show=1
  shift
fi
if (($# < 4)); then
  echo "use: $0 [--dry-run] TPU_NAME ZONE CONFIG WORKDIR [options of vmoe train]" >&2
  exit 2
fi
name=$1 zone=$2 config=$3 workdir=$4
shift 4
printf -v train '%q ' .venv/bin/vmoe train --config "$config" --workdir "$workdir" --distributed "$@"
line=(gcloud compute tpus tpu-vm ssh "$name" --zone "$zone" --worker all --command "cd vmoe && $train")
if [[ $show ]]; then
  printf '%q ' "${line[@]}"
  echo
else
  exec "${line[@]}"
fi
