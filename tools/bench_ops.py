"""Every op of a step at a model's shapes: bytes per second compared with the device's own copy and with torch.compile.

    python tools/bench_ops.py --out tools/results/gpu_ops.jsonl

Ours are the rows of `megacoder profile`. Memory-bound ops are compared with the same formula in plain torch under
torch.compile, written idiomatically, which may choose what it keeps and overwrites. AdamW is compared with torch's
fused kernel, on the same bytes except the bf16 copy. Times are medians of many calls with device events.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from bench_common import append_record, machine
from bench_gpu import SHAPES
from torch import Tensor

from megacoder.core.config import parse_args
from megacoder.core.console import table
from megacoder.core.device import probe
from megacoder.core.rates import copy_rate, matrix_rate
from megacoder.core.timing import median_seconds
from megacoder.ops.rope import apply_rope, rope_tables
from megacoder.train.op_table import op_table

__all__ = ["main"]


@dataclass(frozen=True, kw_only=True)
class Options:
    """Ops alone."""

    shape: str = "1.3b"
    """1.3b or qwen3-1.7b; tiny or tiny-qwen3 to try the script"""
    batch: int = 8
    """sequences"""
    sequence: int = 4096
    """tokens of each"""
    compiled: bool = True
    """also time torch.compile"""
    out: Path | None = None
    """append a row to this file of JSON lines"""


def compiled_peers(options: Options, device: torch.device) -> dict[str, float]:
    """Seconds by the names of `op_table`'s rows."""
    model = SHAPES[options.shape]
    tokens, dim, inner = options.batch * options.sequence, model.hidden_size, model.intermediate_size

    def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(*shape, device=device, dtype=dtype)

    seconds: dict[str, float] = {}

    def both(name: str, formula: Callable[..., Tensor | tuple[Tensor, ...]], *inputs: Tensor) -> None:
        """Forward, and backward where an input wants a gradient."""
        run = torch.compile(formula, dynamic=False)
        wants = [tensor for tensor in inputs if tensor.requires_grad]
        with torch.no_grad():
            forward = median_seconds(lambda: run(*inputs), device)
        seconds[f"{name} forward" if wants else name] = forward
        if not wants:
            return
        outputs = run(*inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        grads = tuple(torch.randn_like(out) for out in outputs)
        seconds[f"{name} backward"] = median_seconds(
            lambda: torch.autograd.grad(outputs, wants, grads, retain_graph=True), device
        )

    def norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        summed = x + residual
        return F.rms_norm(summed, (dim,), weight, model.rms_norm_eps), summed

    def swiglu(gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up

    both("rms_norm", norm, *(random(*s).requires_grad_() for s in ((tokens, dim), (tokens, dim), (dim,))))
    both("swiglu", swiglu, random(tokens, 2 * inner).requires_grad_())
    heads, kv_heads, head_dim = model.num_attention_heads, model.num_key_value_heads, model.head_dim
    cos, sin = (t.to(device) for t in rope_tables(options.sequence, head_dim, theta=model.rope_theta))
    positions = torch.arange(options.sequence, device=device).repeat(options.batch)

    def norm_and_rope(qkv: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        """The gradient of the values, which are not read, is zeros."""
        queries_and_keys = qkv.split([heads, kv_heads, kv_heads], dim=1)[:2]
        return tuple(
            apply_rope(F.rms_norm(x, (head_dim,), weight, model.rms_norm_eps), cos, sin, positions)
            for x, weight in zip(queries_and_keys, weights, strict=True)
        )

    if model.qk_norm:
        sizes = (tokens, heads + 2 * kv_heads, head_dim), (head_dim,), (head_dim,)
        both("norm and rope", norm_and_rope, *(random(*s).requires_grad_() for s in sizes))
        seconds["norm and rope"] = seconds.pop("norm and rope forward")
    else:
        both("rope", lambda x: apply_rope(x, cos, sin, positions), random(tokens, heads + kv_heads, head_dim))

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits.float(), labels, reduction="sum")

    rows = min(tokens, 8192)
    logits = random(rows, model.padded_vocab_size).requires_grad_()
    labels = torch.randint(0, model.vocab_size, (rows,), device=device)
    both("cross_entropy", loss, logits, labels)
    if "cross_entropy forward" in seconds:
        seconds["cross_entropy"] = seconds.pop("cross_entropy forward") + seconds.pop("cross_entropy backward")
    del logits
    param = torch.nn.Parameter(random(40_000_000, dtype=torch.float32))
    param.grad = random(40_000_000, dtype=torch.float32)
    optimizer = torch.optim.AdamW([param], lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    seconds["adamw"] = median_seconds(optimizer.step, device)
    return seconds


def main() -> None:
    """Measures, prints a table, appends a row."""
    options = parse_args(Options, None, prog="bench_ops.py")
    device = torch.device(probe().device_type)
    copy, matrix = copy_rate(device), matrix_rate(device, torch.bfloat16)
    rows: list[dict[str, Any]] = []
    peers = compiled_peers(options, device) if options.compiled else {}
    for op in op_table(
        SHAPES[options.shape], batch=options.batch, sequence=options.sequence, dtype=torch.bfloat16, device=device
    ):
        limit = copy if op.moved_bytes else matrix
        row = {"op": op.name, "shape": op.shape, "microseconds": round(op.seconds * 1e6, 1),
               "share_of_limit": round(op.rate / limit, 3)}  # fmt: skip
        if op.name in peers:
            row["compiled_microseconds"] = round(peers[op.name] * 1e6, 1)
        rows.append(row)
    table(
        f"copy {copy / 1e12:.2f} TB/s, matrix product {matrix / 1e12:.0f} TFLOP/s",
        ["op", "shape", "us", "of copy or product", "torch.compile, us"],
        [[row["op"], row["shape"], f"{row['microseconds']:,}", f"{row['share_of_limit']:.0%}",
          f"{row.get('compiled_microseconds', '')}"] for row in rows],
    )  # fmt: skip
    if options.out is not None:
        result = {"copy_bytes_per_second": round(copy), "matrix_flops": round(matrix), "rows": rows}
        append_record(options.out, machine=machine(), options=asdict(options), result=result)


if __name__ == "__main__":
    main()
