"""fp8 at a model's shapes: every GEMM of a layer in fp8, with fast and slow accumulation, and in bf16; and the casts.

    python tools/bench_fp8.py --out tools/results/gpu_fp8.jsonl

`megacoder.ops.linear` chooses by these figures which GEMMs accumulate in fast mode: the milliseconds and the error of
each against the fp64 product of the same casts, next to the error of the casts themselves. Also runs on a CPU, for
testing.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bench_common import append_record, machine
from bench_gpu import SHAPES
from torch import Tensor

from megacoder.core.config import parse_args
from megacoder.core.console import table
from megacoder.core.device import probe
from megacoder.core.rates import copy_rate
from megacoder.core.timing import median_seconds
from megacoder.ops.fp8 import E4M3, E5M2, Fp8Factor, fp8_cast, fp8_product, largest_magnitude
from megacoder.ops.linear import accumulate_weight_grad

__all__ = ["main"]


@dataclass(frozen=True, kw_only=True)
class Options:
    """One layer's matrices."""

    shape: str = "1.3b"
    """1.3b, or tiny to try the script"""
    batch: int = 8
    """sequences"""
    sequence: int = 4096
    """tokens of each"""
    out: Path | None = None
    """append a row to this file of JSON lines"""


def main() -> None:
    """Measures, prints two tables, appends a row."""
    options = parse_args(Options, None, prog="bench_fp8.py")
    device = torch.device(probe().device_type)
    products, casts = list(_products(options, device)), list(_casts(options, device))
    copy = copy_rate(device)
    columns = ["bf16_ms", "fast_ms", "slow_ms", "fast_error", "slow_error", "cast_error"]
    table("products", ["product", *(name.replace("_", " ") for name in columns)],
          [[row["product"], *(str(row[name]) for name in columns)] for row in products])  # fmt: skip
    table(f"casts (copy {copy / 1e12:.2f} TB/s)", ["what", "shape", "ms", "of copy"],
          [[row["what"], row["shape"], str(row["ms"]), f"{row['bytes'] / row['ms'] * 1e3 / copy:.0%}"]
           for row in casts])  # fmt: skip
    if options.out is not None:
        result = {"copy_bytes_per_second": round(copy), "products": products, "casts": casts}
        append_record(options.out, machine=machine(), options=asdict(options), result=result)


def _sizes(options: Options) -> tuple[int, dict[str, tuple[int, int]]]:
    """(T, {linear: (I, O)})."""
    model = SHAPES[options.shape]
    dim, inner, heads = model.hidden_size, model.intermediate_size, model.num_attention_heads * model.head_dim
    kv_heads = model.num_key_value_heads * model.head_dim
    return options.batch * options.sequence, {
        "qkv": (dim, heads + 2 * kv_heads), "o": (heads, dim), "gate_up": (dim, 2 * inner), "down": (inner, dim),
    }  # fmt: skip


def _products(options: Options, device: torch.device) -> Iterator[dict[str, Any]]:
    tokens, sizes = _sizes(options)
    for name, (inputs, outputs) in sizes.items():
        x, weight, grad = (
            torch.randn(shape, device=device, dtype=torch.bfloat16)
            for shape in ((tokens, inputs), (outputs, inputs), (tokens, outputs))
        )
        casts = fp8_cast(x, E4M3), fp8_cast(weight, E4M3), fp8_cast(grad, E5M2)
        total = torch.zeros(outputs, inputs, device=device)
        for way, (a, b), plain in (
            ("forward", (_rows(casts[0]), _rows(casts[1])), (x, weight)),
            ("input gradient", (_rows(casts[2]), _columns(casts[1])), (grad, weight.t())),
            ("weight gradient", (_columns(casts[2]), _columns(casts[0])), (grad.t(), x.t())),
        ):
            dtype = torch.float32 if way == "weight gradient" else torch.bfloat16
            calls: dict[str, Callable[[], Tensor]] = {
                sums: partial(fp8_product, a[0], b[0], (a[1], b[1]), dtype=dtype, fast_sums=sums == "fast")
                for sums in ("fast", "slow")
            }
            in_bf16 = partial(torch.mm, plain[0], plain[1].t())
            added = partial(accumulate_weight_grad, total, grad, x)
            row: dict[str, Any] = {"product": f"{name} {way}", "shape": f"{tokens:,} x {inputs:,} x {outputs:,}"}
            for kind, call in {"bf16": added if way == "weight gradient" else in_bf16, **calls}.items():
                seconds = median_seconds(call, device)
                row[f"{kind}_ms"] = round(seconds * 1e3, 3)
                row[f"{kind}_tflops"] = round(2e-12 * tokens * inputs * outputs / seconds)
            yield row | _errors(a, b, plain, calls)


Half = tuple[Tensor, Tensor]
"""A cast, summed dim inmost, and its inverse scale."""


def _rows(factor: Fp8Factor) -> Half:
    assert factor.rows_RC is not None
    return factor.rows_RC, factor.inverse_scale


def _columns(factor: Fp8Factor) -> Half:
    return factor.columns_CR, factor.inverse_scale


def _errors(a: Half, b: Half, plain: tuple[Tensor, Tensor], calls: dict[str, Callable[[], Tensor]]) -> dict[str, float]:
    """Of a corner: products against fp64 of the casts, and that against fp64 of what was cast."""
    few = slice(0, 64)
    exact = (a[0][few].double() * a[1]) @ (b[0][few].double() * b[1]).t()
    uncast = plain[0][few].double() @ plain[1][few].double().t()
    found = {f"{sums}_error": _relative(call()[few, few], exact) for sums, call in calls.items()}
    return {**found, "cast_error": _relative(exact, uncast)}


def _relative(actual: Tensor, expected: Tensor) -> float:
    return float(f"{((actual.double() - expected).norm() / expected.norm()).item():.1e}")


def _casts(options: Options, device: torch.device) -> Iterator[dict[str, Any]]:
    tokens, sizes = _sizes(options)
    model = SHAPES[options.shape]
    shapes = {"stream": (tokens, model.hidden_size), "activation": (tokens, model.intermediate_size),
              "gate_up": (tokens, 2 * model.intermediate_size), "weight": sizes["gate_up"][::-1]}  # fmt: skip
    for name, shape in shapes.items():
        x = torch.randn(shape, device=device, dtype=torch.bfloat16)
        for what, call, width in (
            ("largest magnitude", partial(largest_magnitude, x), 2),
            ("cast both ways", partial(fp8_cast, x, E5M2, largest_magnitude(x)), 4),
        ):
            seconds = median_seconds(call, device)
            yield {"what": f"{what} of {name}", "shape": " x ".join(f"{size:,}" for size in shape),
                   "ms": round(seconds * 1e3, 4), "bytes": width * x.numel()}  # fmt: skip


if __name__ == "__main__":
    main()
