"""The door to the compiled CPU kernels (csrc/cpp): which tensors they take, and how any kernel's addresses are passed.

The extension is optional. `kernels_for` returns None where it is missing or does not apply, and the caller then takes
its torch path; nothing else in the library asks whether it is there.
"""

import importlib
from types import ModuleType

import torch
from torch import Tensor

__all__ = ["address", "kernels_for"]


def _load() -> ModuleType | None:
    try:
        return importlib.import_module("megacoder._cpp")
    except ImportError:
        return None


_cpp = _load()
_CPU = torch.device("cpu")


def kernels_for(tensor: Tensor) -> ModuleType | None:
    """The compiled kernels if they are built and take `tensor`'s device and dtype (CPU; float32 or bfloat16)."""
    if _cpp is not None and tensor.device.type == "cpu" and tensor.dtype in (torch.float32, torch.bfloat16):
        return _cpp
    return None


def address(tensor: Tensor | None, dtype: torch.dtype, *shape: int, device: torch.device = _CPU) -> int:
    """A tensor's address, 0 for None. The kernels see nothing else of it: what they take for granted is checked here.

    Raises ValueError unless the tensor is contiguous, on `device`, of `dtype`, and of `shape` where that is given.
    """
    if tensor is None:
        return 0
    if (
        not tensor.is_contiguous()
        or tensor.dtype != dtype
        or tensor.device != device
        or (shape and tensor.shape != shape)
    ):
        raise ValueError(
            f"a kernel takes contiguous {dtype} {list(shape) or ''} on {device}; got {tensor.dtype} "
            f"{list(tensor.shape)} with strides {list(tensor.stride())} on {tensor.device}"
        )
    return tensor.data_ptr()
