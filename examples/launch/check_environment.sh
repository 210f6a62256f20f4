#!/usr/bin/env bash
# Checks one node, before a run, for what goes wrong most often; srun runs it on every node.
#   srun --ntasks-per-node 1 bash examples/launch/check_environment.sh runs/pretrain_33b
# DEVICE=cpu skips the checks of GPUs, to try the scripts where there is none.
set -euo pipefail
output=${1:?usage: check_environment.sh OUTPUT_FOLDER}
fail() { echo "$(hostname): $*" >&2; exit 1; }

python -c 'import megacoder' || fail "megacoder is not installed in $(command -v python)"
read -r torch found < <(python -c 'import torch; print(torch.__version__, torch.cuda.device_count())') ||
  fail "torch does not run in $(command -v python)"
[ "$(ulimit -n)" = unlimited ] || [ "$(ulimit -n)" -ge 4096 ] ||
  fail "ulimit -n is $(ulimit -n), but checkpoints of many ranks need 4096; raise it with ulimit -Sn"
if [ "${DEVICE:-cuda}" = cuda ]; then
  expected=${GPUS_PER_NODE:-8}
  [ "$found" != 0 ] || fail "torch sees no GPU"
  [ "$found" = "$expected" ] || fail "$found GPUs, expected $expected (GPUS_PER_NODE)"
  nvidia-smi --query-gpu=ecc.errors.uncorrected.volatile.total --format=csv,noheader | grep -qvE '^(0|\[N/A\])$' &&
    fail "uncorrected memory errors on a GPU; see nvidia-smi -q -d ECC"
  [ "$(ulimit -l)" = unlimited ] || fail "ulimit -l is $(ulimit -l); InfiniBand needs unlimited locked memory"
fi
mkdir -p "$output" && probe=$(mktemp "$output/.writable.XXXXXX") && rm "$probe" ||
  fail "cannot write to $output; is it on storage that all nodes share?"
echo "$(hostname): $found GPUs, torch $torch, $output is writable"
