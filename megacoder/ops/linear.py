"""The three products of a linear layer, y = x W^T, dx = g W and dW += g^T x, on factors in either of two precisions.

Legend: T tokens, O output dim, I input dim. `grad_weight` is a view of the flat fp32 gradient buffer, so nothing is
copied between the backward and the reduce-scatter: it is added to in fp32 across microbatches, whatever the product
runs in.

A factor is what a product takes: the tensor itself, or in fp8 its casts (see `megacoder.ops.fp8`). `Precision` makes
them, and whoever runs a layer says only which of the three kinds a tensor is.
"""

import importlib
from dataclasses import dataclass

import torch
from torch import Tensor

from megacoder.ops.backends import backend
from megacoder.ops.cpp import address, kernels
from megacoder.ops.fp8 import E4M3, E5M2, Fp8Factor, fp8_cast, fp8_product

__all__ = [
    "FP8",
    "STORED",
    "Factor",
    "Precision",
    "accumulate_weight_grad",
    "for_later",
    "linear_forward",
    "linear_input_grad",
]

Factor = Tensor | Fp8Factor
"""Both factors of a product are of one kind."""

FAST_FORWARD_SUMS, FAST_GRADIENT_SUMS = True, False
"""See `fp8_product`. Gradients are what small terms add up to, over as many as 32,768 tokens: there fast sums err by
0.004 of a weight gradient, slow ones by 0.0001, where casting has cost 0.06. Fast ones would make a step 2% shorter."""

PARTIAL_ELEMENTS = 1 << 22
"""Of a weight gradient that a CPU forms in bf16 before it joins the sum: 8 MB. Most layers have fewer; a whole output
head's would be the largest tensor of a step but for its logits."""


@dataclass(frozen=True)
class Precision:
    """What tensors become before they are multiplied."""

    fp8: bool = False
    """else they are multiplied as they are"""

    def new_amax(self, like: Tensor) -> Tensor | None:
        """What an op puts the largest magnitude of its result into, on the device of `like`; None: nobody wants it."""
        return like.new_zeros((), dtype=torch.float32) if self.fp8 else None

    def input(self, x_TI: Tensor, amax: Tensor | None = None) -> Factor:
        """Of a layer's input; `amax` is its largest magnitude where that is known."""
        return fp8_cast(x_TI, E4M3, amax) if self.fp8 else x_TI

    def weight(self, weight_OI: Tensor) -> Factor:
        """Of its weight."""
        return fp8_cast(weight_OI, E4M3) if self.fp8 else weight_OI

    def grad(self, grad_TO: Tensor, amax: Tensor | None = None) -> Factor:
        """Of its output's gradient; `amax` as for `input`."""
        return fp8_cast(grad_TO, E5M2, amax) if self.fp8 else grad_TO


STORED = Precision()
FP8 = Precision(fp8=True)


def for_later(factor: Factor) -> Factor:
    """As much of a factor as the backward still reads once the first product with it is done.

    Of inputs and gradients the weight gradient reads it, of weights the input gradient.
    """
    return factor.transpose_alone() if isinstance(factor, Fp8Factor) else factor


def linear_forward(x_TI: Factor, weight_OI: Factor) -> Tensor:
    """(T, O) = x W^T, in bf16 of fp8 factors."""
    if isinstance(x_TI, Fp8Factor):
        assert isinstance(weight_OI, Fp8Factor)
        scales = x_TI.inverse_scale, weight_OI.inverse_scale
        return fp8_product(x_TI.rows_RC, weight_OI.rows_RC, scales, fast_sums=FAST_FORWARD_SUMS)
    assert isinstance(weight_OI, Tensor)
    return x_TI @ weight_OI.t()


def linear_input_grad(grad_out_TO: Factor, weight_OI: Factor) -> Tensor:
    """(T, I) = g W, in bf16 of fp8 factors."""
    if isinstance(grad_out_TO, Fp8Factor):
        assert isinstance(weight_OI, Fp8Factor)
        scales = grad_out_TO.inverse_scale, weight_OI.inverse_scale
        return fp8_product(grad_out_TO.rows_RC, weight_OI.columns_CR, scales, fast_sums=FAST_GRADIENT_SUMS)
    assert isinstance(weight_OI, Tensor)
    return grad_out_TO @ weight_OI


def accumulate_weight_grad(grad_weight_OI: Tensor, grad_out_TO: Factor, x_TI: Factor) -> None:
    """grad_weight += grad_out^T x, the sum in fp32."""
    if isinstance(grad_out_TO, Fp8Factor):
        assert isinstance(x_TI, Fp8Factor)
        # In fp32 and added by a kernel of its own: torch's fp8 product cannot add to what is there. 16 bytes move for
        # each weight; through bf16 it would be 12, and a rounding.
        grad_weight_OI += fp8_product(
            grad_out_TO.columns_CR, x_TI.columns_CR, (grad_out_TO.inverse_scale, x_TI.inverse_scale),
            dtype=torch.float32, fast_sums=FAST_GRADIENT_SUMS,
        )  # fmt: skip
        return
    assert isinstance(x_TI, Tensor)
    if grad_out_TO.dtype == torch.float32:
        grad_weight_OI.addmm_(grad_out_TO.t(), x_TI)
        return
    name = backend("weight_grad", grad_out_TO)
    if name == "cublas":  # torch >= 2.8
        torch.addmm(grad_weight_OI, grad_out_TO.t(), x_TI, out_dtype=torch.float32, out=grad_weight_OI)
        return
    if name == "apex":
        apex = importlib.import_module("fused_weight_gradient_mlp_cuda")
        # It takes addresses and looks at no strides.
        apex.wgrad_gemm_accum_fp32(x_TI.contiguous(), grad_out_TO.contiguous(), grad_weight_OI)
        return
    if name == "torch":
        grad_weight_OI += grad_out_TO.t() @ x_TI
        return
    rows = max(1, PARTIAL_ELEMENTS // x_TI.shape[1])
    for grad_RI, grad_out_TR in zip(grad_weight_OI.split(rows), grad_out_TO.split(rows, dim=1), strict=True):
        partial_RI = grad_out_TR.t() @ x_TI
        kernels().accumulate(
            True, address(grad_RI, torch.float32, *partial_RI.shape), address(partial_RI, torch.bfloat16),
            partial_RI.numel(),
        )  # fmt: skip
        del partial_RI  # before the next is there
