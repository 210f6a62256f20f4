"""Linear cross-entropy: the output head and its loss in one pass over chunks of tokens.

Legend: T tokens, D model dim, W output rows (the vocabulary and its padding), C tokens of one chunk.
Full logits in fp32 would be the largest tensor of a step (4.2 GB at W=32,256, 8 x 4,096 tokens); here a chunk's logits
live once, in the storage dtype, and are overwritten by their own gradient, from which both matrix gradients follow at
once. Nothing is kept for a backward.

The loss is a sum over tokens: the one division, by the tokens of the global batch, is made in the update.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megacoder.ops.backends import backend, triton_module
from megacoder.ops.cpp import address, kernels
from megacoder.ops.linear import accumulate_weight_grad

__all__ = [
    "IGNORE_INDEX",
    "LossSum",
    "chunk_tokens",
    "count_labels",
    "cross_entropy_",
    "linear_cross_entropy",
    "linear_cross_entropy_sum",
    "linear_cross_entropy_with_grads",
    "rescale_subtract_",
    "softmax_",
]

IGNORE_INDEX = -100
"""The label of a token that is not trained on."""

CHUNK_ELEMENTS = {"cpu": 1 << 24, "cuda": 1 << 28}
"""Logits per chunk by device type: 512 and 8,320 tokens at W=32,256. Enough for full GEMM speed, too few to set the
peak of memory; a GPU needs more, since each chunk reads and writes the head's whole fp32 gradient."""


@dataclass(frozen=True)
class LossSum:
    """What a microbatch contributes to the loss of the global batch."""

    total: Tensor
    """sum of token losses, nats, fp64 scalar"""
    num_tokens: int
    """labels that were not IGNORE_INDEX"""


def linear_cross_entropy(x_TD: Tensor, weight_WD: Tensor, labels_T: Tensor, *, vocab: int) -> Tensor:
    """Reference, differentiable by torch: the sum of token losses over the first `vocab` of W output rows."""
    logits = F.linear(x_TD, weight_WD[:vocab])
    return F.cross_entropy(
        logits.to(torch.promote_types(logits.dtype, torch.float32)),
        labels_T,
        ignore_index=IGNORE_INDEX,
        reduction="sum",
    )


def cross_entropy_(logits_CW: Tensor, labels_C: Tensor, *, vocab: int) -> Tensor:
    """Token losses (C,) fp32; overwrites the logits with softmax - onehot.

    The gradient is zero in the W - vocab columns of padding and where the label is IGNORE_INDEX.
    """
    name = backend("cross_entropy", logits_CW)
    if name == "triton":
        return triton_module("cross_entropy").cross_entropy_(logits_CW, labels_C, vocab=vocab)
    if name == "torch":
        wide = logits_CW[:, :vocab].float()
        wide = wide - wide.amax(-1, keepdim=True)  # so that a huge largest logit does not swallow the sum's digits
        log_sum = torch.logsumexp(wide, dim=-1)
        counted = labels_C != IGNORE_INDEX
        rows, targets = torch.arange(len(labels_C), device=labels_C.device), labels_C.clamp_min(0)
        loss_C = torch.where(counted, log_sum - wide[rows, targets], 0.0)
        grad = torch.exp(wide - log_sum[:, None])
        grad[rows, targets] -= 1.0
        logits_CW.zero_()[:, :vocab] = grad * counted[:, None]
        return loss_C
    loss_C = torch.empty(len(labels_C), dtype=torch.float32)
    kernels().cross_entropy(
        logits_CW.dtype == torch.bfloat16, address(logits_CW, logits_CW.dtype),
        address(labels_C, torch.int64, len(logits_CW)), address(loss_C, torch.float32),
        *logits_CW.shape, vocab,
    )  # fmt: skip
    return loss_C


def softmax_(logits_CW: Tensor, *, vocab: int) -> Tensor:
    """Log-sum-exp (C,) fp32 of the first `vocab` columns, -inf if there are none; overwrites the logits with softmax.

    The softmax is zero in the W - vocab columns of padding.
    """
    name = backend("cross_entropy", logits_CW)
    if name == "triton":
        return triton_module("cross_entropy").softmax_(logits_CW, vocab=vocab)
    if vocab == 0 or name == "torch":
        wide = logits_CW[:, :vocab].float()
        lse_C = torch.logsumexp(wide, dim=-1)
        logits_CW.zero_()[:, :vocab] = torch.exp(wide - lse_C[:, None])
        return lse_C
    lse_C = torch.empty(len(logits_CW), dtype=torch.float32)
    kernels().attention_softmax(  # one query per row, which sees `vocab` of W keys
        logits_CW.dtype == torch.bfloat16, address(logits_CW, logits_CW.dtype), address(lse_C, torch.float32),
        0, len(lse_C), 1, logits_CW.shape[1], vocab, 1.0,
    )  # fmt: skip
    return lse_C


def rescale_subtract_(probs_CW: Tensor, scale_C: Tensor, rows_C: Tensor, owned_C: Tensor) -> None:
    """Multiplies each token's probabilities by its fp32 scale and, where `owned_C`, subtracts 1 in column `rows_C`.

    A rank that holds part of the vocabulary calls it once it knows the other ranks' log-sum-exps.
    """
    if backend("cross_entropy", probs_CW) == "triton":
        triton_module("cross_entropy").rescale_subtract_(probs_CW, scale_C, rows_C, owned_C)
        return
    probs_CW *= scale_C[:, None].to(probs_CW.dtype)
    probs_CW.scatter_add_(1, rows_C[:, None], owned_C[:, None].to(probs_CW.dtype).neg())


def chunk_tokens(num_ids: int, device_type: str) -> int:
    """Tokens per chunk of logits over `num_ids` ids; above 256 tokens, full 128-row GEMM tiles."""
    tokens = CHUNK_ELEMENTS[device_type] // num_ids
    return max(1, tokens // 128 * 128 if tokens > 256 else tokens)


def count_labels(labels_T: Tensor, vocab: int) -> int:
    """How many labels are trained on; IndexError for one outside [0, vocab). On a GPU the host waits for the labels."""
    counted = labels_T != IGNORE_INDEX
    outside = counted & ((labels_T < 0) | (labels_T >= vocab))
    if bool(outside.any()):
        raise IndexError(f"label {int(labels_T[outside][0])} is outside the vocabulary of {vocab} ids")
    return int(counted.sum())


def linear_cross_entropy_with_grads(
    x_TD: Tensor,
    weight_WD: Tensor,
    labels_T: Tensor,
    *,
    vocab: int,
    grad_weight_WD: Tensor,
    num_tokens: int | None = None,
) -> tuple[LossSum, Tensor]:
    """The loss sum and d(sum)/dx (T, D); adds d(sum)/dweight into fp32 `grad_weight_WD`.

    IndexError for a label outside [0, vocab), instead of an out-of-bounds read in a kernel. `num_tokens` is the result
    of `count_labels` where the caller has called it already, ideally before the labels went to the device.
    """
    num_tokens = count_labels(labels_T, vocab) if num_tokens is None else num_tokens
    grad_x_TD = torch.empty_like(x_TD)
    total = torch.zeros((), dtype=torch.float64, device=x_TD.device)
    chunk = chunk_tokens(weight_WD.shape[0], weight_WD.device.type)
    for x_CD, labels_C, grad_x_CD in zip(x_TD.split(chunk), labels_T.split(chunk), grad_x_TD.split(chunk), strict=True):
        logits_CW = x_CD @ weight_WD.t()
        total += cross_entropy_(logits_CW, labels_C, vocab=vocab).sum(dtype=torch.float64)
        torch.mm(logits_CW, weight_WD, out=grad_x_CD)
        accumulate_weight_grad(grad_weight_WD, logits_CW, x_CD)
        del logits_CW  # before the next chunk's are allocated
    return LossSum(total, num_tokens), grad_x_TD


def linear_cross_entropy_sum(
    x_TD: Tensor, weight_WD: Tensor, labels_T: Tensor, *, vocab: int, num_tokens: int | None = None
) -> LossSum:
    """The loss sum alone, for evaluation; the same chunks, the same errors."""
    num_tokens = count_labels(labels_T, vocab) if num_tokens is None else num_tokens
    total = torch.zeros((), dtype=torch.float64, device=x_TD.device)
    chunk = chunk_tokens(weight_WD.shape[0], weight_WD.device.type)
    for x_CD, labels_C in zip(x_TD.split(chunk), labels_T.split(chunk), strict=True):
        total += cross_entropy_(x_CD @ weight_WD.t(), labels_C, vocab=vocab).sum(dtype=torch.float64)
    return LossSum(total, num_tokens)
