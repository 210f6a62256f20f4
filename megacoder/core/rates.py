"""What a device can do at most: products of matrices by its data sheet or as measured, and copies as measured.

A share of a limit says more than a time. The limit of arithmetic is the data sheet's where we know it, which is what
published utilisations are of; on other devices, CPUs above all, it is the fastest large product seen here, and is named
so. The limit of memory is what a copy reaches, reads and writes counted, as no program moves more.
"""

import time
from dataclasses import dataclass

import torch

from megacoder.core.timing import Timer, median_seconds, timer_for

__all__ = ["Peak", "copy_rate", "known_peak", "matrix_rate"]

DENSE_BF16: tuple[tuple[str, float], ...] = (
    ("h100 pcie", 756e12),
    ("h100 nvl", 835e12),
    ("h100", 989.4e12),
    ("h200 nvl", 835e12),
    ("h200", 989.4e12),
    ("gh200", 989.4e12),
    ("h800 pcie", 756e12),
    ("h800", 989.4e12),
    ("a100", 312e12),
    ("a800", 312e12),
    ("l40s", 362e12),
    ("rtx 4090", 165.2e12),
    ("rtx 3090", 71e12),
    ("mi300x", 1307.4e12),
)
"""FLOP/s without sparsity, sums in fp32, by what a device's name has in it; the first that fits counts."""


LONG_PRODUCT_SECONDS = 0.1
"""From which on a product need not be larger."""


@dataclass(frozen=True)
class Peak:
    """A limit of arithmetic, and whose word it is."""

    flops: float
    """FLOP/s"""
    source: str
    """as 'dense bf16 of its data sheet'"""


def known_peak(device_name: str, dtype: torch.dtype) -> Peak | None:
    """The data sheet's figure; None for devices not listed, parts of a device (MIG), and dtypes but bfloat16."""
    name = device_name.lower()
    if dtype != torch.bfloat16 or " mig " in name:
        return None
    flops = next((flops for part, flops in DENSE_BF16 if part in name), None)
    return None if flops is None else Peak(flops, "dense bf16 by the data sheet")


def matrix_rate(device: torch.device, dtype: torch.dtype, *, seconds: float = 0.5) -> float:
    """FLOP/s of the fastest of some large square products; about `seconds` long.

    Large is what takes long enough to be timed, up to a size at which rates no longer grow: a CPU that emulates a dtype
    needs minutes for the product that a GPU needs to show what it can.
    """
    timer = timer_for(device)
    size, largest = 256, 8192 if device.type == "cuda" else 1536
    while True:
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))  # zeros would take less power
        best = min(_product_seconds(a, b, timer) for _ in range(2))  # the first may load the library
        if best > LONG_PRODUCT_SECONDS or size == largest:
            break
        size = min(2 * size, largest)
    began = time.perf_counter()
    while time.perf_counter() - began < seconds:
        best = min(best, _product_seconds(a, b, timer))
    return 2.0 * size**3 / best


def _product_seconds(a: torch.Tensor, b: torch.Tensor, timer: Timer) -> float:
    first = timer.mark()
    torch.mm(a, b)
    last = timer.mark()
    timer.finish()
    return timer.seconds(first, last)


def copy_rate(device: torch.device, *, num_bytes: int = 1 << 28) -> float:
    """Bytes/s, read and written ones, of copying `num_bytes`: more than caches hold."""
    source = torch.ones(num_bytes // 4, device=device)
    target = torch.empty_like(source)
    return 2.0 * num_bytes / median_seconds(lambda: target.copy_(source), device)
