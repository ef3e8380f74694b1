#!/usr/bin/env bash
# Sets up the environment, trains a sparse vision model on digits, evaluates it, compares it with
# classic methods, and predicts an image: 3 to 6 minutes. A second run reuses the environment and
# the model. Ctrl-C stops it; the next time it continues from its last checkpoint.
set -euo pipefail
# shellcheck source=environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
run=runs/digits

step() { printf '\n== %s\n' "$1"; }

step "1/4 environment (1 to 3 minutes the first time, then nothing)"
install ""

step "2/4 train configs/digits.py, a V-MoE with 8 experts in two of its four blocks: 2,200 steps
    (about a minute on two cores; the first line comes after the step is compiled)"
vmoe train --config digits --workdir "$run"

step "3/4 evaluate on the held-out test split, and compare with classic methods on the same split
    (half a minute)"
vmoe evaluate --checkpoint "$run"
python -m scripts.experiments baselines --write "$run/digit.png"

step "4/4 predict one image of the test split (ten seconds)"
vmoe predict --checkpoint "$run" "$run/digit.png" --top 3

cat <<END

$root/$run is a run folder with the model summary (model.txt), the metrics (metrics.csv), the config
and the checkpoints. Commands to try next, in $root
with .venv/bin on your PATH:
  vmoe evaluate --checkpoint $run --routing.capacity-factor 0.5     fewer slots, tokens dropped
  vmoe evaluate --checkpoint $run --routing.capacity-factor 0.5 --routing.priority largest_gate
  vmoe train --config digits_dense --workdir runs/digits_dense     the dense counterpart
  vmoe summary vmoe_15b_every2_e32     any model by name, without allocating it
  ./scripts/test.sh
END
