"""SwiGLU over rows [gate | up], forward and in-place backward; the op is described in `megacoder.ops.swiglu`.

Legend: T tokens, F feed-forward dim; within a kernel B elements of the (T, F) activation, numbered across all rows.

Numbering across rows leaves no tile half empty when F is not a power of two (5504 = 43 * 128). If F is a multiple of 8,
a thread's 8 neighboring elements lie in one row: the compiler proves it, and loads them at once. Two such groups per
thread are four 16-byte loads in flight in the forward and six in the backward.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megacoder.ops.triton_kernels.launch import amax_bits, ceil_div, check, magnitudes, raise_amax, storage, warps

__all__ = ["swiglu_backward_", "swiglu_forward"]

TILE = 4096


@triton.jit
def _block(num_rows, F: tl.constexpr, BLOCK: tl.constexpr):
    """(places in the activation, places of the gates in [gate | up], which are real) of this program's elements.

    The first element's row is a scalar, so that the elements' own divisions are of 32 bits. An element's row says
    whether it is real: the compiler then knows that all neighbors in one row agree, as it would not from a bound on
    their places.
    """
    first = tl.program_id(0).to(tl.int64) * BLOCK
    row = first // F
    cols_B = (first - row * F).to(tl.int32) + tl.arange(0, BLOCK)
    places_B = first + tl.arange(0, BLOCK)
    return places_B, row * (2 * F) + cols_B // F * (2 * F) + cols_B % F, cols_B // F < num_rows - row


@triton.jit(do_not_specialize=["num_rows"])
def swiglu_forward_kernel(gate_up_ptr, out_ptr, amax_ptr, num_rows, F: tl.constexpr, BLOCK: tl.constexpr):
    places_B, gates_B, inside_B = _block(num_rows, F, BLOCK)
    gate_B = tl.load(gate_up_ptr + gates_B, mask=inside_B, other=0.0).to(tl.float32)
    up_B = tl.load(gate_up_ptr + gates_B + F, mask=inside_B, other=0.0).to(tl.float32)
    out_B = (gate_B * tl.sigmoid(gate_B) * up_B).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + places_B, out_B, mask=inside_B)
    if amax_ptr is not None:
        raise_amax(amax_ptr, magnitudes(out_B))


@triton.jit(do_not_specialize=["num_rows"])
def swiglu_backward_kernel(grad_ptr, gate_up_ptr, out_ptr, amax_ptr, num_rows, F: tl.constexpr, BLOCK: tl.constexpr):
    places_B, gates_B, inside_B = _block(num_rows, F, BLOCK)
    gate_B = tl.load(gate_up_ptr + gates_B, mask=inside_B, other=0.0).to(tl.float32)
    up_B = tl.load(gate_up_ptr + gates_B + F, mask=inside_B, other=0.0).to(tl.float32)
    grad_B = tl.load(grad_ptr + places_B, mask=inside_B, other=0.0).to(tl.float32)
    sigmoid_B = tl.sigmoid(gate_B)
    silu_B = gate_B * sigmoid_B
    grad_gate_B = (grad_B * up_B * (sigmoid_B + silu_B * (1.0 - sigmoid_B))).to(gate_up_ptr.dtype.element_ty)
    grad_up_B = (grad_B * silu_B).to(gate_up_ptr.dtype.element_ty)
    if out_ptr is not None:
        tl.store(out_ptr + places_B, (silu_B * up_B).to(out_ptr.dtype.element_ty), mask=inside_B)
    tl.store(gate_up_ptr + gates_B, grad_gate_B, mask=inside_B)
    tl.store(gate_up_ptr + gates_B + F, grad_up_B, mask=inside_B)
    if amax_ptr is not None:
        raise_amax(amax_ptr, tl.maximum(magnitudes(grad_gate_B), magnitudes(grad_up_B)))


def swiglu_forward(gate_up_T2F: Tensor, *, amax: Tensor | None = None) -> Tensor:
    """(T, 2F) -> (T, F); raises `amax` to its largest magnitude."""
    num_rows, dim = _check_rows(gate_up_T2F)
    out_TF = gate_up_T2F.new_empty(num_rows, dim)
    if out_TF.numel():
        swiglu_forward_kernel[(ceil_div(out_TF.numel(), TILE),)](
            gate_up_T2F, out_TF, amax_bits(amax), num_rows,
            F=dim, BLOCK=TILE, num_warps=warps(TILE, per_thread=16), enable_fp_fusion=False,
        )  # fmt: skip
    return out_TF


def swiglu_backward_(
    grad_TF: Tensor, gate_up_T2F: Tensor, *, forms_activation: bool = True, amax: Tensor | None = None
) -> Tensor | None:
    """Overwrites `gate_up_T2F` with its gradient, raises `amax` to the gradient's largest magnitude, and returns the
    recomputed activation (T, F) if requested."""
    num_rows, dim = _check_rows(gate_up_T2F)
    check("grad_TF", grad_TF, gate_up_T2F.dtype, num_rows, dim)
    activation_TF = torch.empty_like(grad_TF) if forms_activation else None
    if grad_TF.numel():
        swiglu_backward_kernel[(ceil_div(grad_TF.numel(), TILE),)](
            grad_TF, gate_up_T2F, activation_TF, amax_bits(amax), num_rows,
            F=dim, BLOCK=TILE, num_warps=warps(TILE, per_thread=16), enable_fp_fusion=False,
        )  # fmt: skip
    return activation_TF


def _check_rows(gate_up_T2F: Tensor) -> tuple[int, int]:
    """(T, F)."""
    num_rows, width = gate_up_T2F.shape
    if width % 2:
        raise ValueError(f"rows of {width} columns do not split into a gate and an up half")
    check("gate_up_T2F", gate_up_T2F, storage("gate_up_T2F", gate_up_T2F), num_rows, width)
    return num_rows, width // 2
