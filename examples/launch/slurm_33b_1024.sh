#!/usr/bin/env bash
# The 33B model on 1,024 H800s: 128 nodes of 8, a pipeline of 16 ranks, 64 replicas.
#   sbatch examples/launch/slurm_33b_1024.sh [OVERRIDES]
# Five minutes before its time is up Slurm sends SIGUSR1: the run writes a checkpoint and ends, and the job queues itself
# again. A node that fails requeues the job, too; either way it goes on from the last checkpoint.
#SBATCH --job-name=megacoder
#SBATCH --nodes=128
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%j.log
set -euo pipefail
what=train run=examples/pretrain_33b.toml
export GPUS_PER_NODE=8 NCCL_IB_TIMEOUT=22
output=$(python -m megacoder "$what" "$run" "$@" --print-config | sed -n 's/^output = "\(.*\)"$/\1/p')
newest() { find "$output/checkpoints" -maxdepth 1 -name 'step-????????' 2>/dev/null | sort | tail -n 1; }
srun bash examples/launch/check_environment.sh "$output"
mkdir -p "$output/logs"
before=$(newest)
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun --kill-on-bad-exit=1 torchrun --nnodes "$SLURM_NNODES" --nproc-per-node 8 --max-restarts 0 \
  --rdzv-backend c10d --rdzv-endpoint "$head:29500" --rdzv-id "$SLURM_JOB_ID" \
  --log-dir "$output/logs/$SLURM_JOB_ID" --redirects 3 --tee 0:3 -m megacoder "$what" "$run" "$@" || failed=$?
steps=$(python -m megacoder "$what" "$run" "$@" --print-config | sed -n 's/^steps = \(.*\)$/\1/p')
last=$output/checkpoints/step-$(printf %08d "$steps")
# Again, but only if this time has brought it further: a mistake in the settings is not tried for ever.
if [ ! -e "$last" ] && [ "$(newest)" != "$before" ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "${failed:-0}"
