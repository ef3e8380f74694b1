#!/usr/bin/env bash
# A run on all workers of a TPU pod slice; each worker needs the project in ~/vmoe, with its .venv:
#   scripts/launch/tpu_pod.sh [--dry-run] TPU_NAME ZONE CONFIG WORKDIR [options of vmoe train]
# This one was compiled for 32 TPU v5e, topology 4x8 (13.3 GB of the 16 GB of each, not run;
# docs/results/compiled.md):
#   scripts/launch/tpu_pod.sh TPU_NAME ZONE configs/imagenet21k_b16.py gs-mount/runs/b16 \
#       --mesh data=8,expert=4 --batch-size 4096 --model.dtype bfloat16
# JAX reads the process numbers from the TPU. Ctrl-C only closes the connection; to save and stop:
#   gcloud compute tpus tpu-vm ssh TPU_NAME --zone ZONE --worker all --command 'pkill -TERM vmoe'
# The same command then resumes. All workers need access to the run folder.
set -euo pipefail

dry_run=
if [[ ${1:-} == --dry-run ]]; then
  dry_run=1
  shift
fi
if (($# < 4)); then
  echo "usage: $0 [--dry-run] TPU_NAME ZONE CONFIG WORKDIR [options of vmoe train]" >&2
  exit 2
fi
name=$1 zone=$2 config=$3 workdir=$4
shift 4
printf -v train '%q ' .venv/bin/vmoe train --config "$config" --workdir "$workdir" --distributed "$@"
command=(gcloud compute tpus tpu-vm ssh "$name" --zone "$zone" --worker all --command "cd vmoe && $train")
if [[ $dry_run ]]; then
  printf '%q ' "${command[@]}"
  echo
else
  exec "${command[@]}"
fi
