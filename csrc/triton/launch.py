"""Shared by the launchers: the check of what kernels assume, and the arithmetic of block sizes.

The kernels share `raise_amax`. An fp8 cast needs the largest magnitude of what a kernel stores: while the values are in
registers finding it is free, where a separate kernel would read them all again.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = [
    "amax_bits",
    "ceil_div",
    "check",
    "magnitudes",
    "multiprocessors",
    "power_of_two",
    "raise_amax",
    "storage",
    "warps",
]

STORAGE = (torch.bfloat16, torch.float32)
INTERPRETED_MULTIPROCESSORS = 2


@triton.jit
def magnitudes(stored):
    """The bits of |stored| in fp32, which compare as the numbers do, with NaN largest."""
    return stored.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def raise_amax(amax_ptr, bits):
    """Raises the value at `amax_ptr` to the largest of `bits`, from `magnitudes`; one atomic per program."""
    tl.atomic_max(amax_ptr, tl.max(bits), sem="relaxed")


def amax_bits(amax: Tensor | None) -> Tensor | None:
    """The fp32 scalar `amax` as its bits, which is how kernels raise it. ValueError for any other dtype or shape."""
    if amax is None:
        return None
    check("amax", amax, torch.float32)
    return amax.view(torch.int32)


def check(name: str, tensor: Tensor, dtype: torch.dtype, *shape: int) -> None:
    """ValueError unless the tensor is contiguous, of `dtype` and of `shape`: a kernel sees only its address."""
    if tensor.dtype != dtype or tensor.shape != shape or not tensor.is_contiguous():
        raise ValueError(
            f"{name} must be contiguous {dtype} {list(shape)}; got {tensor.dtype} {list(tensor.shape)} with strides "
            f"{list(tensor.stride())}"
        )


def storage(name: str, tensor: Tensor) -> torch.dtype:
    """The dtype in which an op's rows are stored; ValueError for one that no kernel supports."""
    if tensor.dtype not in STORAGE:
        raise ValueError(f"{name} must be stored as bfloat16 or float32, not {tensor.dtype}")
    return tensor.dtype


@lru_cache
def multiprocessors(device: torch.device) -> int:
    """Number of multiprocessors; under the interpreter a few, so that programs share the rows there too."""
    if device.type != "cuda":
        return INTERPRETED_MULTIPROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


def ceil_div(count: int, size: int) -> int:
    return -(-count // size)


def power_of_two(count: int) -> int:
    """The smallest power of two that is at least `count`: Triton's tiles have no other sizes."""
    return 1 << max(0, count - 1).bit_length()


def warps(elements: int, *, per_thread: int) -> int:
    """Warps (a power of two, at most the 32 of one program) that leave `per_thread` of `elements` to each thread."""
    return min(32, max(1, elements // (32 * per_thread)))
