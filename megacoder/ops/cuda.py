"""Access to the compiled CUDA kernels (csrc/cuda): which tensors they take, and how they are launched.

The library is a plain shared object that uses no symbol of torch or Python, loaded through ctypes: one build works with
every torch. A launch is checked here (dtype, shape, contiguity, device), goes to torch's current stream, allocates
nothing that a CUDA graph could not replay, and raises the error that CUDA returns. Where the library is missing,
`megacoder.ops.backends` chooses other backends.

Legend: N elements of a flat buffer, R rows, C columns.
"""

import ctypes
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor

from megacoder.core.device import CUDA_LIBRARY, load_cuda_library
from megacoder.ops.cpp import address

__all__ = [
    "ADAMW_SCALARS",
    "CudaKernels",
    "adamw_cuda_",
    "adamw_scalars",
    "amax",
    "cast_transpose",
    "sum_of_squares_cuda",
]

ADAMW_SCALARS = 5
"""Elements of the fp32 buffer from `adamw_scalars` to `adamw_cuda_`: lr, gradient scale, both corrections, skip."""

PARTIAL_SUMS = 512
"""Blocks of `sum_of_squares_cuda`; fixed, so that the sum is the same on every GPU. Four per SM fill an H100."""

P, N, F = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double
SIGNATURES: dict[str, tuple[type, ...]] = {
    "adamw": (P, N, P, P, P, P, N, P, F, F, F, F, P),
    "adamw_scalars": (P, P, P, P, F, F, F, P, P, P),
    "amax": (P, N, P, P),
    "cast_transpose": (P, N, N, P, N, P, P, P, P),
    "sum_of_squares": (P, N, N, P, N, P, P),
}
"""Every launcher's arguments as csrc/cuda declares them: P addresses, N sizes and flags, F scalars; last the stream."""


class CudaKernels:
    """The launchers of one library."""

    def __init__(self, path: Path) -> None:
        self._library = load_cuda_library(path)
        self._library.error_string.argtypes = (N,)
        self._library.error_string.restype = ctypes.c_char_p
        for name, arguments in SIGNATURES.items():
            getattr(self._library, name).argtypes = arguments

    def launch(self, name: str, *arguments: float, stream: int) -> None:
        """Calls launcher `name`; raises RuntimeError where CUDA refuses."""
        code = getattr(self._library, name)(*arguments, stream)
        if code != 0:
            text = self._library.error_string(code).decode()
            raise RuntimeError(f"the CUDA kernel {name} was not launched: {text} (error {code})")


def adamw_cuda_(
    weight_N: Tensor,
    master_N: Tensor,
    exp_avg_N: Tensor,
    exp_avg_sq_N: Tensor,
    grad_N: Tensor,
    scalars: Tensor,
    *,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    """`ops.adamw.adamw_` with the step's scalars in device memory (see `adamw_scalars`).

    A skipped update leaves weights and state unchanged.
    """
    count, at = weight_N.numel(), partial(address, device=weight_N.device)
    _launch(
        "adamw", weight_N.device,
        at(weight_N, _float_dtype(weight_N), count), weight_N.dtype == torch.bfloat16,
        *(at(buffer_N, torch.float32, count) for buffer_N in (master_N, exp_avg_N, exp_avg_sq_N, grad_N)), count,
        at(scalars, torch.float32, ADAMW_SCALARS), beta1, beta2, eps, weight_decay,
    )  # fmt: skip


def adamw_scalars(
    squares: Tensor,
    num_tokens: Tensor,
    lr: Tensor,
    step: Tensor,
    *,
    max_grad_norm: float,
    beta1: float,
    beta2: float,
    scalars: Tensor,
    norm: Tensor,
) -> None:
    """Writes `scalars` and the fp64 `norm` of the mean gradient, from the fp64 sum of squared gradient sums.

    `num_tokens` is fp64 too, so that it may share an all-reduce with `squares`; `lr` fp32; `step` int64, raised by one
    unless the norm is not finite: then `norm` is infinite and the update skipped.
    """
    at = partial(address, device=scalars.device)
    _launch(
        "adamw_scalars", scalars.device,
        at(squares.view(1), torch.float64), at(num_tokens.view(1), torch.float64), at(lr.view(1), torch.float32),
        at(step.view(1), torch.int64), max_grad_norm, beta1, beta2,
        at(scalars, torch.float32, ADAMW_SCALARS), at(norm.view(1), torch.float64),
    )  # fmt: skip


def sum_of_squares_cuda(values: Tensor, out: Tensor) -> None:
    """Writes the sum of squares of fp32 or bf16 `values` into the fp64 scalar `out`; bitwise reproducible."""
    at = partial(address, device=values.device)
    workspace = torch.empty(PARTIAL_SUMS, dtype=torch.float64, device=values.device)
    _launch(
        "sum_of_squares", values.device,
        at(values, _float_dtype(values)), values.dtype == torch.bfloat16, values.numel(),
        at(workspace, torch.float64), PARTIAL_SUMS, at(out.view(1), torch.float64),
    )  # fmt: skip


def cast_transpose(x_RC: Tensor, amax: Tensor, out_RC: Tensor, transposed_CR: Tensor, inverse_scale: Tensor) -> None:
    """Writes bf16 `x` times a scale, saturated, into both outputs, in their dtype: fp8 e4m3 or e5m2.

    The scale maps the fp32 scalar `amax`, the largest magnitude of `x`, to the format's largest number; `inverse_scale`
    receives its inverse, NaN where `amax` is not finite.
    """
    dtype, at = out_RC.dtype, partial(address, device=x_RC.device)
    if dtype not in (torch.float8_e4m3fn, torch.float8_e5m2):
        raise ValueError(f"cast_transpose writes float8_e4m3fn or float8_e5m2, not {dtype}")
    rows, columns = x_RC.shape
    _launch(
        "cast_transpose", x_RC.device,
        at(x_RC, torch.bfloat16), rows, columns, at(amax.view(1), torch.float32), dtype == torch.float8_e5m2,
        at(out_RC, dtype, rows, columns), at(transposed_CR, dtype, columns, rows),
        at(inverse_scale.view(1), torch.float32),
    )  # fmt: skip


def amax(values: Tensor, out: Tensor) -> None:
    """Writes the largest magnitude of bf16 `values` into the fp32 scalar `out`: 0 if empty, NaN if any value is NaN."""
    at = partial(address, device=values.device)
    _launch("amax", values.device, at(values, torch.bfloat16), values.numel(), at(out.view(1), torch.float32))


def _launch(name: str, device: torch.device, *arguments: float) -> None:
    kernels = _load()
    if kernels is None:
        raise RuntimeError(f"the CUDA kernel {name} is not built here; ask megacoder.ops.backends first")
    with torch.cuda.device(device):
        kernels.launch(name, *arguments, stream=torch.cuda.current_stream().cuda_stream)


def _float_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype that a kernel for fp32 and bf16 must be given: bf16 as it is, anything else must be fp32."""
    return torch.bfloat16 if tensor.dtype == torch.bfloat16 else torch.float32


@cache
def _load() -> CudaKernels | None:
    try:
        return CudaKernels(CUDA_LIBRARY)
    except OSError:
        return None
