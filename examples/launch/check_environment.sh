#!/usr/bin/env bash
# What goes wrong most often, looked at on one node before a run: source it, or run it on every node with srun.
#   srun --ntasks-per-node 1 bash examples/launch/check_environment.sh runs/pretrain_33b
set -euo pipefail
output=${1:?usage: check_environment.sh OUTPUT_FOLDER}
fail() { echo "$(hostname): $*" >&2; exit 1; }

python -c 'import megacoder' || fail "megacoder is not installed in $(command -v python)"
python -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' || fail "torch sees no GPU"
expected=${GPUS_PER_NODE:-8}
found=$(python -c 'import torch; print(torch.cuda.device_count())')
[ "$found" = "$expected" ] || fail "$found GPUs, expected $expected (GPUS_PER_NODE)"
nvidia-smi --query-gpu=ecc.errors.uncorrected.volatile.total --format=csv,noheader | grep -qvE '^(0|\[N/A\])$' &&
  fail "uncorrected memory errors on a GPU; see nvidia-smi -q -d ECC"
[ "$(ulimit -n)" = unlimited ] || [ "$(ulimit -n)" -ge 4096 ] || fail "ulimit -n is $(ulimit -n); checkpoints of many ranks want 4096"
[ "$(ulimit -l)" = unlimited ] || fail "ulimit -l is $(ulimit -l); InfiniBand wants unlimited locked memory"
mkdir -p "$output" && touch "$output/.writable.$(hostname)" && rm "$output/.writable.$(hostname)" ||
  fail "cannot write to $output; is it on storage that all nodes share?"
echo "$(hostname): $found GPUs, $(python -c 'import torch; print("torch", torch.__version__)'), $output is writable"
