#!/usr/bin/env bash
# Several nodes without a scheduler: type the same command on each. HEAD is the name of any one of them.
#   HEAD=node0 NODES=2 bash examples/launch/multi_node.sh train examples/pretrain_6.7b.toml
# NODES=6:8 goes on with as few as six when nodes are lost, and with those that come back; HEAD itself has to stay.
# Without GPUs, to try it: DEVICE=cpu and GPUS_PER_NODE processes.
set -euo pipefail
what=${1:?usage: multi_node.sh train|sft RUN.toml [OVERRIDES]}
run=${2:?usage: multi_node.sh train|sft RUN.toml [OVERRIDES]}
shift 2
: "${HEAD:?the name of the node at which all meet}" "${NODES:?how many nodes, or MIN:MAX}"
export GPUS_PER_NODE=${GPUS_PER_NODE:-8}
# export NCCL_SOCKET_IFNAME=eth0 NCCL_IB_HCA=mlx5   # where a node has several networks
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1  # else a node that was lost cannot join again (torch 2.13)
output=$(python -m megacoder "$what" "$run" "$@" --print-config | sed -n '1,/^\[/s/^output = "\(.*\)"$/\1/p')
ulimit -Sn 65536 2>/dev/null || ulimit -Sn "$(ulimit -Hn)"  # for checkpoints of many ranks; a login shell has 1,024
bash "$(dirname "$0")/check_environment.sh" "$output"
mkdir -p "$output/logs/$(hostname)"
exec torchrun --nnodes "$NODES" --nproc-per-node "$GPUS_PER_NODE" --max-restarts "${RESTARTS:-3}" \
  --rdzv-backend c10d --rdzv-endpoint "$HEAD:${PORT:-29500}" --rdzv-id "${RUN_ID:-megacoder}" \
  --log-dir "$output/logs/$(hostname)" --redirects 3 --tee 0:3 -m megacoder "$what" "$run" "$@"
