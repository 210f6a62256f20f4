"""Linear cross-entropy whose vocabulary is sharded over the tensor axis.

Each rank computes the logits of its own ids, in chunks of tokens, and keeps none. The ranks exchange two floats per
token: the log-sum-exp over the rank's own ids, and the label's logit if the rank owns it. From all pairs each rank
computes the loss, and the factor that scales its local softmax to the full one; so the gradient needs no second
exchange. One all-gather of pairs replaces three all-reduces (maximum, sum, target), in a third of the latency.

With one rank the functions are those of `megacoder.ops.cross_entropy`.
Legend: T tokens, D model dim, W output rows of this rank, C tokens of one chunk.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from megacoder.ops.cross_entropy import (
    IGNORE_INDEX,
    LossSum,
    chunk_tokens,
    count_labels,
    linear_cross_entropy,
    linear_cross_entropy_sum,
    linear_cross_entropy_with_grads,
    rescale_subtract_,
    softmax_,
)
from megacoder.ops.linear import accumulate_weight_grad
from megacoder.parallel.collectives import all_gather_into
from megacoder.parallel.layers import VocabParallelEmbedding
from megacoder.parallel.tensor import TensorParallel, gather, reduce, start_gather, start_reduce

__all__ = ["head_loss", "head_loss_sum", "head_loss_with_grads"]


def head_loss(stream: Tensor, head: VocabParallelEmbedding, labels_T: Tensor) -> Tensor:
    """Reference, differentiable by torch: the sum of token losses, the same on every rank.

    `stream` is the normalized residual stream (..., D), the labels those of all its tokens on all ranks.
    """
    stream_ND, tp, vocab = stream.flatten(0, -2), head.tp, head.vocab
    if tp.size == 1:
        return linear_cross_entropy(stream_ND, head.weight, labels_T, vocab=vocab)
    count_labels(labels_T, vocab)
    logits = F.linear(gather(stream_ND, tp), head.weight)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    wide = wide.masked_fill(torch.arange(wide.shape[1], device=wide.device) >= head.num_ids, float("-inf"))
    top_T = _from_all_ranks(wide.detach().amax(-1), tp).amax(0)
    wide = wide - top_T[:, None]
    rows, elsewhere = head.local_rows(labels_T)
    target_T = wide.gather(1, rows[:, None])[:, 0].masked_fill(elsewhere, 0.0)
    sums = reduce(torch.stack([wide.exp().sum(-1), target_T]), replace(tp, sequence_parallel=False))
    return (sums[0].log() - sums[1]).masked_fill(labels_T == IGNORE_INDEX, 0.0).sum()


def head_loss_with_grads(
    stream_ND: Tensor,
    head: VocabParallelEmbedding,
    labels_T: Tensor,
    *,
    grad_weight_WD: Tensor,
    num_tokens: int | None = None,
) -> tuple[LossSum, Tensor]:
    """The loss sum of all ranks' tokens and d(sum)/dstream (N, D); adds d(sum)/dweight into fp32 `grad_weight_WD`.

    `num_tokens` is the result of `count_labels`, where the caller has called it already.
    """
    tp, weight_WD = head.tp, head.weight.detach()
    if tp.size == 1:
        return linear_cross_entropy_with_grads(
            stream_ND, weight_WD, labels_T, vocab=head.vocab, grad_weight_WD=grad_weight_WD, num_tokens=num_tokens
        )
    num_tokens = count_labels(labels_T, head.vocab) if num_tokens is None else num_tokens
    x_TD = start_gather(stream_ND, tp).wait()
    grad_x_TD = torch.empty_like(x_TD)
    grad_stream = None
    total = torch.zeros((), dtype=torch.float64, device=x_TD.device)
    chunk = chunk_tokens(weight_WD.shape[0], weight_WD.device.type)
    for start in range(0, len(x_TD), chunk):
        part = slice(start, start + chunk)
        logits_CW = x_TD[part] @ weight_WD.t()
        total += _loss_(logits_CW, labels_T[part], head).sum(dtype=torch.float64)
        torch.mm(logits_CW, weight_WD, out=grad_x_TD[part])
        if part.stop >= len(x_TD):  # reduced over the ranks while the last weight gradient is computed
            grad_stream = start_reduce(grad_x_TD, tp)
        accumulate_weight_grad(grad_weight_WD, logits_CW, x_TD[part])
        del logits_CW  # before the next chunk's are allocated
    assert grad_stream is not None, "a microbatch has tokens"
    return LossSum(total, num_tokens), grad_stream.wait()


def head_loss_sum(
    stream_ND: Tensor, head: VocabParallelEmbedding, labels_T: Tensor, *, num_tokens: int | None = None
) -> LossSum:
    """The loss sum alone, for evaluation."""
    tp, weight_WD = head.tp, head.weight.detach()
    if tp.size == 1:
        return linear_cross_entropy_sum(stream_ND, weight_WD, labels_T, vocab=head.vocab, num_tokens=num_tokens)
    num_tokens = count_labels(labels_T, head.vocab) if num_tokens is None else num_tokens
    x_TD = start_gather(stream_ND, tp).wait()
    total = torch.zeros((), dtype=torch.float64, device=x_TD.device)
    chunk = chunk_tokens(weight_WD.shape[0], weight_WD.device.type)
    for x_CD, labels_C in zip(x_TD.split(chunk), labels_T.split(chunk), strict=True):
        total += _loss_(x_CD @ weight_WD.t(), labels_C, head).sum(dtype=torch.float64)
    return LossSum(total, num_tokens)


def _loss_(logits_CW: Tensor, labels_C: Tensor, head: VocabParallelEmbedding) -> Tensor:
    """Token losses (C,) fp32 over all ranks' ids; overwrites this rank's logits with its part of softmax - onehot."""
    rows, elsewhere = head.local_rows(labels_C)
    target_C = logits_CW.gather(1, rows[:, None])[:, 0].float().masked_fill(elsewhere, 0.0)
    local_lse_C = softmax_(logits_CW, vocab=head.num_ids)
    all_lse, all_targets = _from_all_ranks(torch.stack([local_lse_C, target_C]), head.tp).unbind(1)
    lse_C = torch.logsumexp(all_lse, dim=0)
    counted = labels_C != IGNORE_INDEX
    rescale_subtract_(logits_CW, torch.exp(local_lse_C - lse_C) * counted, rows, ~elsewhere)
    return torch.where(counted, lse_C - all_targets.sum(0), 0.0)


def _from_all_ranks(local: Tensor, tp: TensorParallel) -> Tensor:
    """(tp, ...): every rank's tensor, in rank order."""
    gathered = local.new_empty(tp.size * local.shape[0], *local.shape[1:])
    all_gather_into(gathered, local, tp.group)
    return gathered.unflatten(0, (tp.size, -1))
