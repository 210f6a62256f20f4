"""Tokens/s of greedy generation compared with `transformers.generate`, on this machine's CPU.

    python tools/bench_generate.py --out tools/results/generate_cpu.json

The same weights (exported and loaded by the peer), prompts, dtype and threads in one process; contenders
alternate, and medians are compared. The peer runs with each of its caches, and the faster counts. In float32 all must
produce the same tokens, or nothing is reported.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from bench_common import CPU_SHAPES, machine, write_record

from megacoder.core.config import parse_args
from megacoder.core.console import table
from megacoder.core.errors import MegacoderError
from megacoder.evaluate.generate import generate
from megacoder.model.config import ModelConfig
from megacoder.model.huggingface import export_model
from megacoder.model.init import init_weights
from megacoder.model.transformer import Transformer

Run = Callable[[list[list[int]]], list[list[int]]]
PEERS = ("transformers", "transformers, static cache")


@dataclass(frozen=True, kw_only=True)
class Options:
    """Generation throughput compared with transformers."""

    shapes: tuple[str, ...] = ("58M", "4M")
    """which of the built-in shapes"""
    batches: tuple[int, ...] = (1, 8)
    """sequences at a time"""
    dtypes: tuple[Literal["float32", "bfloat16"], ...] = ("float32", "bfloat16")
    """precision of the computation"""
    prompt: int = 64
    """tokens of the longest prompt; the others of a batch are shorter, and padded"""
    tokens: int = 128
    """new tokens"""
    threads: int = 2
    """intra-op threads"""
    rounds: int = 5
    """timed rounds, after one warm-up"""
    out: Path | None = None
    """JSON file to write"""


def contenders(config: ModelConfig, dtype: torch.dtype, options: Options) -> dict[str, Run]:
    """Ours and transformers', with its growing and its static cache, of the same weights."""
    from transformers import AutoModelForCausalLM

    model = Transformer(config)
    init_weights(model, seed=0)
    model.to(dtype)
    with tempfile.TemporaryDirectory() as folder:
        export_model(model, Path(folder))
        peer: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)

    def ours(prompts: list[list[int]]) -> list[list[int]]:
        return generate(model, prompts, max_new_tokens=options.tokens)

    def theirs(prompts: list[list[int]], cache: str | None) -> list[list[int]]:
        width = max(map(len, prompts))
        tokens = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        with torch.inference_mode():
            found = peer.generate(
                tokens, attention_mask=mask, max_new_tokens=options.tokens, do_sample=False, pad_token_id=0,
                cache_implementation=cache,
            )  # fmt: skip
        return found[:, width:].tolist()

    peers: dict[str, Run] = {PEERS[0]: partial(theirs, cache=None), PEERS[1]: partial(theirs, cache="static")}
    return {"megacoder": ours, **peers}


def bench(config: ModelConfig, dtype: torch.dtype, batch: int, options: Options) -> dict[str, float]:
    """Median tokens/s of each, and how many times as fast ours is; MegacoderError where the tokens differ."""
    generator = torch.Generator().manual_seed(batch)
    lengths = [max(1, options.prompt - 3 * index) for index in range(batch)]
    prompts = [torch.randint(1, config.vocab_size, (length,), generator=generator).tolist() for length in lengths]
    runs = contenders(config, dtype, options)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(options.rounds + 1):
        results = {}
        for name, run in runs.items():
            start = time.perf_counter()
            results[name] = run(prompts)
            if turn:
                seconds[name].append(time.perf_counter() - start)
        if dtype == torch.float32 and any(results["megacoder"] != results[peer] for peer in PEERS):
            raise MegacoderError("the two generate different tokens; their speed cannot be compared")
    rates = {name: batch * options.tokens / statistics.median(times) for name, times in seconds.items()}
    return {name: round(rate, 1) for name, rate in rates.items()} | {
        "times_as_fast": round(rates["megacoder"] / max(rates[peer] for peer in PEERS), 3)
    }


def main() -> None:
    """Every shape and batch size, a table, one JSON file."""
    options = parse_args(Options, None, prog="bench_generate.py")
    torch.set_num_threads(options.threads)
    results = {
        f"{shape} {dtype} batch {batch}": bench(CPU_SHAPES[shape], getattr(torch, dtype), batch, options)
        for shape in options.shapes
        for dtype in options.dtypes
        for batch in options.batches
    }
    table(
        f"Greedy generation, {options.tokens} new tokens, {options.threads} threads, tokens/s",
        ["", "megacoder", *PEERS, "times as fast"],
        [
            [name, *(f"{row[who]:,.0f}" for who in ("megacoder", *PEERS)), f"{row['times_as_fast']:.2f}"]
            for name, row in results.items()
        ],
    )
    if options.out is not None:
        import transformers

        write_record(options.out, machine=machine(transformers=transformers.__version__), options=options,
                     results=results)  # fmt: skip


if __name__ == "__main__":
    main()
