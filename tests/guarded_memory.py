"""Tensors that end where memory does: reading or writing one element more is a fault that ends the process."""

import ctypes
import mmap

import torch

__all__ = ["at_the_end_of_memory"]

_PROTECT_ALL = 0  # PROT_NONE


def at_the_end_of_memory(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous copy, followed by a page that nobody may touch."""
    size = tensor.numel() * tensor.element_size()
    room = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, room + mmap.PAGESIZE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    if ctypes.CDLL(None, use_errno=True).mprotect(ctypes.c_void_p(start + room), mmap.PAGESIZE, _PROTECT_ALL) != 0:
        raise OSError(ctypes.get_errno(), "mprotect")
    copy = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=room - size)
    return copy.copy_(tensor.flatten()).view(tensor.shape)
