"""RMSNorm of every query and key head, each kind with one weight for all of its heads, and the rotation behind it
(QK-norm, as in Qwen3, arXiv:2505.09388).

Legend: T tokens, H query and G key-value heads, K head dim, C = (H + 2 G) K columns of a fused row [q | k | v],
R = (H + G) K of queries and keys alone. The reference is `rms_norm`, then `apply_rope`.

The forward leaves the fused rows as they are, since they are all that the backward reads: the normed heads could not be
had back from the rotated ones (a weight may be zero, and bf16 has rounded them), and the statistics of a head are found
again where its K elements are read for the gradient. Kernels do each half in one pass; the backend is that of "rope" in
`MEGACODER_OPS`, so that `rope=torch` switches these kernels off, too.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from megacoder.ops.backends import backend, triton_module
from megacoder.ops.cpp import address, kernels
from megacoder.ops.fp8 import note_magnitude
from megacoder.ops.rms_norm import rms_norm_backward, rms_norm_forward
from megacoder.ops.rope import apply_rope_, gather_heads, gather_unrotate

__all__ = ["HeadNorms", "norm_rope_backward", "norm_rope_forward"]


class HeadNorms(NamedTuple):
    """The weights of both norms."""

    query_K: Tensor
    key_K: Tensor
    eps: float


def norm_rope_forward(
    qkv_TC: Tensor,
    norms: HeadNorms,
    cos_PK2: Tensor,
    sin_PK2: Tensor,
    positions_T: Tensor,
    *,
    num_heads: int,
    num_kv_heads: int,
) -> Tensor:
    """(T, R): the queries and keys of fused rows, normed and rotated.

    Every position must lie in the table: kernels do not check.
    """
    name, (tokens, columns), head_dim = backend("rope", qkv_TC), qkv_TC.shape, len(norms.query_K)
    if name == "triton":
        return triton_module("qk_norm").norm_rope_forward(
            qkv_TC, *norms, cos_PK2, sin_PK2, positions_T, num_heads=num_heads, num_kv_heads=num_kv_heads
        )
    rotated = num_heads + num_kv_heads
    if name == "torch":
        q_NK, k_NK = (
            rms_norm_forward(rows_NK, weight_K, norms.eps)[0]
            for rows_NK, weight_K in zip(_heads(qkv_TC, num_heads, num_kv_heads, head_dim), norms[:2], strict=True)
        )
        qk_TR = torch.cat((q_NK.view(tokens, num_heads * head_dim), k_NK.view(tokens, num_kv_heads * head_dim)), dim=1)
        apply_rope_(qk_TR, cos_PK2, sin_PK2, positions_T, num_rotated=rotated, head_dim=head_dim)
        return qk_TR
    dtype, table, qk_TR = qkv_TC.dtype, (len(cos_PK2), head_dim // 2), qkv_TC.new_empty(tokens, rotated * head_dim)
    kernels().norm_rope_forward(
        dtype == torch.bfloat16, address(qkv_TC, dtype, tokens, (rotated + num_kv_heads) * head_dim),
        address(norms.query_K, dtype), address(norms.key_K, dtype, head_dim), address(cos_PK2, torch.float32, *table),
        address(sin_PK2, torch.float32, *table), address(positions_T, torch.int64, tokens), address(qk_TR, dtype),
        tokens, columns, num_heads, num_kv_heads, head_dim, norms.eps,
    )  # fmt: skip
    return qk_TR


def norm_rope_backward(
    grad_q_BHSK: Tensor,
    grad_k_BGSK: Tensor,
    grad_v_BGSK: Tensor,
    qkv_TC: Tensor,
    norms: HeadNorms,
    cos_PK2: Tensor,
    sin_PK2: Tensor,
    positions_T: Tensor,
    *,
    grad_query_K: Tensor,
    grad_key_K: Tensor,
    amax: Tensor | None = None,
) -> Tensor:
    """The backward, from what attention returns: (T, C), the gradient of the fused rows, values included.

    Adds the weights' gradients into fp32 `grad_query_K` and `grad_key_K`. `amax` as for `gather_unrotate`.
    """
    name, grads = backend("rope", grad_q_BHSK), (grad_q_BHSK, grad_k_BGSK, grad_v_BGSK)
    if name == "triton":
        return triton_module("qk_norm").norm_rope_backward(
            *grads, qkv_TC, *norms, cos_PK2, sin_PK2, positions_T,
            grad_query_K=grad_query_K, grad_key_K=grad_key_K, amax=amax,
        )  # fmt: skip
    sizes = heads, kv_heads, dim = grad_q_BHSK.shape[1], grad_k_BGSK.shape[1], grad_q_BHSK.shape[3]
    if name == "torch":
        grad_TC = gather_unrotate(*grads, cos_PK2, sin_PK2, positions_T)
        grads_NK, xs_NK, sums_K = _heads(grad_TC, *sizes), _heads(qkv_TC, *sizes), (grad_query_K, grad_key_K)
        targets = grad_TC.split([heads * dim, kv_heads * dim, kv_heads * dim], dim=1)[:2]
        for target, grad_NK, x_NK, weight_K, sum_K in zip(targets, grads_NK, xs_NK, norms[:2], sums_K, strict=True):
            rstd_N = torch.rsqrt(x_NK.float().pow(2).mean(-1) + norms.eps)
            target.copy_(rms_norm_backward(grad_NK, x_NK, weight_K, rstd_N, grad_weight_D=sum_K).view_as(target))
    else:
        grad_TC = gather_heads(*grads)
        (tokens, columns), dtype, table = grad_TC.shape, grad_TC.dtype, (len(cos_PK2), dim // 2)
        kernels().norm_rope_backward(
            dtype == torch.bfloat16, address(grad_TC, dtype), address(qkv_TC, dtype, tokens, columns),
            address(norms.query_K, dtype, dim), address(norms.key_K, dtype, dim),
            address(cos_PK2, torch.float32, *table), address(sin_PK2, torch.float32, *table),
            address(positions_T, torch.int64, tokens), address(grad_query_K, torch.float32, dim),
            address(grad_key_K, torch.float32, dim), tokens, columns, *sizes, norms.eps,
        )  # fmt: skip
    note_magnitude(grad_TC, amax)
    return grad_TC


def _heads(fused_TC: Tensor, num_heads: int, num_kv_heads: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """(T H, K) and (T G, K): the queries and the keys of fused rows, copied."""
    q, k, _ = fused_TC.unflatten(1, (-1, head_dim)).split([num_heads, num_kv_heads, num_kv_heads], dim=1)
    return q.reshape(-1, head_dim), k.reshape(-1, head_dim)
