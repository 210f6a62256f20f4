"""A process's memory: how much it has needed, and a C library allocator that keeps what will be needed again.

glibc takes large blocks from the kernel at every allocation and gives them back when they are freed. A training step on
a CPU allocates each of its activations that way: the kernel zeroes the same pages every microbatch, and all are cold.
Keeping them makes a step of a 58M model 4% (fp32) to 7% (bf16) shorter.
"""

import ctypes
import resource
import sys
from typing import Any

import torch

__all__ = ["keep_freed_memory", "peak_memory", "peak_process_memory", "return_freed_memory"]

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Of mallopt(3)."""


def keep_freed_memory() -> bool:
    """From now on this process keeps the memory that it frees; False if the C library has no such setting.

    Its size then stays at its peak, and a few percent more where freed blocks do not fit new ones.
    """
    mallopt = _of_glibc("mallopt")
    return mallopt is not None and bool(mallopt(M_MMAP_MAX, 0)) and bool(mallopt(M_TRIM_THRESHOLD, -1))


def return_freed_memory() -> None:
    """Returns what is free at this moment to the system, if the C library can; for the end of a phase that needed more.

    Blocks that building a model has freed do not fit what a step allocates: glibc would leave them unused, 100 MB for a
    101M model, and take more. The first step likewise leaves 40 MB, scattered among allocations that stay.
    """
    malloc_trim = _of_glibc("malloc_trim")
    if malloc_trim is not None:
        malloc_trim(0)


def peak_process_memory() -> int:
    """Peak bytes of host memory of this process, Python and libraries included."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _of_glibc(name: str) -> Any:
    """A function of the C library that only glibc has, or None."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform.startswith("linux") else None


def peak_memory(device: torch.device) -> int:
    """Peak bytes so far: of tensors on a GPU, of the whole process on a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_process_memory()
