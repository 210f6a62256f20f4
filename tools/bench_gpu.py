"""The training step on one GPU: tokens/s, both MFUs, memory, and where the time goes; beside peers and the GEMM rate.

    python tools/bench_gpu.py --contender megacoder --batch 8 --sequence 4096 --out tools/results/gpu_step.jsonl
    python tools/bench_gpu.py --contender liger --batch 8 --sequence 4096

A 1.3B model and its state fill most of a card, so each contender is a process of its own, and the caller (see
`gpu_suite.sh`) lets them take turns on one machine. Every step has its own pair of device events; the median is quoted,
the fastest and slowest beside it. The last step runs under torch's profiler, whose kernels are added up by kind.

Contenders: `megacoder` (bf16 weights, fp32 gradients, master weights and moments), `gemm` (the step's matrix products
and nothing else: what the library cannot beat), `liger` (transformers' Llama with Liger-Kernel's ops), `transformers`
and `compiled` (it alone, eager and under torch.compile), `plain` (a Llama in plain torch under torch.compile),
`torchtitan` (its Llama 3, layers and loss each under torch.compile, as its own training does it). Peers hold weights,
gradients and AdamW's state in bf16, which moves fewer bytes than ours. `--fp8` is for the first two, `--graph` for the
first.
"""

import itertools
import json
import os
import re
import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from bench_common import machine
from torch import Tensor

from megacoder.core.config import parse_args
from megacoder.core.console import say, table
from megacoder.core.errors import ConfigError
from megacoder.core.metrics import attention_flops_per_token, training_flops_per_token
from megacoder.model.config import ModelConfig

DENSE_BF16_PEAK = 989.4e12
"""H100 SXM, H200, H800: FLOP/s without sparsity, NVIDIA's datasheets."""

SHAPES = {
    "1.3b": ModelConfig(),
    "tiny": ModelConfig(
        vocab_size=1024, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64,
    ),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Options:
    """One contender's step."""

    contender: Literal["megacoder", "gemm", "liger", "transformers", "compiled", "plain", "torchtitan"] = "megacoder"
    """see the module"""
    shape: str = "1.3b"
    """1.3b, or tiny to try the script"""
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
    steps: int = 10
    """timed, after three to warm up"""
    kernels: int = 0
    """print that many of the longest kernels"""
    out: Path | None = None
    """append the row to this file of JSON lines"""
    resume: bool = False
    """measure nothing where the file has a row of these options, this device and this commit"""


Step = Callable[[], float]
"""One update; returns nothing that waits for the device but the loss, read when all is timed."""


def data_of(options: Options, vocab: int) -> list[tuple[Tensor, Tensor]]:
    """(tokens, labels) of every microbatch, on the CPU."""
    generator = torch.Generator().manual_seed(0)
    shape = (options.accumulate, options.batch, options.sequence + 1)
    return [(t[:, :-1].contiguous(), t[:, 1:].contiguous()) for t in torch.randint(vocab, shape, generator=generator)]


def ours(config: ModelConfig, options: Options) -> Step:
    """The engine of `megacoder train` on one rank."""
    from megacoder.data.stream import Batch
    from megacoder.model.partition import ExecutionConfig
    from megacoder.ops.adamw import AdamWConfig
    from megacoder.parallel.collectives import World
    from megacoder.parallel.config import ParallelConfig
    from megacoder.parallel.mesh import Mesh
    from megacoder.train.engine import Engine
    from megacoder.train.layout import LayoutRequest

    request = LayoutRequest(
        model=config, parallel=ParallelConfig(), seq_length=options.sequence,
        global_batch_size=options.batch * options.accumulate, micro_batch_size=options.batch,
    )  # fmt: skip
    layout, device = request.layout(1), torch.device("cuda", 0)
    engine = Engine(
        config, layout, Mesh(World(0, 1, 0, device, None), layout.dims, sequence_parallel=False),
        execution=ExecutionConfig(fp8=options.fp8, cuda_graph=options.graph),
        bucket_elements=request.parallel.bucket_elements, optimizer=AdamWConfig(), dtype=torch.bfloat16, seed=0,
    )  # fmt: skip
    tokens, labels = map(torch.cat, zip(*data_of(options, config.vocab_size), strict=True))
    batch = Batch(tokens=tokens, labels=labels)

    def step() -> float:
        microbatches = engine.microbatches(batch, options.batch)
        loss_sum, num_tokens = engine.sum_losses(engine.forward_backward(microbatches))
        engine.update(lr=1e-4, num_tokens=int(num_tokens), max_grad_norm=1.0)
        return loss_sum / num_tokens

    return step


def peer(config: ModelConfig, options: Options) -> Step:
    """A torch module that maps (tokens, labels) to a mean loss, with torch's fused AdamW."""
    model = {
        "liger": _liger, "transformers": _transformers, "compiled": _compiled, "plain": _plain,
        "torchtitan": _torchtitan,
    }[options.contender]  # fmt: skip
    with torch.device("cuda"):
        module, loss_of = model(config, options)
    params = list(module.parameters())
    optimizer = torch.optim.AdamW(params, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    data = data_of(options, config.vocab_size)

    def step() -> float:
        total = torch.zeros((), device="cuda")
        for tokens, labels in data:
            loss = loss_of(tokens.cuda(), labels.cuda()) / len(data)
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return total.item()

    return step


def _llama(config: ModelConfig) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
             "num_key_value_heads", "head_dim", "max_position_embeddings")  # fmt: skip
    settings = {name: getattr(config, name) for name in names}
    return LlamaForCausalLM(LlamaConfig(**settings, tie_word_embeddings=False, use_cache=False)).bfloat16().train()


def _transformers(config: ModelConfig, options: Options) -> tuple[Any, Callable[[Tensor, Tensor], Tensor]]:
    model = _llama(config)
    return model, lambda tokens, labels: model(input_ids=tokens, labels=tokens, shift_labels=labels).loss


def _liger(config: ModelConfig, options: Options) -> tuple[Any, Callable[[Tensor, Tensor], Tensor]]:
    from liger_kernel.transformers import apply_liger_kernel_to_llama

    apply_liger_kernel_to_llama()
    return _transformers(config, options)


def _compiled(config: ModelConfig, options: Options) -> tuple[Any, Callable[[Tensor, Tensor], Tensor]]:
    model = _llama(config)
    run = torch.compile(model)
    return model, lambda tokens, labels: run(input_ids=tokens, labels=tokens, shift_labels=labels).loss


def _plain(config: ModelConfig, options: Options) -> tuple[Any, Callable[[Tensor, Tensor], Tensor]]:
    from contenders.job import Job
    from contenders.plain_llama import LlamaPart, cross_entropy

    job = Job(
        row="dp", rank=0, dtype="bfloat16", num_microbatches=1, batch=options.batch, sequence=options.sequence,
        vocab_size=config.vocab_size, hidden_size=config.hidden_size, intermediate_size=config.intermediate_size,
        num_layers=config.num_hidden_layers, num_heads=config.num_attention_heads,
    )  # fmt: skip
    model = LlamaPart(job).bfloat16()
    run = torch.compile(lambda tokens, labels: cross_entropy(model(tokens), labels))
    return model, run


def _torchtitan(config: ModelConfig, options: Options) -> tuple[Any, Callable[[Tensor, Tensor], Tensor]]:
    """Version 0.2.2; others divide the loss themselves.

    It wants torchdata, datasets, dill, multiprocess, xxhash, tomli and einops beside what transformers needs.
    """
    from torchtitan.components.loss import cross_entropy_loss
    from torchtitan.models.llama3.model.args import TransformerModelArgs
    from torchtitan.models.llama3.model.model import Transformer

    model = Transformer(
        TransformerModelArgs(
            dim=config.hidden_size, n_layers=config.num_hidden_layers, n_heads=config.num_attention_heads,
            n_kv_heads=config.num_key_value_heads, vocab_size=config.padded_vocab_size, max_seq_len=options.sequence,
            norm_eps=config.rms_norm_eps, rope_theta=config.rope_theta,
            # It makes two thirds of four times the width into a multiple of this, for 1.3B the inner width itself.
            multiple_of=128,
        )
    )  # fmt: skip
    with torch.no_grad():
        model.init_weights()
    inner = model.layers["0"].feed_forward.w1.out_features
    if inner != config.intermediate_size:
        raise ConfigError(f"torchtitan's inner width is {inner}, that of {options.shape} {config.intermediate_size}")
    model.bfloat16()  # rotations, too, would be rounded; they are complex and stay
    for name, layer in list(model.layers.named_children()):
        model.layers.register_module(name, torch.compile(layer, fullgraph=True))
    loss_of = torch.compile(cross_entropy_loss)
    return model, lambda tokens, labels: loss_of(model(tokens), labels) / labels.numel()


def gemm(config: ModelConfig, options: Options) -> Step:
    """Every linear layer's three products at the step's shapes, weight gradients added up in fp32.

    In fp8 the layers' matrices are cast beforehand.
    """
    from megacoder.ops.linear import Factor, Precision, accumulate_weight_grad, linear_forward, linear_input_grad

    random = partial(torch.randn, device="cuda", dtype=torch.bfloat16)
    dim, inner = config.hidden_size, config.intermediate_size
    qkv = (config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim
    layer = [(qkv, dim), (dim, config.num_attention_heads * config.head_dim), (2 * inner, dim), (dim, inner)]
    shapes = layer * config.num_hidden_layers
    rows = options.batch * options.sequence
    precision = Precision(fp8=options.fp8)
    made = {
        shape: (
            precision.input(random(rows, shape[1])), precision.weight(random(*shape)),
            precision.grad(random(rows, shape[0])), torch.zeros(shape, device="cuda"),
        ) for shape in set(layer)
    }  # fmt: skip
    head_rows = min(rows, 8192)
    head = (config.padded_vocab_size, dim)
    of_head = random(head_rows, dim), random(*head), random(head_rows, head[0]), torch.zeros(head, device="cuda")

    def products(x: Factor, weight: Factor, grad: Factor, total: Tensor) -> None:
        linear_forward(x, weight)
        linear_input_grad(grad, weight)
        accumulate_weight_grad(total, grad, x)

    def step() -> float:
        for _ in range(options.accumulate):
            for shape in shapes:
                products(*made[shape])
            for _ in range(rows // head_rows):
                products(*of_head)
        return float("nan")

    return step


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


def budget(step: Step, show: int) -> dict[str, float]:
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
    if options.fp8 and options.contender not in ("megacoder", "gemm"):
        raise ConfigError(f"--fp8 is not for {options.contender}")
    if options.graph and options.contender != "megacoder":
        raise ConfigError(f"--graph is not for {options.contender}")
    config = SHAPES[options.shape]
    build = {"megacoder": ours, "gemm": gemm}.get(options.contender, peer)
    began = time.perf_counter()
    step = build(config, options)
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
    flops = {
        name: training_flops_per_token(
            config.num_matmul_params,
            attention_flops_per_token(
                layers=config.num_hidden_layers, heads=config.num_attention_heads, head_dim=config.head_dim,
                seq_length=options.sequence, causal=name == "causal",
            ),
        )
        for name in ("full", "causal")
    }  # fmt: skip
    return {
        "seconds": round(statistics.median(seconds), 4),
        "seconds_range": [round(min(seconds), 4), round(max(seconds), 4)],
        "tokens_per_second": round(rate, 1),
        "mfu_full_attention": round(rate * flops["full"] / DENSE_BF16_PEAK, 4),
        "mfu_causal_attention": round(rate * flops["causal"] / DENSE_BF16_PEAK, 4),
        "peak_memory_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
        "loss": [round(first, 4), round(last, 4)],
        "seconds_to_build_and_warm_up": round(warm, 1),
        "milliseconds_by_kind": budget(step, options.kernels),
    }


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
    here, asked = machine(), {key: value for key, value in asdict(options).items() if key not in ("out", "resume")}
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
    name = f"{options.contender}{', fp8' if options.fp8 else ''}{', graph' if options.graph else ''}"
    title = f"{name}, {options.shape}, {options.accumulate} x {options.batch} x {options.sequence} tokens"
    table(title, ["figure", "value"], [[key, str(value)] for key, value in result.items()])
    if options.out is not None:
        row = {"machine": here, "ops": os.environ.get("MEGACODER_OPS", ""), "options": asked, "result": result}
        with options.out.open("a") as lines:
            lines.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
