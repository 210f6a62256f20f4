#!/usr/bin/env bash
# Any run under Slurm; give the --nodes that the run needs on the command line of sbatch.
#   sbatch examples/launch/slurm.sh train examples/pretrain_6.7b.toml
# Five minutes before the time limit Slurm sends SIGUSR1: the run writes a checkpoint and ends, and the job requeues
# itself. So it does after a fault, and a node that fails requeues it, too; each time the run resumes from the last
# checkpoint. A job that makes no progress is requeued three times in a row, then it stays down.
#SBATCH --job-name=megacoder
#SBATCH --nodes=8
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
what=${1:?usage: slurm.sh train|sft RUN.toml [OVERRIDES]}
run=${2:?usage: slurm.sh train|sft RUN.toml [OVERRIDES]}
shift 2
export GPUS_PER_NODE=${GPUS_PER_NODE:-8} NCCL_IB_TIMEOUT=22
settings=$(python -m megacoder "$what" "$run" "$@" --print-config)
output=$(sed -n '1,/^\[/s/^output = "\(.*\)"$/\1/p' <<< "$settings")
last=$output/checkpoints/step-$(printf %08d "$(sed -n 's/^steps = \(.*\)$/\1/p' <<< "$settings")")
newest() { find "$output" -maxdepth 2 -path '*/checkpoints/step-????????' | sort | tail -n 1; }
logged() { tail -n 1 "$output/metrics.jsonl" 2>/dev/null | sed -n 's/^{"step": \([0-9]*\),.*/\1/p' || true; }
ulimit -Sn 65536 2>/dev/null || ulimit -Sn "$(ulimit -Hn)"  # srun passes it on
mkdir -p "$output/logs/$SLURM_JOB_ID"
idle=$output/logs/$SLURM_JOB_ID/ended-without-progress furthest=$output/logs/$SLURM_JOB_ID/furthest-step
before=$(newest) step=$(cat "$furthest" 2>/dev/null || logged)
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
# Slurm's signal reaches every process of the step, but only the ranks handle it: torchrun must ignore it. With
# --max-restarts 0 all nodes end together and start anew with the job, so that none has to join again, for which
# multi_node.sh sets TORCH_DISABLE_SHARE_RDZV_TCP_STORE.
srun bash examples/launch/check_environment.sh "$output" &&
  srun --kill-on-bad-exit=1 bash -c 'trap "" USR1; exec torchrun "$@"' torchrun \
  --nnodes "$SLURM_NNODES" --nproc-per-node "$GPUS_PER_NODE" --max-restarts 0 \
  --rdzv-backend c10d --rdzv-endpoint "$head:${PORT:-29500}" --rdzv-id "$SLURM_JOB_ID" \
  --log-dir "$output/logs/$SLURM_JOB_ID" --redirects 3 --tee 0:3 -m megacoder "$what" "$run" "$@" || failed=$?
# A newer checkpoint is progress, and so is a step that this job had never logged before: a fault may come ahead of the
# first checkpoint, and each start goes on writing the log where it resumes.
now=$(logged)
if [ "$(newest)" != "$before" ] || [ "${now:-0}" -gt "${step:-0}" ]; then
  rm -f "$idle"
  echo "${now:-0}" > "$furthest"
else
  date >> "$idle"
fi
if [ -e "$output/stopped" ]; then
  echo "not requeued: $output/stopped says why the run has ended"
elif [ -e "$idle" ] && [ "$(wc -l < "$idle")" -gt 3 ]; then
  echo "not requeued: the job has ended four times in a row without progress; see $output/logs/$SLURM_JOB_ID"
elif [ ! -e "$last" ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "${failed:-0}"
