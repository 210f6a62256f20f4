#!/usr/bin/env bash
# One node of GPUs. The same command resumes where it stopped, also after Ctrl-C.
#   bash examples/launch/single_node.sh train examples/pretrain_1.3b.toml --steps 1000
# Without GPUs, to try it: DEVICE=cpu and GPUS_PER_NODE processes.
set -euo pipefail
what=${1:?usage: single_node.sh train|sft RUN.toml [OVERRIDES]}
run=${2:?usage: single_node.sh train|sft RUN.toml [OVERRIDES]}
shift 2
export GPUS_PER_NODE=${GPUS_PER_NODE:-$(nvidia-smi --list-gpus | wc -l)}
output=$(python -m megacoder "$what" "$run" "$@" --print-config | sed -n '1,/^\[/s/^output = "\(.*\)"$/\1/p')
ulimit -Sn 65536 2>/dev/null || ulimit -Sn "$(ulimit -Hn)"  # for checkpoints of many ranks; a login shell has 1,024
bash "$(dirname "$0")/check_environment.sh" "$output"
mkdir -p "$output/logs"
# If a rank dies, all end; torchrun restarts them, and they resume from the last checkpoint.
exec torchrun --standalone --nproc-per-node "$GPUS_PER_NODE" --max-restarts "${RESTARTS:-3}" \
  --log-dir "$output/logs" --redirects 3 --tee 0:3 -m megacoder "$what" "$run" "$@"
