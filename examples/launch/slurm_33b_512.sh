#!/usr/bin/env bash
# The 33B model on 512 H800s: 64 nodes of 8, a pipeline of 16 ranks, 32 replicas.
#   sbatch examples/launch/slurm_33b_512.sh [OVERRIDES]
# This is slurm.sh with settings of its own; see there for what happens at the time limit or when a node fails.
#SBATCH --job-name=megacoder
#SBATCH --nodes=64
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
exec bash examples/launch/slurm.sh train examples/pretrain_33b.toml "$@"
