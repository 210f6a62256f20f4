"""SwiGLU (arXiv:2002.05202): silu(gate) * up, on the one tensor [gate | up] that a fused projection produces.

Legend: T tokens, F feed-forward dim. The activation is not kept for the backward: the backward reads gate and up
anyway, overwrites them with their gradients, and on request returns the activation for the down projection's weight
gradient (in fp8 the activation's cast, half as large, is kept instead).

`amax` is an fp32 scalar, zero on entry, that receives the largest magnitude of the result, for a cast to fp8.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from megacoder.ops.backends import backend, triton_module
from megacoder.ops.cpp import address, kernels
from megacoder.ops.fp8 import note_magnitude

__all__ = ["swiglu", "swiglu_backward_", "swiglu_forward"]


def swiglu(gate_up: Tensor) -> Tensor:
    """Reference, differentiable by torch: (..., 2F) -> (..., F)."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def swiglu_forward(gate_up_T2F: Tensor, *, amax: Tensor | None = None) -> Tensor:
    """(T, 2F) -> (T, F)."""
    name = backend("swiglu", gate_up_T2F)
    if name == "triton":
        return triton_module("swiglu").swiglu_forward(gate_up_T2F, amax=amax)
    if name == "torch":
        out_TF = swiglu(gate_up_T2F)
        note_magnitude(out_TF, amax)
        return out_TF
    rows, width = gate_up_T2F.shape
    out_TF = gate_up_T2F.new_empty(rows, width // 2)
    dtype = gate_up_T2F.dtype
    kernels().swiglu_forward(
        dtype == torch.bfloat16, address(gate_up_T2F, dtype), address(out_TF, dtype), rows, width // 2
    )
    note_magnitude(out_TF, amax)
    return out_TF


def swiglu_backward_(
    grad_TF: Tensor, gate_up_T2F: Tensor, *, forms_activation: bool = True, amax: Tensor | None = None
) -> Tensor | None:
    """Overwrites `gate_up_T2F` with its gradient; returns the recomputed activation (T, F), or None.

    `amax` receives the gradient's largest magnitude.
    """
    name, (rows, width) = backend("swiglu", gate_up_T2F), gate_up_T2F.shape
    if name == "triton":
        return triton_module("swiglu").swiglu_backward_(
            grad_TF, gate_up_T2F, forms_activation=forms_activation, amax=amax
        )
    if name == "torch":
        gate, up = gate_up_T2F.float().chunk(2, dim=-1)
        sigmoid = torch.sigmoid(gate)
        silu, grad = gate * sigmoid, grad_TF.float()
        activation = (silu * up).to(gate_up_T2F.dtype)
        gate_up_T2F.copy_(torch.cat((grad * up * (sigmoid + silu * (1 - sigmoid)), grad * silu), dim=-1))
        note_magnitude(gate_up_T2F, amax)
        return activation if forms_activation else None
    activation, dtype = torch.empty_like(grad_TF), gate_up_T2F.dtype
    kernels().swiglu_backward(
        dtype == torch.bfloat16, address(grad_TF, dtype, rows, width // 2), address(gate_up_T2F, dtype),
        address(activation, dtype), rows, width // 2,
    )  # fmt: skip
    note_magnitude(gate_up_T2F, amax)
    return activation if forms_activation else None
