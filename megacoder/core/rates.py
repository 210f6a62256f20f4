"""What a device can do at most: matrix products by its data sheet or as measured, and copies as measured.

A share of a limit says more than a time. The limit of arithmetic is the data sheet's where we know it, as in published
utilizations; on other devices, CPUs above all, it is the fastest large product measured here, and is named so. The
limit of memory is what a copy reaches, reads and writes counted, since no program moves more.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from megacoder.core.timing import timer_for

__all__ = ["DENSE_BF16_TFLOPS", "Peak", "copy_rate", "known_peak", "matrix_rate"]

DENSE_BF16_TFLOPS = {
    "h100 pcie": 756.0,
    "h100 nvl": 835.0,
    "h100": 989.4,
    "h200 nvl": 835.0,
    "h200": 989.4,
    "gh200": 989.4,
    "h800 pcie": 756.0,
    "h800": 989.4,
    "a100": 312.0,
    "a800": 312.0,
    "l40s": 362.0,
    "rtx 4090": 165.2,
    "rtx 3090": 71.0,
    "mi300x": 1307.4,
}
"""TFLOP/s without sparsity, with sums in fp32, by a part of the device's name; the first match counts."""


LONG_PRODUCT_SECONDS = 0.1
"""A product that takes longer is large enough."""


@dataclass(frozen=True)
class Peak:
    """A limit of arithmetic, and where it comes from."""

    flops: float
    """FLOP/s"""
    source: str
    """such as 'dense bf16 by the data sheet'"""


def known_peak(device_name: str, dtype: torch.dtype) -> Peak | None:
    """The data sheet's figure; None for devices not listed, parts of a device (MIG), and other dtypes than bfloat16."""
    name = device_name.lower()
    if dtype != torch.bfloat16 or " mig " in name:
        return None
    tflops = next((tflops for part, tflops in DENSE_BF16_TFLOPS.items() if part in name), None)
    return None if tflops is None else Peak(tflops * 1e12, "dense bf16 by the data sheet")


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the fastest of some large square products within a second.

    Sizes grow until a product takes long enough to be timed, or rates no longer grow: a CPU that emulates a dtype would
    need minutes for the product at which a GPU reaches its full rate.
    """
    size, largest = 256, 8192 if device.type == "cuda" else 1536
    while True:
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))  # zeros would take less power
        multiply = partial(torch.mm, a, b)
        if _fastest(multiply, device, seconds=0.0) > LONG_PRODUCT_SECONDS or size == largest:
            return 2.0 * size**3 / _fastest(multiply, device, seconds=1.0)
        size = min(2 * size, largest)


def copy_rate(device: torch.device) -> float:
    """Bytes/s, read and written together, of the fastest of some copies of 256 MB, more than caches hold."""
    source = torch.ones(1 << 26, device=device)
    target = torch.empty_like(source)
    return 2.0 * source.nbytes / _fastest(lambda: target.copy_(source), device, seconds=0.5)


def _fastest(call: Callable[[], object], device: torch.device, *, seconds: float) -> float:
    """Seconds of the fastest of at least two calls (the first may load a library), and of more within `seconds`."""
    timer = timer_for(device)
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 2 or time.perf_counter() < end:
        first = timer.mark()
        call()
        last = timer.mark()
        timer.finish()
        times.append(timer.seconds(first, last))
    return min(times)
