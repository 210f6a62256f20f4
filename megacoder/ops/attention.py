"""Causal attention with grouped queries: the plain reference, torch's fused kernels, and a blocked path for CPUs.

Legend: B sequences, S tokens each, H query heads, G key-value heads (H a multiple of G), K head dim; N = B * H.
`lse` is the log-sum-exp of the scaled scores, the one thing besides inputs and output that a backward needs.

Why a blocked path: torch's CPU flash kernel reaches 80 GFLOP/s in bf16 on two cores where batched GEMMs reach 700.
Scores of one block of queries against the keys before it go through batched GEMMs, with softmax in one fused pass
between them; memory stays at BLOCK_ELEMENTS scores for any length. The backward forms the scores again.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from megacoder.ops.cpp import address, kernels_for

__all__ = ["attention", "attention_backward", "attention_forward", "attention_reference"]

BLOCK_QUERIES = {torch.bfloat16: 256, torch.float32: 64}
"""Queries per block, the fastest of 64, 128 and 256 at S=512: smaller blocks skip more of the future, larger ones feed
bf16's faster GEMM."""
BLOCK_ELEMENTS = 1 << 22
"""Scores held at a time, 8 MB in bf16: they stay in a server's last-level cache between the passes."""


def attention_reference(q_BHSK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(K)) v under a causal mask, every score in memory, fp32 (fp64 for fp64) inside."""
    groups = q_BHSK.shape[1] // k_BGSK.shape[1]
    wide = torch.promote_types(q_BHSK.dtype, torch.float32)
    k, v = (t.to(wide).repeat_interleave(groups, dim=1) for t in (k_BGSK, v_BGSK))
    scores = q_BHSK.to(wide) @ k.mT / q_BHSK.shape[-1] ** 0.5
    future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
    return (scores.masked_fill(future, float("-inf")).softmax(-1) @ v).to(q_BHSK.dtype)


def attention(q_BHSK: Tensor, k_BGPK: Tensor, v_BGPK: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Differentiable by torch; causal, or under a boolean `mask` (True is seen) of (B, 1, S, P) or (S, P).

    P keys are S of them, or more when decoding with a cache.
    """
    grouped = q_BHSK.shape[1] != k_BGPK.shape[1]
    if grouped and mask is not None and q_BHSK.shape[2] == 1:
        # One query a head: the heads of a group take the place of queries, so that no key is read twice. On a CPU
        # this is 2 times (fp32) to 9 times (bf16) as fast as enable_gqa.
        q_BGRK = q_BHSK.reshape(q_BHSK.shape[0], k_BGPK.shape[1], -1, q_BHSK.shape[-1])
        return F.scaled_dot_product_attention(q_BGRK, k_BGPK, v_BGPK, attn_mask=mask).reshape(q_BHSK.shape)
    return F.scaled_dot_product_attention(
        q_BHSK, k_BGPK, v_BGPK, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped
    )


def attention_forward(q_BHSK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor) -> tuple[Tensor, Tensor]:
    """(out (B, S, H, K) contiguous, lse (B, H, S) fp32), causal."""
    batch, heads, length, dim = q_BHSK.shape
    kernels = kernels_for(q_BHSK)
    if kernels is None:
        out, lse = _torch_forward(q_BHSK, *_expand(heads, k_BGSK, v_BGSK))
        return out.transpose(1, 2).contiguous(), lse
    q_NSK, k_NSK, v_NSK = _merge(q_BHSK, *_expand(heads, k_BGSK, v_BGSK))
    out_NSK = torch.empty_like(q_NSK)
    lse_NS = q_NSK.new_empty(batch * heads, length, dtype=torch.float32)
    for rows, first, last in _blocks(batch * heads, length, BLOCK_QUERIES[q_BHSK.dtype]):
        scores = torch.bmm(q_NSK[rows, first:last], k_NSK[rows, :last].mT)
        lse = scores.new_empty(scores.shape[:2], dtype=torch.float32)
        kernels.attention_softmax(
            scores.dtype == torch.bfloat16, address(scores, scores.dtype), address(lse, torch.float32), lse.numel(),
            last - first, last, first + 1, dim**-0.5,
        )  # fmt: skip
        out_NSK[rows, first:last] = torch.bmm(scores, v_NSK[rows, :last])
        lse_NS[rows, first:last] = lse
    return out_NSK.unflatten(0, (batch, heads)).transpose(1, 2).contiguous(), lse_NS.unflatten(0, (batch, heads))


def attention_backward(
    grad_out_BSHK: Tensor, q_BHSK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, out_BSHK: Tensor, lse_BHS: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(grad_q (B, H, S, K), grad_k, grad_v (B, G, S, K)); gradients of shared heads are summed over their queries."""
    batch, heads, length, dim = q_BHSK.shape
    k_BHSK, v_BHSK = _expand(heads, k_BGSK, v_BGSK)
    grad_out_BHSK = grad_out_BSHK.transpose(1, 2)
    kernels = kernels_for(q_BHSK)
    if kernels is None:
        grad_q, grad_k, grad_v = _torch_backward(
            grad_out_BHSK, q_BHSK, k_BHSK, v_BHSK, out_BSHK.transpose(1, 2), lse_BHS
        )
        return grad_q, _sum_groups(grad_k, k_BGSK), _sum_groups(grad_v, v_BGSK)
    q_NSK, k_NSK, v_NSK, grad_out_NSK = _merge(q_BHSK, k_BHSK, v_BHSK, grad_out_BHSK)
    delta_NS = (grad_out_BSHK.float() * out_BSHK.float()).sum(-1).transpose(1, 2).flatten(0, 1).contiguous()
    lse_NS = lse_BHS.flatten(0, 1)
    grad_q_NSK, grad_k_NSK, grad_v_NSK = torch.empty_like(q_NSK), torch.zeros_like(k_NSK), torch.zeros_like(v_NSK)
    for rows, first, last in _blocks(batch * heads, length, BLOCK_QUERIES[q_BHSK.dtype]):
        q, k, v, grad_out = (t[rows] for t in (q_NSK, k_NSK, v_NSK, grad_out_NSK))
        q, k, v, grad_out = q[:, first:last], k[:, :last], v[:, :last], grad_out[:, first:last]
        scores, grad_scores = torch.bmm(q, k.mT), torch.bmm(grad_out, v.mT)
        lse, delta = lse_NS[rows, first:last].contiguous(), delta_NS[rows, first:last].contiguous()
        kernels.attention_softmax_backward(
            scores.dtype == torch.bfloat16, address(scores, scores.dtype),
            address(grad_scores, scores.dtype, *scores.shape), address(lse, torch.float32),
            address(delta, torch.float32),
            lse.numel(), last - first, last, first + 1, dim**-0.5,
        )  # fmt: skip
        grad_q_NSK[rows, first:last] = torch.bmm(grad_scores, k)
        grad_k_NSK[rows, :last] += torch.bmm(grad_scores.mT, q)
        grad_v_NSK[rows, :last] += torch.bmm(scores.mT, grad_out)
    split = (batch, heads)
    return (
        grad_q_NSK.unflatten(0, split),
        _sum_groups(grad_k_NSK.unflatten(0, split), k_BGSK),
        _sum_groups(grad_v_NSK.unflatten(0, split), v_BGSK),
    )


def _blocks(num_heads: int, length: int, queries: int) -> Iterator[tuple[slice, int, int]]:
    """(heads, first query, last query + 1) so that a block's scores stay within BLOCK_ELEMENTS if one head can."""
    queries = min(length, queries)
    heads = max(1, BLOCK_ELEMENTS // (queries * length))
    for head in range(0, num_heads, heads):
        for first in range(0, length, queries):
            yield slice(head, min(head + heads, num_heads)), first, min(first + queries, length)


def _expand(heads: int, *tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(t if t.shape[1] == heads else t.repeat_interleave(heads // t.shape[1], dim=1) for t in tensors)


def _merge(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.contiguous().flatten(0, 1) for t in tensors)


def _sum_groups(grad_BHSK: Tensor, like_BGSK: Tensor) -> Tensor:
    if grad_BHSK.shape == like_BGSK.shape:
        return grad_BHSK
    return grad_BHSK.unflatten(1, (like_BGSK.shape[1], -1)).sum(2, dtype=torch.float32).to(grad_BHSK.dtype)


def _torch_forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    if q.device.type == "cpu":
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True)
    out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True, False)
    return out, lse


def _torch_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, ...]:
    if q.device.type == "cpu":
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(grad, q, k, v, out, lse, 0.0, True)
    length = q.shape[2]
    unused = torch.zeros(2, dtype=torch.uint64, device=q.device)  # the philox state of a dropout of zero
    return torch.ops.aten._scaled_dot_product_flash_attention_backward(
        grad, q, k, v, out, lse, None, None, length, length, 0.0, True, unused, unused
    )
