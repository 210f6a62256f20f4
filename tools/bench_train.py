"""Tokens/s of the training step beside transformers' Llama, and beside this machine's own matrix rate.

    python tools/bench_train.py --out tools/results/train_cpu.json

Same shape, dtype, batch and threads, one process; contenders take turns step by step, so that a change in the
machine's speed meets all of them, and medians are compared. Peers: `transformers.LlamaForCausalLM` with torch's fused
AdamW, eager and (with --compile) compiled. In bf16 the peers hold bf16 weights and state; ours keeps fp32 master
weights and moments, which is more work for more precision. The limit is every matrix product of the step's layers and
head, forward and both gradients, timed alone at the same shapes.
"""

import gc
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from bench_common import machine, write_record

from megacoder.core.config import parse_args
from megacoder.core.console import table
from megacoder.model.config import ModelConfig
from megacoder.model.init import init_weights
from megacoder.model.stage import forward_backward
from megacoder.model.transformer import Transformer
from megacoder.ops.adamw import AdamWConfig
from megacoder.parallel.flat import FlatParameters
from megacoder.parallel.layers import Linear
from megacoder.parallel.zero import Zero1AdamW

SHAPES = {
    "58M": ModelConfig(
        vocab_size=32256, hidden_size=512, intermediate_size=1376, num_hidden_layers=8, num_attention_heads=8,
        num_key_value_heads=8, head_dim=64, max_position_embeddings=512, rope_theta=10000.0,
    ),
    "4M": ModelConfig(
        vocab_size=8192, hidden_size=192, intermediate_size=512, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2, head_dim=48, max_position_embeddings=512, rope_theta=10000.0,
    ),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Options:
    """Training-step throughput beside peers and the matrix rate."""

    shapes: tuple[str, ...] = ("58M", "4M")
    """which of the built-in shapes"""
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    """float32, bfloat16"""
    batch: int = 4
    """sequences per step"""
    sequence: int = 512
    """tokens per sequence"""
    threads: int = 2
    """intra-op threads"""
    rounds: int = 7
    """timed steps of each contender, after one to warm up"""
    compile: bool = False
    """also time transformers under torch.compile"""
    out: Path | None = None
    """JSON file to write"""


Step = Callable[[torch.Tensor, torch.Tensor], float]


def ours(config: ModelConfig, dtype: torch.dtype) -> Step:
    """The hand-scheduled step with fp32 gradients, master weights and moments."""
    model = Transformer(config)
    init_weights(model, seed=0)
    flat = FlatParameters(model.named_parameters(), dtype=dtype, device=torch.device("cpu"))
    optimizer = Zero1AdamW(flat, None, AdamWConfig())

    def step(tokens: torch.Tensor, labels: torch.Tensor) -> float:
        loss = forward_backward(model, tokens, labels)
        optimizer.step(lr=1e-4, num_tokens=loss.num_tokens, max_grad_norm=1.0)
        return loss.total.item() / loss.num_tokens

    return step


def transformers_llama(config: ModelConfig, dtype: torch.dtype, *, compiled: bool = False) -> Step:
    """LlamaForCausalLM, SDPA attention, torch's fused AdamW and gradient clipping."""
    from transformers import LlamaConfig, LlamaForCausalLM

    peer: torch.nn.Module = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size, hidden_size=config.hidden_size, head_dim=config.head_dim,
            intermediate_size=config.intermediate_size, num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads, num_key_value_heads=config.num_key_value_heads,
            max_position_embeddings=config.max_position_embeddings, tie_word_embeddings=False,
        )
    )  # fmt: skip
    peer.to(dtype)
    optimizer = torch.optim.AdamW(peer.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    run = torch.compile(peer) if compiled else peer

    def step(tokens: torch.Tensor, labels: torch.Tensor) -> float:
        loss = run(input_ids=tokens, labels=tokens, shift_labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(peer.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def matrix_products(config: ModelConfig, dtype: torch.dtype, num_tokens: int) -> Step:
    """Every linear layer's three products (forward, input gradient, weight gradient) and nothing else."""
    model = Transformer(config)
    linears = [module for module in model.modules() if isinstance(module, Linear)]
    shapes = [linear.weight.shape for linear in linears if linear is not model.embed_tokens]
    data = {
        shape: (
            torch.randn(num_tokens, shape[1], dtype=dtype),
            torch.randn(shape, dtype=dtype),
            torch.randn(num_tokens, shape[0], dtype=dtype),
        )
        for shape in set(shapes)
    }

    def step(tokens: torch.Tensor, labels: torch.Tensor) -> float:
        for shape in shapes:
            x, weight, grad = data[shape]
            torch.mm(x, weight.t())
            torch.mm(grad, weight)
            torch.mm(grad.t(), x)
        return float("nan")

    return step


def interleaved(steps: dict[str, Step], options: Options, vocab: int) -> dict[str, list[float]]:
    """Seconds per step of each contender, taking turns; the first round warms up and is not kept."""
    generator = torch.Generator().manual_seed(0)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for round_index in range(options.rounds + 1):
        data = torch.randint(0, vocab, (options.batch, options.sequence + 1), generator=generator)
        for name, step in steps.items():
            start = time.perf_counter()
            step(data[:, :-1].contiguous(), data[:, 1:].contiguous())
            if round_index:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def bench(shape: str, dtype_name: str, options: Options) -> dict[str, dict[str, float]]:
    """Rows by contender: median seconds, tokens/s, share of the matrix products' rate."""
    config, dtype = SHAPES[shape], getattr(torch, dtype_name)
    steps: dict[str, Step] = {
        "megacoder": ours(config, dtype),
        "transformers eager": transformers_llama(config, dtype),
        "matrix products alone": matrix_products(config, dtype, options.batch * options.sequence),
    }
    if options.compile:
        steps["transformers compiled"] = transformers_llama(config, dtype, compiled=True)
    medians = {name: statistics.median(s) for name, s in interleaved(steps, options, config.vocab_size).items()}
    limit = medians["matrix products alone"]
    return {
        name: {
            "seconds": round(median, 5),
            "tokens_per_second": round(options.batch * options.sequence / median, 1),
            "share_of_matrix_rate": round(limit / median, 4),
            "speed_of_megacoder": round(median / medians["megacoder"], 4),
        }
        for name, median in medians.items()
    }


def main() -> None:
    """Runs every shape and dtype, prints a table each, writes one JSON file."""
    options = parse_args(Options, None, prog="bench_train.py")
    torch.set_num_threads(options.threads)
    results = {}
    for shape in options.shapes:
        for dtype in options.dtypes:
            gc.collect()
            rows = bench(shape, dtype, options)
            results[f"{shape} {dtype}"] = rows
            table(
                f"{shape}, {dtype}, {options.batch} x {options.sequence} tokens, {options.threads} threads",
                ["step", "tokens/s", "share of matrix rate", "megacoder is x times as fast"],
                [
                    [name, f"{row['tokens_per_second']:,.0f}", f"{row['share_of_matrix_rate']:.0%}",
                     f"{row['speed_of_megacoder']:.2f}"]
                    for name, row in rows.items()
                ],
            )  # fmt: skip
    if options.out is not None:
        import transformers

        record = machine(
            transformers=transformers.__version__,
            peak_rss_mb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        )
        write_record(options.out, machine=record, options=options, results=results)


if __name__ == "__main__":
    main()
