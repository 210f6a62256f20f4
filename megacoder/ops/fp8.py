"""Matrix products (GEMMs) in fp8, one scale per matrix: the building block of a linear layer's three products.

Legend: T tokens, O output dim, I input dim; R rows, C columns of any matrix, K the dim that a product sums over.

y = x W^T sums over I, dx = g W over O, dW = g^T x over T, and Hopper's fp8 tensor cores need the summed dim innermost
in both factors. So a factor is a matrix cast in both layouts, as it is and transposed, by a kernel that reads it once.
Activations and weights are e4m3 (3 bits of mantissa, up to 448), gradients e5m2 (2 bits, up to 57,344), whose elements
span more powers of two (arXiv:2209.05433).

Scaling is current: it maps the matrix's own largest magnitude to the format's. The scale is computed on the device, and
the host waits for nothing. Non-finite values are never hidden: where the largest magnitude is infinite or NaN, the
inverse scale is NaN, and so is every element of every product, so that the step's update is skipped.

A matrix is what one rank holds. Tensor-parallel shards each have their own scale, which needs no collective and is
never coarser than the whole matrix's; so tp = 2 equals tp = 1 within fp8's rounding, not to the last bits of bf16.

Given up: scales per row or per block, which cost published trainings half of the gain (torchao: 10% instead of 25% for
8B), and delayed scaling (scales from past steps), which saves one read of the matrix but clips what has grown since.
"""

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from megacoder.core.errors import ConfigError
from megacoder.ops import cuda
from megacoder.ops.backends import asked_for, backend, candidates

__all__ = [
    "E4M3",
    "E5M2",
    "MULTIPLE",
    "Fp8Factor",
    "check_fp8_machine",
    "fp8_cast",
    "fp8_product",
    "largest_magnitude",
    "note_magnitude",
]

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2

MULTIPLE = 16
"""Both dims of every factor must be multiples of this: cuBLASLt reads 16 bytes at a time, along either."""

SMALLEST = 2.0**-100
"""Lower bound of the largest magnitude, so that the scale cannot overflow: a smaller matrix is zero in practice."""


@dataclass(frozen=True, slots=True)
class Fp8Factor:
    """A matrix cast to fp8; its elements are those of the casts times `inverse_scale`."""

    rows_RC: Tensor | None
    """None where only the transpose is still needed"""
    columns_CR: Tensor
    """the transpose"""
    inverse_scale: Tensor
    """fp32 scalar"""

    def transpose_alone(self) -> Self:
        """The factor without its rows, for half of the memory."""
        return replace(self, rows_RC=None)


def fp8_cast(x_RC: Tensor, dtype: torch.dtype, amax: Tensor | None = None) -> Fp8Factor:
    """Casts to E4M3 or E5M2; `amax` is `largest_magnitude(x_RC)` where the caller has it.

    ValueError for a matrix whose dims are not multiples of MULTIPLE.
    """
    if any(size % MULTIPLE for size in x_RC.shape):
        shape = " x ".join(map(str, x_RC.shape))
        raise ValueError(f"cannot cast a matrix of {shape} to fp8; both dims must be multiples of {MULTIPLE}")
    if amax is None:
        amax = largest_magnitude(x_RC)
    limit = torch.finfo(dtype).max
    if backend("fp8_cast", x_RC) == "cuda":
        rows_RC = torch.empty_like(x_RC, dtype=dtype)
        columns_CR, inverse_scale = rows_RC.new_empty(x_RC.shape[::-1]), torch.empty_like(amax)
        cuda.cast_transpose(x_RC, amax, rows_RC, columns_CR, inverse_scale)
        return Fp8Factor(rows_RC, columns_CR, inverse_scale)
    held = amax.clamp(min=SMALLEST)
    limits = torch.full_like(held, limit)  # a tensor: with a Python number torch's division rounds twice
    inverse_scale = torch.where(held.isfinite(), held / limits, torch.nan)
    rows_RC = (x_RC.float() * (limits / held)).clamp(-limit, limit).to(dtype)  # torch's own cast may not saturate
    return Fp8Factor(rows_RC, rows_RC.t().contiguous(), inverse_scale)


def largest_magnitude(x_RC: Tensor) -> Tensor:
    """fp32 scalar on the device: 0 if empty, NaN if any element is NaN."""
    if backend("fp8_cast", x_RC) == "cuda":
        amax = x_RC.new_empty((), dtype=torch.float32)
        cuda.amax(x_RC, amax)
        return amax
    return x_RC.abs().max().float() if x_RC.numel() else x_RC.new_zeros((), dtype=torch.float32)


def note_magnitude(values: Tensor, amax: Tensor | None) -> None:
    """Writes `largest_magnitude(values)` into `amax` if given: for ops whose kernel does not compute it."""
    if amax is not None:
        amax.copy_(largest_magnitude(values.view(-1, values.shape[-1])))


def fp8_product(
    a_RK: Tensor | None,
    b_CK: Tensor | None,
    inverse_scales: tuple[Tensor, Tensor],
    *,
    dtype: torch.dtype = torch.bfloat16,
    fast_sums: bool,
) -> Tensor:
    """(R, C) = a b^T, scaled back, in `dtype`; at most one of the two is e5m2.

    `fast_sums` keeps a product's running sums in the tensor cores, whose registers drop bits more than 13 below the
    largest term; without it they are added to fp32 sums after every few terms, which takes longer. The reference (the
    torch path) sums in fp32.
    """
    assert a_RK is not None
    assert b_CK is not None
    if candidates("fp8_product", a_RK.device.type, torch.bfloat16)[0] == "scaled_mm":
        return torch._scaled_mm(
            a_RK, b_CK.t(), scale_a=inverse_scales[0], scale_b=inverse_scales[1], out_dtype=dtype,
            use_fast_accum=fast_sums,
        )  # fmt: skip
    return ((a_RK.float() @ b_CK.float().t()) * (inverse_scales[0] * inverse_scales[1])).to(dtype)


def check_fp8_machine(device_type: str) -> None:
    """ConfigError unless the machine multiplies fp8, or the emulation is requested by name, as tests do."""
    if candidates("fp8_product", device_type, torch.bfloat16)[0] == "torch" and asked_for("fp8_product") != "torch":
        raise ConfigError(
            "execution.fp8 = true needs a GPU that multiplies fp8 (Ada, Hopper, newer: sm_89 and up); MEGACODER_OPS="
            "fp8_product=torch emulates one, many times slower than without fp8"
        )
