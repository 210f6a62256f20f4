"""Access to the compiled CPU kernels (csrc/cpp): the module, and how a tensor's address is passed to any kernel.

The extension is optional; `megacoder.ops.backends` checks whether it is built, and without it ops take the torch path.
"""

from types import ModuleType

import torch
from torch import Tensor

from megacoder.core.native import native

__all__ = ["address", "has_amx", "is_built", "kernels"]

_cpp = native()
_CPU = torch.device("cpu")


def is_built() -> bool:
    """Whether the kernels are built, so that `kernels` may be called."""
    return _cpp is not None


def has_amx() -> bool:
    """Whether they are, and this processor multiplies tiles of bf16 (csrc/cpp/kernels_amx.cpp)."""
    return _cpp is not None and bool(_cpp.has_amx())


def kernels() -> ModuleType:
    """The compiled kernels, for tensors on the CPU in float32 or bfloat16."""
    assert _cpp is not None, "not built; ask megacoder.ops.backends first"
    return _cpp


def address(tensor: Tensor | None, dtype: torch.dtype, *shape: int, device: torch.device = _CPU) -> int:
    """A tensor's address, 0 for None. The kernels see nothing else of it: what they assume is checked here.

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
            f"a kernel needs contiguous {dtype} {list(shape) or ''} on {device}; got {tensor.dtype} "
            f"{list(tensor.shape)} with strides {list(tensor.stride())} on {tensor.device}"
        )
    return tensor.data_ptr()
