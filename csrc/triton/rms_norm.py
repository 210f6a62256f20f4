"""RMSNorm with the residual add folded in, forward and backward; the op is described in `megacoder.ops.rms_norm`.

Legend: T tokens, D model dim, P programs; within a kernel a tile is R rows by B columns, B being D rounded up to a
power of two.

A row stays in one program's registers, so each tensor passes through memory once. Eight warps or more share a row, and
short rows are processed several at a time, so that each thread has 16 elements of every tensor in the forward and 8 in
the backward, which has more tensors: every thread then has a few 16-byte loads in flight, and uses few enough registers
that resident programs hide each other's reductions.

The backward must also sum over all rows for the weight. Its P programs are persistent: each walks over its rows with a
private sum in registers, and a second kernel adds the P sums. P is the number resident at once: fewer would leave
bandwidth idle, more would write more private sums (a hundredth of the traffic at D=2048, and all in L2).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megacoder.ops.triton_kernels.launch import (
    amax_bits,
    ceil_div,
    check,
    magnitudes,
    multiprocessors,
    power_of_two,
    raise_amax,
    storage,
    warps,
)

__all__ = ["rms_norm_backward", "rms_norm_forward"]

FORWARD_PER_THREAD, BACKWARD_PER_THREAD = 16, 8
LONGEST_ROW = 1 << 14
"""16 elements in each of a program's 1,024 threads; beyond 8,192 some of the backward's registers spill."""
BACKWARD_REGISTERS, RESIDENT_WARPS = 64, 32
"""At 64 registers per thread a multiprocessor holds 32 warps."""
SUM_ROWS, SUM_COLUMNS = 128, 32
"""Tile of the second kernel: 128 bytes of each of many rows, since D columns give it few programs otherwise."""


@triton.jit(do_not_specialize=["num_rows"])
def rms_norm_forward_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    y_ptr,
    h_ptr,
    rstd_ptr,
    amax_ptr,
    num_rows,
    eps,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    rows_R = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols_B = tl.arange(0, BLOCK)
    inside_RB = (rows_R < num_rows)[:, None] & (cols_B < D)[None, :]
    places_RB = rows_R[:, None] * D + cols_B[None, :]
    weight_B = tl.load(weight_ptr + cols_B, mask=cols_B < D, other=0.0).to(tl.float32)
    h_RB = tl.load(x_ptr + places_RB, mask=inside_RB, other=0.0)
    if residual_ptr is not None:
        residual_RB = tl.load(residual_ptr + places_RB, mask=inside_RB, other=0.0)
        # Rounded before the norm: y and rstd recomputed from h alone are then the same.
        h_RB = (h_RB.to(tl.float32) + residual_RB.to(tl.float32)).to(h_ptr.dtype.element_ty)
        tl.store(h_ptr + places_RB, h_RB, mask=inside_RB)
    h_RB = h_RB.to(tl.float32)
    rstd_R = tl.rsqrt(tl.sum(h_RB * h_RB, axis=1) / D + eps)
    tl.store(rstd_ptr + rows_R, rstd_R, mask=rows_R < num_rows)
    y_RB = (h_RB * rstd_R[:, None] * weight_B[None, :]).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + places_RB, y_RB, mask=inside_RB)
    if amax_ptr is not None:
        raise_amax(amax_ptr, magnitudes(y_RB))


@triton.jit(do_not_specialize=["num_rows"])
def rms_norm_backward_kernel(
    grad_y_ptr,
    h_ptr,
    weight_ptr,
    rstd_ptr,
    grad_residual_ptr,
    grad_h_ptr,
    sums_ptr,
    amax_ptr,
    num_rows,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    cols_B = tl.arange(0, BLOCK)
    weight_B = tl.load(weight_ptr + cols_B, mask=cols_B < D, other=0.0).to(tl.float32)
    # One sum for each row of the tile: with one for all rows, threads would have to synchronize in every iteration.
    sums_RB = tl.zeros((ROWS, BLOCK), tl.float32)
    if amax_ptr is not None:
        top_RB = tl.zeros((ROWS, BLOCK), tl.int32)
    for first in range(tl.program_id(0) * ROWS, num_rows, tl.num_programs(0) * ROWS):
        rows_R = first + tl.arange(0, ROWS)
        inside_RB = (rows_R < num_rows)[:, None] & (cols_B < D)[None, :]
        places_RB = rows_R.to(tl.int64)[:, None] * D + cols_B[None, :]
        grad_RB = tl.load(grad_y_ptr + places_RB, mask=inside_RB, other=0.0).to(tl.float32)
        normed_RB = tl.load(h_ptr + places_RB, mask=inside_RB, other=0.0).to(tl.float32)
        if grad_residual_ptr is not None:
            grad_residual_RB = tl.load(grad_residual_ptr + places_RB, mask=inside_RB, other=0.0)
        rstd_R = tl.load(rstd_ptr + rows_R, mask=rows_R < num_rows, other=0.0)
        normed_RB *= rstd_R[:, None]
        sums_RB += grad_RB * normed_RB
        grad_RB *= weight_B[None, :]
        mean_R = tl.sum(grad_RB * normed_RB, axis=1) / D
        grad_RB = rstd_R[:, None] * (grad_RB - normed_RB * mean_R[:, None])
        if grad_residual_ptr is not None:
            grad_RB += grad_residual_RB.to(tl.float32)
        stored_RB = grad_RB.to(grad_h_ptr.dtype.element_ty)
        tl.store(grad_h_ptr + places_RB, stored_RB, mask=inside_RB)
        if amax_ptr is not None:
            top_RB = tl.maximum(top_RB, magnitudes(stored_RB))
    if amax_ptr is not None:
        raise_amax(amax_ptr, top_RB)
    tl.store(sums_ptr + tl.program_id(0) * D + cols_B, tl.sum(sums_RB, axis=0), mask=cols_B < D)


@triton.jit(do_not_specialize=["num_sums"])
def add_sums_kernel(sums_ptr, total_ptr, num_sums, D: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    cols_B = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total_RB = tl.zeros((ROWS, BLOCK), tl.float32)
    for first in range(0, num_sums, ROWS):
        rows_R = first + tl.arange(0, ROWS)
        inside_RB = (rows_R < num_sums)[:, None] & (cols_B < D)[None, :]
        total_RB += tl.load(sums_ptr + rows_R[:, None] * D + cols_B[None, :], mask=inside_RB, other=0.0)
    total_B = tl.load(total_ptr + cols_B, mask=cols_B < D, other=0.0) + tl.sum(total_RB, axis=0)
    tl.store(total_ptr + cols_B, total_B, mask=cols_B < D)


def rms_norm_forward(
    x_TD: Tensor, weight_D: Tensor, eps: float, residual_TD: Tensor | None = None, *, amax: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(y_TD, h_TD, rstd_T): h is the rounded x + residual, or x itself without a residual.

    Raises `amax` to the largest magnitude of y.
    """
    (num_rows, dim), dtype = x_TD.shape, storage("x_TD", x_TD)
    check("x_TD", x_TD, dtype, num_rows, dim)
    check("weight_D", weight_D, dtype, dim)
    if residual_TD is not None:
        check("residual_TD", residual_TD, dtype, num_rows, dim)
    y_TD, rstd_T = torch.empty_like(x_TD), x_TD.new_empty(num_rows, dtype=torch.float32)
    h_TD = x_TD if residual_TD is None else torch.empty_like(x_TD)
    if num_rows:
        rows, block, num_warps = _tile(dim, FORWARD_PER_THREAD)
        rms_norm_forward_kernel[(ceil_div(num_rows, rows),)](
            x_TD, residual_TD, weight_D, y_TD, h_TD, rstd_T, amax_bits(amax), num_rows, eps,
            D=dim, ROWS=rows, BLOCK=block, num_warps=num_warps, enable_fp_fusion=False,
        )  # fmt: skip
    return y_TD, h_TD, rstd_T


def rms_norm_backward(
    grad_y_TD: Tensor,
    h_TD: Tensor,
    weight_D: Tensor,
    rstd_T: Tensor,
    *,
    grad_weight_D: Tensor,
    grad_residual_TD: Tensor | None = None,
    amax: Tensor | None = None,
) -> Tensor:
    """Returns grad_h_TD (+ grad_residual_TD if given) and adds the weight's gradient into fp32 `grad_weight_D`.

    Raises `amax` to the largest magnitude of the result.
    """
    (num_rows, dim), dtype = h_TD.shape, storage("h_TD", h_TD)
    check("h_TD", h_TD, dtype, num_rows, dim)
    check("grad_y_TD", grad_y_TD, dtype, num_rows, dim)
    check("weight_D", weight_D, dtype, dim)
    check("rstd_T", rstd_T, torch.float32, num_rows)
    check("grad_weight_D", grad_weight_D, torch.float32, dim)
    if grad_residual_TD is not None:
        check("grad_residual_TD", grad_residual_TD, dtype, num_rows, dim)
    grad_h_TD = torch.empty_like(h_TD)
    if num_rows:
        rows, block, num_warps = _tile(dim, BACKWARD_PER_THREAD)
        resident = multiprocessors(h_TD.device) * (RESIDENT_WARPS // num_warps)
        num_programs = min(resident, ceil_div(num_rows, rows))
        sums_PD = h_TD.new_empty(num_programs, dim, dtype=torch.float32)
        rms_norm_backward_kernel[(num_programs,)](
            grad_y_TD, h_TD, weight_D, rstd_T, grad_residual_TD, grad_h_TD, sums_PD, amax_bits(amax),
            num_rows,
            D=dim, ROWS=rows, BLOCK=block, num_warps=num_warps, maxnreg=BACKWARD_REGISTERS, enable_fp_fusion=False,
        )  # fmt: skip
        add_sums_kernel[(ceil_div(dim, SUM_COLUMNS),)](
            sums_PD, grad_weight_D, num_programs,
            D=dim, ROWS=SUM_ROWS, BLOCK=SUM_COLUMNS, num_warps=8, enable_fp_fusion=False,
        )  # fmt: skip
    return grad_h_TD


def _tile(dim: int, per_thread: int) -> tuple[int, int, int]:
    """(rows, columns, warps) of a program's tile."""
    if not 0 < dim <= LONGEST_ROW:
        raise ValueError(f"a row of {dim} elements does not fit in one program; it must have 1 to {LONGEST_ROW}")
    block = power_of_two(dim)
    rows = max(1, 8 * 32 * per_thread // block)
    return rows, block, warps(rows * block, per_thread=per_thread)
