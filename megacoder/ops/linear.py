"""The three products of a linear layer, y = x W^T, dx = g W and dW += g^T x, on factors in either of two precisions.
A bias is added to the first; its gradient is the sum of g over tokens.

Legend: T tokens, O output dim, I input dim. `grad_weight` is a view of the flat fp32 gradient buffer, so nothing is
copied between the backward and the reduce-scatter: it accumulates in fp32 across microbatches, whatever the product
runs in.

A factor is what a product takes: the tensor itself, or in fp8 its casts (see `megacoder.ops.fp8`). `Precision` makes
factors; the code that runs a layer only says whether a tensor is an input, a weight or a gradient.
"""

import importlib
from dataclasses import dataclass

import torch
from torch import Tensor

from megacoder.ops.backends import backend
from megacoder.ops.cpp import address, kernels
from megacoder.ops.fp8 import E4M3, E5M2, Fp8Factor, fp8_cast, fp8_product

__all__ = [
    "STORED",
    "WIDENED_TOKENS",
    "Factor",
    "Precision",
    "accumulate_bias_grad",
    "accumulate_weight_grad",
    "for_later",
    "linear_forward",
    "linear_input_grad",
    "partial_rows",
]

Factor = Tensor | Fp8Factor
"""Both factors of a product are of the same kind."""

FAST_FORWARD_SUMS, FAST_GRADIENT_SUMS = True, False
"""See `fp8_product`. A weight gradient sums small terms over as many as 32,768 tokens: there the relative error is
0.004 with fast sums and 0.0001 with slow ones, where casting alone costs 0.06. Fast ones would shorten a step by 2%."""

PARTIAL_ELEMENTS = 1 << 22
"""Elements of a weight gradient that a CPU computes in bf16 before adding them to the sum: 8 MB. Most layers have
fewer; all of an output head's would be the largest tensor of a step after its logits."""

WIDENED_TOKENS = 128
"""Tokens whose output gradients are summed for a bias at a time on a CPU, where torch copies them to fp32 first."""


@dataclass(frozen=True)
class Precision:
    """What tensors are cast to before they are multiplied."""

    fp8: bool = False
    """False: they are multiplied as they are"""

    def new_amax(self, like: Tensor) -> Tensor | None:
        """Where an op writes the largest magnitude of its result, on the device of `like`; None: it is not needed."""
        return like.new_zeros((), dtype=torch.float32) if self.fp8 else None

    def input(self, x_TI: Tensor, amax: Tensor | None = None) -> Factor:
        """The factor of a layer's input; `amax` is its largest magnitude where that is known."""
        return fp8_cast(x_TI, E4M3, amax) if self.fp8 else x_TI

    def weight(self, weight_OI: Tensor) -> Factor:
        """The factor of a layer's weight."""
        return fp8_cast(weight_OI, E4M3) if self.fp8 else weight_OI

    def grad(self, grad_TO: Tensor, amax: Tensor | None = None) -> Factor:
        """The factor of a layer's output gradient; `amax` as for `input`."""
        return fp8_cast(grad_TO, E5M2, amax) if self.fp8 else grad_TO


STORED = Precision()


def for_later(factor: Factor) -> Factor:
    """The part of a factor that the backward still reads after the first product with it.

    For inputs and gradients the weight gradient reads it, for weights the input gradient.
    """
    return factor.transpose_alone() if isinstance(factor, Fp8Factor) else factor


def linear_forward(x_TI: Factor, weight_OI: Factor, bias_O: Tensor | None = None) -> Tensor:
    """(T, O) = x W^T + bias, in bf16 for fp8 factors, to whose product the bias is added afterwards."""
    if isinstance(x_TI, Fp8Factor):
        assert isinstance(weight_OI, Fp8Factor)
        scales = x_TI.inverse_scale, weight_OI.inverse_scale
        product_TO = fp8_product(x_TI.rows_RC, weight_OI.rows_RC, scales, fast_sums=FAST_FORWARD_SUMS)
        return product_TO if bias_O is None else product_TO.add_(bias_O)
    assert isinstance(weight_OI, Tensor)
    return x_TI @ weight_OI.t() if bias_O is None else torch.addmm(bias_O, x_TI, weight_OI.t())


def linear_input_grad(grad_out_TO: Factor, weight_OI: Factor) -> Tensor:
    """(T, I) = g W, in bf16 for fp8 factors."""
    if isinstance(grad_out_TO, Fp8Factor):
        assert isinstance(weight_OI, Fp8Factor)
        scales = grad_out_TO.inverse_scale, weight_OI.inverse_scale
        return fp8_product(grad_out_TO.rows_RC, weight_OI.columns_CR, scales, fast_sums=FAST_GRADIENT_SUMS)
    assert isinstance(weight_OI, Tensor)
    return grad_out_TO @ weight_OI


def accumulate_bias_grad(grad_bias_O: Tensor, grad_out_TO: Tensor) -> None:
    """grad_bias += the sum of g over tokens, in fp32; g is as yet uncast."""
    widened = grad_out_TO.dtype != torch.float32 and not grad_out_TO.is_cuda
    for grad_RO in grad_out_TO.split(WIDENED_TOKENS if widened else len(grad_out_TO)):
        grad_bias_O += grad_RO.sum(0, dtype=torch.float32)


def partial_rows(num_inputs: int) -> int:
    """Rows of a weight gradient that a CPU computes in bf16 at a time."""
    return max(1, PARTIAL_ELEMENTS // num_inputs)


def accumulate_weight_grad(grad_weight_OI: Tensor, grad_out_TO: Factor, x_TI: Factor) -> None:
    """grad_weight += grad_out^T x, the sum in fp32."""
    if isinstance(grad_out_TO, Fp8Factor):
        assert isinstance(x_TI, Fp8Factor)
        # Computed in fp32 and added by a second kernel: torch's fp8 product cannot accumulate. This moves 16 bytes per
        # weight; through bf16 it would be 12, and a rounding.
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
    if name == "cublas":
        torch.addmm(grad_weight_OI, grad_out_TO.t(), x_TI, out_dtype=torch.float32, out=grad_weight_OI)
        return
    if name == "apex":
        apex = importlib.import_module("fused_weight_gradient_mlp_cuda")
        # apex reads addresses and ignores strides.
        apex.wgrad_gemm_accum_fp32(x_TI.contiguous(), grad_out_TO.contiguous(), grad_weight_OI)
        return
    if name == "torch":
        grad_weight_OI += grad_out_TO.t() @ x_TI
        return
    if name == "amx":
        grad_out_TO, x_TI = grad_out_TO.contiguous(), x_TI.contiguous()
        tokens, outputs, inputs = *grad_out_TO.shape, x_TI.shape[1]
        kernels().weight_grad(
            address(grad_weight_OI, torch.float32, outputs, inputs), address(grad_out_TO, torch.bfloat16),
            address(x_TI, torch.bfloat16, tokens, inputs), tokens, outputs, inputs,
        )  # fmt: skip
        return
    rows = partial_rows(x_TI.shape[1])
    for grad_RI, grad_out_TR in zip(grad_weight_OI.split(rows), grad_out_TO.split(rows, dim=1), strict=True):
        partial_RI = grad_out_TR.t() @ x_TI
        kernels().accumulate(
            True, address(grad_RI, torch.float32, *partial_RI.shape), address(partial_RI, torch.bfloat16),
            partial_RI.numel(),
        )  # fmt: skip
        del partial_RI  # before the next is allocated
