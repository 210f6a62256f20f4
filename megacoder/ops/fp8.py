"""Products of fp8 matrices, each cast with one scale of its own: what a linear layer's three products are made of.

Legend: T tokens, O output dim, I input dim; R rows, C columns of any matrix, K the dim that a product sums over.

y = x W^T sums over I, dx = g W over O, dW = g^T x over T, and the fp8 units of Hopper take both factors with the summed
dim inmost. So a factor is a matrix cast both ways round, as it lies and transposed, by a kernel that reads it once.
Activations and weights are e4m3 (3 bits of mantissa, up to 448), gradients e5m2 (2 bits, up to 57,344), whose elements
span more powers of two (arXiv:2209.05433).

The scale is the current one, by which the matrix's largest magnitude becomes the format's. It is formed on the device,
and the host waits for nothing. What is not finite cannot get lost: where the largest magnitude is infinite or NaN the
inverse scale is NaN, and with it every element of every product, so that the step's update is left out.

A matrix is what one rank holds. Shards of tensor parallelism have scales of their own, which need no collective and are
never coarser than the whole's would be; so tp = 2 equals tp = 1 within fp8's rounding, not to the last bits of bf16.

Given up: scales by row or by block, which published trainings pay with half of the gain (torchao: 10% instead of 25%
for 8B), and scales from past steps, which save a reading of the matrix but cut off what has grown since.
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
"""Both dims of every factor divide by it: cuBLASLt reads 16 bytes at a time, along either."""

SMALLEST = 2.0**-100
"""Smaller largest magnitudes count as this one, lest the scale overflow: such a matrix is zero for all purposes."""


@dataclass(frozen=True, slots=True)
class Fp8Factor:
    """A matrix, cast; its elements are those of the casts times `inverse_scale`."""

    rows_RC: Tensor | None
    """None where only the transpose is still needed"""
    columns_CR: Tensor
    """the transpose"""
    inverse_scale: Tensor
    """fp32 scalar"""

    def transpose_alone(self) -> Self:
        """Half of the memory."""
        return replace(self, rows_RC=None)


def fp8_cast(x_RC: Tensor, dtype: torch.dtype, amax: Tensor | None = None) -> Fp8Factor:
    """Casts to E4M3 or E5M2; `amax` is `largest_magnitude(x_RC)` where the caller has it.

    ValueError for a matrix that does not divide by MULTIPLE.
    """
    if any(size % MULTIPLE for size in x_RC.shape):
        shape = " x ".join(map(str, x_RC.shape))
        raise ValueError(f"a matrix of {shape} in fp8; both dims must be multiples of {MULTIPLE}")
    if amax is None:
        amax = largest_magnitude(x_RC)
    limit = torch.finfo(dtype).max
    if backend("fp8_cast", x_RC) == "cuda":
        rows_RC = torch.empty_like(x_RC, dtype=dtype)
        columns_CR, inverse_scale = rows_RC.new_empty(x_RC.shape[::-1]), torch.empty_like(amax)
        cuda.cast_transpose(x_RC, amax, rows_RC, columns_CR, inverse_scale)
        return Fp8Factor(rows_RC, columns_CR, inverse_scale)
    held = amax.clamp(min=SMALLEST)
    limits = torch.full_like(held, limit)  # a tensor: torch divides by a number, or a number, in two roundings
    inverse_scale = torch.where(held.isfinite(), held / limits, torch.nan)
    rows_RC = (x_RC.float() * (limits / held)).clamp(-limit, limit).to(dtype)  # torch's own cast may not saturate
    return Fp8Factor(rows_RC, rows_RC.t().contiguous(), inverse_scale)


def largest_magnitude(x_RC: Tensor) -> Tensor:
    """fp32 scalar on the device: 0 of nothing, NaN where there is one."""
    if backend("fp8_cast", x_RC) == "cuda":
        amax = x_RC.new_empty((), dtype=torch.float32)
        cuda.amax(x_RC, amax)
        return amax
    return x_RC.abs().max().float() if x_RC.numel() else x_RC.new_zeros((), dtype=torch.float32)


def note_magnitude(values: Tensor, amax: Tensor | None) -> None:
    """Writes `largest_magnitude(values)` into `amax`, if one is given: for ops whose kernel does not find it itself."""
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

    `fast_sums` keeps a product's running sums in the tensor cores, whose registers drop what lies more than 13 bits
    below the largest term; without it they are added to fp32 sums after every few terms, which takes longer. The
    reference, which torch's path is, sums in fp32.
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
    """ConfigError unless the machine multiplies fp8, or the emulation was asked for by name: a test's, not a user's."""
    if candidates("fp8_product", device_type, torch.bfloat16)[0] == "torch" and asked_for("fp8_product") != "torch":
        raise ConfigError(
            "execution.fp8 = true needs a GPU that multiplies fp8 (Ada, Hopper, newer: sm_89 and up); MEGACODER_OPS="
            "fp8_product=torch emulates one, many times slower than without fp8"
        )
