"""y = x W^T + bias for a handful of rows, the product of a decoding step; its whole cost is reading the weights once.

Legend: B rows, I input dim, O output dim. BLAS libraries block for many rows; with eight rows they read the weights
several times. Not differentiable.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from megacoder.ops.backends import backend
from megacoder.ops.cpp import address, kernels

__all__ = ["FEW", "few_rows_linear"]

FEW = 16
"""Rows up to which the kernel is faster than BLAS, even where weights come from memory, which it prefetches."""


def few_rows_linear(x_BI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """(B, I), (O, I), (O,) -> (B, O)."""
    rows, dim = x_BI.shape
    if rows > FEW or backend("few_rows", x_BI) == "torch":
        return F.linear(x_BI, weight_OI, bias_O)
    x_BI, dtype, width = x_BI.contiguous(), x_BI.dtype, len(weight_OI)
    out_BO = x_BI.new_empty(rows, width)
    kernels().few_rows_linear(
        dtype == torch.bfloat16, address(x_BI, dtype), address(weight_OI, dtype, width, dim),
        address(out_BO, dtype), rows, dim, width,
    )  # fmt: skip
    return out_BO if bias_O is None else out_BO.add_(bias_O)
