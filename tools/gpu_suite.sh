#!/usr/bin/env bash
# Everything that needs a GPU, in order of value; a part is meant to take less than nine minutes.
#
#   tools/gpu_suite.sh                     all parts
#   tools/gpu_suite.sh --part ops          one of: correctness ops step peers memory fp8
#   OUT=folder PYTHON=python3.12 SITE=folder-of-pure-python-packages tools/gpu_suite.sh --part peers
#
# Figures go to tools/results/gpu_*.jsonl (or $OUT), one line a measurement, with device, driver, torch and commit
# (MEGACODER_COMMIT where the tree is a copy without its repository). A measurement that already has a line of this
# commit on this device is not taken again, so that a run which was cut off goes on; FRESH=--no-resume takes all anew.
# With MINUTES=8 nothing new begins after that time: call it again for the rest.
set -uo pipefail
cd "$(dirname "$0")/.."
part=all
[ "${1:-}" = --part ] && part=${2:?a part: correctness, ops, step, peers, memory or fp8}
PYTHON=${PYTHON:-python3}
OUT=${OUT:-tools/results}
export PYTHONPATH=$PWD:$PWD/tools${SITE:+:$SITE} PYTHONUNBUFFERED=1
export MEGACODER_COMMIT=${MEGACODER_COMMIT:-$(git describe --always --dirty 2>/dev/null || echo unknown)}
failed=0

current() { [ -e megacoder/_cuda.so ] && [ -z "$(find csrc/cuda -newer megacoder/_cuda.so)" ]; }
current || "$PYTHON" setup.py --quiet build_ext --inplace || exit 1
current || { echo "megacoder/_cuda.so is older than csrc/cuda, and was not built; is nvcc on PATH?"; exit 1; }
"$PYTHON" -c 'from megacoder.core.device import CUDA_LIBRARY, load_cuda_library; load_cuda_library(CUDA_LIBRARY)' || exit 1

wanted() { [ "$part" = all ] || [ "$part" = "$1" ]; }
late() { [ "${MINUTES:-0}" -gt 0 ] && [ "$SECONDS" -ge $((MINUTES * 60)) ] && echo "left for the next call: $*"; }
say() { printf '\n== %s\n' "$*"; }
step() {  # FILE ARGUMENTS...: a row of bench_gpu.py
  local file=$OUT/$1
  shift
  late "$*" && return
  say "$*"
  "$PYTHON" tools/bench_gpu.py "$@" --out "$file" ${FRESH:---resume} || failed=1
}

device=$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -n 1)
once() {  # NAME COMMAND...: what has ended well at this commit on this device is not run again
  local ended="$1 at $MEGACODER_COMMIT on ${device:-no GPU}"
  [ -z "${FRESH:-}" ] && grep -qsx "$ended" "$OUT/gpu_done.txt" && return
  late "$1" && return
  say "$1"
  shift
  if "$@"; then echo "$ended" >>"$OUT/gpu_done.txt"; else failed=1; fi
}
check=("$PYTHON" -m pytest -q -p no:cacheprovider --timeout 300)
at_once() { "$PYTHON" -c 'import xdist' 2>/dev/null && echo "--numprocesses $1 --dist $2"; }  # where pytest-xdist is

if wanted correctness; then
  once "tests of kernels" "${check[@]}" $(at_once 6 worksteal) tests/test_triton_kernels.py tests/test_cuda_kernels.py
  once "tests of steps" "${check[@]}" $(at_once 3 loadfile) tests/test_gpu.py tests/test_ops.py tests/test_model.py
fi
if wanted ops; then
  once ops "$PYTHON" tools/bench_ops.py --out "$OUT/gpu_ops.jsonl"
fi
if wanted step; then
  for shape in "4096 8" "16384 2"; do
    read -r sequence batch <<<"$shape"
    for contender in megacoder gemm; do
      step gpu_step.jsonl --contender $contender --sequence "$sequence" --batch "$batch"
    done
  done
  step gpu_step.jsonl --sequence 16384 --batch 2 --document 2048
  for graph in "" --graph; do  # long microbatches, and short ones, between whose kernels a GPU waits for the host
    step gpu_step.jsonl $graph --sequence 4096 --batch 8 --accumulate 4 --steps 3
    step gpu_step.jsonl $graph --sequence 2048 --batch 1 --accumulate 8 --steps 5
  done
  once profile "$PYTHON" -m megacoder profile examples/pretrain_1.3b.toml --synthetic --steps 3 \
    --global-batch-size 8 --micro-batch-size 8 --trace "$OUT/gpu_trace.json" --out "$OUT/gpu_profile.json"
fi
if wanted peers; then  # ours before and after: the machine's own drift
  for contender in megacoder liger plain torchtitan compiled transformers megacoder; do
    FRESH=--no-resume step gpu_peers.jsonl --contender $contender --sequence 4096 --batch 8
  done
fi
if wanted memory; then
  for contender in megacoder liger transformers plain torchtitan; do
    step gpu_memory.jsonl --memory --contender $contender --sequence 4096 --batch 8
  done
  [ -e "$OUT/gpu_memory.jsonl" ] && "$PYTHON" tools/bench_gpu.py --show "$OUT/gpu_memory.jsonl"
fi
if wanted fp8; then  # needs sm_89; the bf16 rows of the same machine are those of part step
  once "tests of fp8" "${check[@]}" tests/test_gpu_fp8.py tests/test_fp8.py
  once "fp8 casts and products" "$PYTHON" tools/bench_fp8.py --out "$OUT/gpu_fp8.jsonl"
  for shape in "4096 8" "16384 2"; do
    read -r sequence batch <<<"$shape"
    for contender in megacoder gemm; do
      step gpu_step.jsonl --contender $contender --fp8 --sequence "$sequence" --batch "$batch"
    done
  done
fi
exit $failed
