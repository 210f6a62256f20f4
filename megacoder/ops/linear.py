"""Weight gradients of linear layers, accumulated in fp32 across microbatches whatever dtype the GEMM runs in.

Legend: T tokens, O output dim, I input dim. `grad_weight` is a view of the flat fp32 gradient buffer, so nothing is
copied between the backward and the reduce-scatter.
"""

import torch
from torch import Tensor

from megacoder.ops.backends import backend
from megacoder.ops.cpp import address, kernels

__all__ = ["accumulate_weight_grad"]


def accumulate_weight_grad(grad_weight_OI: Tensor, grad_out_TO: Tensor, x_TI: Tensor) -> None:
    """grad_weight += grad_out^T x, the sum in fp32."""
    if grad_out_TO.dtype == torch.float32:
        grad_weight_OI.addmm_(grad_out_TO.t(), x_TI)
        return
    name = backend("weight_grad", grad_out_TO)
    if name == "cublas":  # torch >= 2.8
        torch.addmm(grad_weight_OI, grad_out_TO.t(), x_TI, out_dtype=torch.float32, out=grad_weight_OI)
        return
    partial_OI = grad_out_TO.t() @ x_TI
    if name == "torch":
        grad_weight_OI += partial_OI
        return
    kernels().accumulate(
        True, address(grad_weight_OI, torch.float32, *partial_OI.shape), address(partial_OI, torch.bfloat16),
        partial_OI.numel(),
    )  # fmt: skip
