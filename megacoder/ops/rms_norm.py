"""RMSNorm (arXiv:1910.07467), y = x / sqrt(mean(x^2) + eps) * w, with the residual add folded in.

Legend: T tokens, D model dim. Statistics are fp32 whatever the storage; `rstd_T` is all that the backward needs
besides the input. The residual gradient is added in the same pass, so that a block's backward reads it once.

`amax` is an fp32 scalar, zero on entry, that receives the largest magnitude of the result, for a cast to fp8.
"""

import torch
from torch import Tensor

from megacoder.ops.backends import backend, triton_module
from megacoder.ops.cpp import address, kernels
from megacoder.ops.fp8 import note_magnitude

__all__ = ["rms_norm", "rms_norm_backward", "rms_norm_forward"]


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Reference, differentiable by torch; x is (..., D), fp32 inside (fp64 for fp64), the result has x's dtype."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps) * weight_D).to(x.dtype)


def rms_norm_forward(
    x_TD: Tensor, weight_D: Tensor, eps: float, *, residual_TD: Tensor | None = None, amax: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns (y_TD, h_TD, rstd_T), where h = x + residual is what was normalized (x itself without a residual)."""
    name, (rows, dim), dtype = backend("rms_norm", x_TD), x_TD.shape, x_TD.dtype
    if name == "triton":
        return triton_module("rms_norm").rms_norm_forward(x_TD, weight_D, eps, residual_TD, amax=amax)
    if name == "torch":
        h_TD = x_TD if residual_TD is None else x_TD + residual_TD
        wide = h_TD.float()
        rstd_T = torch.rsqrt(wide.pow(2).mean(-1) + eps)
        y_TD = (wide * rstd_T[:, None] * weight_D).to(x_TD.dtype)
        note_magnitude(y_TD, amax)
        return y_TD, h_TD, rstd_T
    y_TD, rstd_T = torch.empty_like(x_TD), torch.empty(rows, dtype=torch.float32)
    h_TD = x_TD if residual_TD is None else torch.empty_like(x_TD)
    kernels().rms_norm_forward(
        dtype == torch.bfloat16, address(x_TD, dtype), address(residual_TD, dtype, rows, dim),
        address(weight_D, dtype, dim), address(h_TD, dtype), address(y_TD, dtype), address(rstd_T, torch.float32),
        rows, dim, eps,
    )  # fmt: skip
    note_magnitude(y_TD, amax)
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
    """Returns grad_h_TD (+ grad_residual_TD if given) and adds the weight's gradient into fp32 `grad_weight_D`."""
    name = backend("rms_norm", grad_y_TD)
    if name == "triton":
        return triton_module("rms_norm").rms_norm_backward(
            grad_y_TD, h_TD, weight_D, rstd_T,
            grad_weight_D=grad_weight_D, grad_residual_TD=grad_residual_TD, amax=amax,
        )  # fmt: skip
    if name == "torch":
        wide_dy, wide_h = grad_y_TD.float(), h_TD.float()
        normed = wide_h * rstd_T[:, None]
        grad_weight_D += (wide_dy * normed).sum(0)
        scaled = wide_dy * weight_D
        grad = rstd_T[:, None] * (scaled - normed * (scaled * normed).mean(-1, keepdim=True))
        grad_h_TD = (grad if grad_residual_TD is None else grad + grad_residual_TD).to(h_TD.dtype)
        note_magnitude(grad_h_TD, amax)
        return grad_h_TD
    (rows, dim), dtype = h_TD.shape, h_TD.dtype
    grad_h_TD = torch.empty_like(h_TD)
    kernels().rms_norm_backward(
        dtype == torch.bfloat16, address(grad_y_TD, dtype, rows, dim), address(h_TD, dtype),
        address(weight_D, dtype, dim), address(rstd_T, torch.float32, rows),
        address(grad_residual_TD, dtype, rows, dim), address(grad_h_TD, dtype),
        address(grad_weight_D, torch.float32, dim), rows, dim,
    )  # fmt: skip
    note_magnitude(grad_h_TD, amax)
    return grad_h_TD
