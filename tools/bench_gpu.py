"""The training step on one GPU: tokens/s, both MFUs, memory, where the time goes; compared with peers and bare GEMMs.

    python tools/bench_gpu.py --contender megacoder --batch 8 --sequence 4096 --out tools/results/gpu_step.jsonl
    python tools/bench_gpu.py --contender liger --batch 8 --sequence 4096

A 1.3B model and its state fill most of a card, so each contender is a process of its own, and `gpu_suite.sh`
alternates them on one machine. Every step has its own pair of device events; the median is reported with the fastest
and the slowest. The last step runs under torch's profiler, whose kernels are added up by kind.

Contenders: `megacoder` (bf16 weights, fp32 gradients, master weights and moments), `gemm` (the step's matrix products
and nothing else: what the library cannot beat), `liger` (transformers' Llama with Liger-Kernel's ops), `transformers`
and `compiled` (the same without Liger, eager and compiled), `plain` (a Llama in plain torch under torch.compile),
`torchtitan` (its Llama 3, layers and loss each under torch.compile, as its own training does it). Peers hold weights,
gradients and AdamW's state in bf16, which moves fewer bytes than ours. `--fp8` is for the first two, `--graph` and
`--document` for the first. `--memory` measures bytes per token and the largest microbatch that fits instead of
time; `--show` prints the contenders of a results file side by side.
"""

import itertools
import json
import os
import re
import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bench_common import append_record, machine
from contenders.one_gpu import Contender, Data, Step, build

from megacoder.core.config import parse_args
from megacoder.core.console import say, table
from megacoder.core.errors import ConfigError
from megacoder.core.rates import known_peak
from megacoder.model.config import ModelConfig
from megacoder.model.partition import ExecutionConfig
from megacoder.model.presets import PRESETS

_TINY = ModelConfig(
    vocab_size=1024, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=64,
)  # fmt: skip
SHAPES = {
    "1.3b": PRESETS["1.3b"].model, "qwen3-1.7b": PRESETS["qwen3-1.7b"].model,
    "tiny": _TINY, "tiny-qwen3": replace(_TINY, qk_norm=True),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Options:
    """One contender's step."""

    contender: Contender = "megacoder"
    """see the module"""
    shape: str = "1.3b"
    """1.3b or qwen3-1.7b (without peers); tiny or tiny-qwen3 to try the script"""
    batch: int = 8
    """sequences of a microbatch"""
    sequence: int = 4096
    """tokens of a sequence"""
    accumulate: int = 1
    """microbatches of a step"""
    fp8: bool = False
    """multiply the layers' matrices in fp8"""
    graph: bool = False
    """replay microbatches from a CUDA graph"""
    document: int = 0
    """tokens of a document, where sequences are of several, each masked from the others; MFU counts what is seen"""
    steps: int = 10
    """timed, after three to warm up"""
    memory: bool = False
    """time nothing, but find the bytes of a token and the most sequences that fit into a microbatch"""
    kernels: int = 0
    """print that many of the longest kernels"""
    out: Path | None = None
    """append the row to this file of JSON lines"""
    resume: bool = False
    """measure nothing where the file has a row of these options, this device and this commit"""
    show: Path | None = None
    """measure nothing, but print the newest row of each contender in this file, side by side"""


def data_of(options: Options, vocab: int, batch: int) -> Data:
    """Random microbatches of so many sequences."""
    generator = torch.Generator().manual_seed(0)
    shape = (options.accumulate, batch, options.sequence + 1)
    return [(t[:, :-1].contiguous(), t[:, 1:].contiguous()) for t in torch.randint(vocab, shape, generator=generator)]


KINDS = {
    "attention": r"cudnn|flash|fmha|sdpa",
    "matrix products": r"gemm|nvjet|cutlass|cublas|xmma",
    "fp8 casts": r"cast_transpose|amax",
    "optimizer": r"adam|partial_sums|multi_tensor|lpnorm|reduce_norm",
    "norm": r"norm|add_sums",
    "swiglu": r"swiglu|silu",
    "rope": r"rope|rotate",
    "loss": r"cross_entropy|softmax|nll",
    "copies": r"memcpy|memset|copy|fill",
}
"""Kinds of kernels by what their names hold, the first that matches."""


def budget(step: Callable[[], object], show: int) -> dict[str, float]:
    """Milliseconds of one step's kernels by kind; what lies between them is `gaps`."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    kinds: Counter[str] = Counter()
    events = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    for event in events:
        name = event.name.lower()
        kind = next((kind for kind, pattern in KINDS.items() if re.search(pattern, name)), "other")
        kinds[kind] += event.device_time_total / 1e3
    span = (max(e.time_range.end for e in events) - min(e.time_range.start for e in events)) / 1e3
    if show:
        print(profile.key_averages().table(sort_by="device_time_total", row_limit=show, max_name_column_width=90))
    return {**{kind: round(ms, 2) for kind, ms in kinds.most_common()}, "gaps": round(span - sum(kinds.values()), 2)}


def measure(options: Options) -> dict[str, Any]:
    """The row of one contender."""
    if options.memory and (options.graph or options.contender == "gemm"):
        raise ConfigError("--memory tries microbatches of several sizes, which is not for --graph or gemm")
    if options.document > options.sequence:
        raise ConfigError(f"--document {options.document}: a sequence has only {options.sequence} tokens")
    config = SHAPES[options.shape]
    began = time.perf_counter()
    execution = ExecutionConfig(fp8=options.fp8, cuda_graph=options.graph)
    of_data = build(
        options.contender, config, options.sequence, options.accumulate, execution, document=options.document
    )
    if options.memory:
        return memory(of_data, config.vocab_size, options)
    step = partial(of_data, data_of(options, config.vocab_size, options.batch))
    torch.cuda.reset_peak_memory_stats()
    first = step()
    for _ in range(2):
        step()
    torch.cuda.synchronize()
    warm = time.perf_counter() - began
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(options.steps + 1)]
    marks[0].record()
    for mark in marks[1:]:
        last = step()
        mark.record()
    torch.cuda.synchronize()
    seconds = [a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(marks)]
    tokens = options.batch * options.sequence * options.accumulate
    rate = tokens / statistics.median(seconds)
    peak = known_peak(torch.cuda.get_device_name(), torch.bfloat16)
    flops = {
        name: config.training_flops_per_token(options.document or options.sequence, causal=name == "causal")
        for name in ("full", "causal")
    }
    return {
        "seconds": round(statistics.median(seconds), 4),
        "seconds_range": [round(min(seconds), 4), round(max(seconds), 4)],
        "tokens_per_second": round(rate, 1),
        "mfu_full_attention": peak and round(rate * flops["full"] / peak.flops, 4),
        "mfu_causal_attention": peak and round(rate * flops["causal"] / peak.flops, 4),
        "peak_memory_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
        "loss": [round(first, 4), round(last, 4)],
        "seconds_to_build_and_warm_up": round(warm, 1),
        "milliseconds_by_kind": budget(step, options.kernels),
    }


def memory(step: Step, vocab: int, options: Options) -> dict[str, Any]:
    """What a token takes, from the peaks of steps of two sizes, and the largest microbatch that fits.

    Compiled peers run what is compiled for any size, which may take other memory than what is compiled for one.
    """

    def peak(batch: int) -> int | None:
        data = data_of(options, vocab, batch)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        try:
            step(data)
        except torch.OutOfMemoryError:
            return None
        return torch.cuda.max_memory_allocated()

    peak(1)  # what stays comes into being
    capacity = torch.cuda.get_device_properties(0).total_memory
    largest, by_batch = largest_batch(peak, start=options.batch, capacity=capacity)
    few = min(by_batch)
    per_token = (by_batch[largest] - by_batch[few]) / ((largest - few) * options.sequence)
    return {
        "bytes_per_token": round(per_token),
        "fixed_gib": round((by_batch[few] - per_token * few * options.sequence) / 2**30, 2),
        "largest_batch": largest, "largest_tokens": largest * options.sequence,
        "peak_gib_at_largest": round(by_batch[largest] / 2**30, 2), "capacity_gib": round(capacity / 2**30, 2),
    }  # fmt: skip


def largest_batch(peak: Callable[[int], int | None], *, start: int, capacity: int) -> tuple[int, dict[int, int]]:
    """The most sequences that fit, and the peak bytes by number of sequences, of all that were tried and did.

    `peak` of a number that does not fit is None. ConfigError where two do not fit.
    """
    found: dict[int, int] = {}

    def fits(batch: int) -> bool:
        bytes_of = peak(batch)
        if bytes_of is not None:
            found[batch] = bytes_of
        return bytes_of is not None

    half = max(1, start // 2)
    while not (fits(half) and fits(2 * half)):
        half //= 2
        if half == 0:
            raise ConfigError("two sequences do not fit")
    slope = max(1, (found[2 * half] - found[half]) // half)
    guess = max(2 * half, 2 * half + (capacity - found[2 * half]) // slope)
    if fits(guess):
        while fits(guess + 1):
            guess += 1
    else:
        while guess - 1 not in found and not fits(guess - 1):
            guess -= 1
        guess -= 1
    return guess, found


def show(path: Path) -> None:
    """The newest row of each contender, side by side; ConfigError where there are none."""
    if not path.exists():
        raise ConfigError(f"--show {path}: not there")
    rows = {_name(row["options"]): row["result"] for row in map(json.loads, path.read_text().splitlines())}
    figures = list(dict.fromkeys(key for row in rows.values() for key in row if key != "milliseconds_by_kind"))
    table(
        f"{path}, the newest of each", ["contender", *figures],
        [[name, *(str(row.get(key, "")) for key in figures)] for name, row in rows.items()],
    )  # fmt: skip


def _name(options: dict[str, Any]) -> str:
    extras = [word for word in ("fp8", "graph", "memory") if options.get(word)]
    if options.get("document"):
        extras.append(f"documents of {options['document']}")
    batch = "" if options.get("memory") else f"{options['accumulate']} x {options['batch']} x "
    return ", ".join([options["contender"], options["shape"], *extras, f"{batch}{options['sequence']} tokens"])


def _is_there(path: Path, here: dict[str, Any], asked: dict[str, Any]) -> bool:
    for line in path.read_text().splitlines() if path.exists() else ():
        row = json.loads(line)
        same = row["options"] == asked and all(row["machine"][key] == here[key] for key in ("processor", "commit"))
        if same and "failed" not in row["result"]:
            return True
    return False


def main() -> None:
    """Measures, prints a table, appends the row."""
    options = parse_args(Options, None, prog="bench_gpu.py")
    if options.show is not None:
        show(options.show)
        return
    here = machine()
    asked = {key: value for key, value in asdict(options).items() if key not in ("out", "resume", "show")}
    if options.resume and options.out is not None and _is_there(options.out, here, asked):
        say(f"{options.out} has this row")
        return
    try:
        result = measure(options)
    except torch.OutOfMemoryError as error:
        result = {"failed": f"out of memory: {str(error).splitlines()[0]}"}
    except Exception as error:  # a peer that does not run here is a row that says so
        if options.contender in ("megacoder", "gemm"):
            raise
        result = {"failed": f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"}
    rows = [[key, str(value)] for key, value in result.items()]
    table(_name(asked), ["figure", "value"], rows)
    if options.out is not None:
        ops = os.environ.get("MEGACODER_OPS", "")
        append_record(options.out, machine=here, ops=ops, options=asked, result=result)


if __name__ == "__main__":
    main()
