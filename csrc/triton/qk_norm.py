"""RMSNorm of query and key heads with the rotation behind it, in one pass each way; the op is described in
`megacoder.ops.qk_norm`.

Legend: T = BS tokens of B sequences, C = (H + 2G)K columns of a fused row [q | k | v], H query and G key-value heads, K
head dim, P programs; within a kernel a tile is R (token, head) pairs by half a head's columns, padded to B, as in
`rope`, whose loads and stores these are.

A head is too short for a program of its own: a tile has as many as give each thread 8 columns of both halves, and sums
over a head stay within one warp. The backward must also sum over all heads of a kind for its weight: as in `rms_norm`,
persistent programs walk over the heads with private sums in registers, which a second kernel adds. Queries and keys
have programs of their own, in proportion; the values' gradients, which are only moved, come last.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megacoder.ops.triton_kernels.launch import (
    amax_bits,
    ceil_div,
    check,
    magnitudes,
    multiprocessors,
    power_of_two,
    raise_amax,
    storage,
    warps,
)
from megacoder.ops.triton_kernels.rms_norm import SUM_COLUMNS, SUM_ROWS, add_sums_kernel
from megacoder.ops.triton_kernels.rope import check_gradients, check_tables, gather_heads, rotation, tile

__all__ = ["norm_rope_backward", "norm_rope_forward"]

BACKWARD_TILE = 1024
"""Elements of each half: with 8 of them per thread, of gradient, input and sum, 4 warps."""
RESIDENT_WARPS = 20
"""At 96 registers per thread, the most that the backward takes, a multiprocessor holds 20 warps."""


@triton.jit(do_not_specialize=["num_tokens"])
def norm_rope_forward_kernel(
    qkv_ptr,
    query_ptr,
    key_ptr,
    out_ptr,
    cos_ptr,
    sin_ptr,
    positions_ptr,
    num_tokens,
    eps,
    H: tl.constexpr,
    G: tl.constexpr,
    HALF: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    C: tl.constexpr = 2 * HALF * (H + 2 * G)
    pairs_R = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    tokens_R, heads_R = pairs_R // (H + G), pairs_R % (H + G)
    cols_B = tl.arange(0, BLOCK)
    real_R = tokens_R < num_tokens
    inside_RB = real_R[:, None] & (cols_B < HALF)[None, :]
    from_ptr = qkv_ptr + (tokens_R.to(tl.int64) * C + heads_R * (2 * HALF))[:, None] + cols_B[None, :]
    low_RB = tl.load(from_ptr, mask=inside_RB, other=0.0).to(tl.float32)
    high_RB = tl.load(from_ptr + HALF, mask=inside_RB, other=0.0).to(tl.float32)
    cos_RB, sin_RB = rotation(cos_ptr, sin_ptr, positions_ptr, tokens_R, real_R, cols_B, inside_RB, HALF)
    rstd_R = tl.rsqrt(tl.sum(low_RB * low_RB + high_RB * high_RB, axis=1) / (2 * HALF) + eps)
    weight_ptr = tl.where(heads_R < H, query_ptr, key_ptr)[:, None] + cols_B[None, :]
    low_RB *= rstd_R[:, None] * tl.load(weight_ptr, mask=inside_RB, other=0.0).to(tl.float32)
    high_RB *= rstd_R[:, None] * tl.load(weight_ptr + HALF, mask=inside_RB, other=0.0).to(tl.float32)
    rotated_low_RB = tl.fma(-high_RB, sin_RB, low_RB * cos_RB)
    rotated_high_RB = tl.fma(low_RB, sin_RB, high_RB * cos_RB)
    to_ptr = out_ptr + (pairs_R.to(tl.int64) * (2 * HALF))[:, None] + cols_B[None, :]
    tl.store(to_ptr, rotated_low_RB.to(out_ptr.dtype.element_ty), mask=inside_RB)
    tl.store(to_ptr + HALF, rotated_high_RB.to(out_ptr.dtype.element_ty), mask=inside_RB)


@triton.jit
def _through_norm(
    grad_ptr,
    stride_b,
    stride_h,
    stride_s,
    x_ptr,
    weight_ptr,
    out_ptr,
    sums_ptr,
    cos_ptr,
    sin_ptr,
    positions_ptr,
    amax_ptr,
    program,
    num_programs,
    num_tokens,
    length,
    eps,
    HEADS: tl.constexpr,
    C: tl.constexpr,
    HALF: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program's pairs of one gradient; `x_ptr` and `out_ptr` point to its first head in the first token's row."""
    cols_B = tl.arange(0, BLOCK)
    weight_low_B = tl.load(weight_ptr + cols_B, mask=cols_B < HALF, other=0.0).to(tl.float32)
    weight_high_B = tl.load(weight_ptr + HALF + cols_B, mask=cols_B < HALF, other=0.0).to(tl.float32)
    sums_low_RB, sums_high_RB = tl.zeros((ROWS, BLOCK), tl.float32), tl.zeros((ROWS, BLOCK), tl.float32)
    if amax_ptr is not None:
        top_RB = tl.zeros((ROWS, BLOCK), tl.int32)
    for first in range(program * ROWS, num_tokens * HEADS, num_programs * ROWS):
        pairs_R = first + tl.arange(0, ROWS)
        tokens_R, heads_R = pairs_R // HEADS, pairs_R % HEADS
        real_R = tokens_R < num_tokens
        inside_RB = real_R[:, None] & (cols_B < HALF)[None, :]
        sequences_R, steps_R = (tokens_R // length).to(tl.int64), (tokens_R % length).to(tl.int64)
        from_R = sequences_R * stride_b + steps_R * stride_s + heads_R.to(tl.int64) * stride_h
        from_ptr = grad_ptr + from_R[:, None] + cols_B[None, :]
        places_RB = (tokens_R.to(tl.int64) * C + heads_R * (2 * HALF))[:, None] + cols_B[None, :]
        grad_low_RB = tl.load(from_ptr, mask=inside_RB, other=0.0).to(tl.float32)
        grad_high_RB = tl.load(from_ptr + HALF, mask=inside_RB, other=0.0).to(tl.float32)
        low_RB = tl.load(x_ptr + places_RB, mask=inside_RB, other=0.0).to(tl.float32)
        high_RB = tl.load(x_ptr + HALF + places_RB, mask=inside_RB, other=0.0).to(tl.float32)
        cos_RB, sin_RB = rotation(cos_ptr, sin_ptr, positions_ptr, tokens_R, real_R, cols_B, inside_RB, HALF)
        back_low_RB = tl.fma(grad_high_RB, sin_RB, grad_low_RB * cos_RB)
        back_high_RB = tl.fma(-grad_low_RB, sin_RB, grad_high_RB * cos_RB)
        rstd_R = tl.rsqrt(tl.sum(low_RB * low_RB + high_RB * high_RB, axis=1) / (2 * HALF) + eps)
        low_RB *= rstd_R[:, None]
        high_RB *= rstd_R[:, None]
        sums_low_RB += back_low_RB * low_RB
        sums_high_RB += back_high_RB * high_RB
        back_low_RB *= weight_low_B[None, :]
        back_high_RB *= weight_high_B[None, :]
        mean_R = tl.sum(back_low_RB * low_RB + back_high_RB * high_RB, axis=1) / (2 * HALF)
        back_low_RB = rstd_R[:, None] * (back_low_RB - low_RB * mean_R[:, None])
        back_high_RB = rstd_R[:, None] * (back_high_RB - high_RB * mean_R[:, None])
        stored_low_RB = back_low_RB.to(out_ptr.dtype.element_ty)
        stored_high_RB = back_high_RB.to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + places_RB, stored_low_RB, mask=inside_RB)
        tl.store(out_ptr + HALF + places_RB, stored_high_RB, mask=inside_RB)
        if amax_ptr is not None:
            top_RB = tl.maximum(top_RB, tl.maximum(magnitudes(stored_low_RB), magnitudes(stored_high_RB)))
    if amax_ptr is not None:
        raise_amax(amax_ptr, top_RB)
    to_ptr = sums_ptr + program * (2 * HALF) + cols_B
    tl.store(to_ptr, tl.sum(sums_low_RB, axis=0), mask=cols_B < HALF)
    tl.store(to_ptr + HALF, tl.sum(sums_high_RB, axis=0), mask=cols_B < HALF)


@triton.jit(do_not_specialize=["num_tokens", "length", "q_programs", "k_programs"])
def norm_rope_backward_kernel(
    grad_q_ptr,
    grad_k_ptr,
    grad_v_ptr,
    q_stride_b,
    q_stride_h,
    q_stride_s,
    k_stride_b,
    k_stride_h,
    k_stride_s,
    v_stride_b,
    v_stride_h,
    v_stride_s,
    qkv_ptr,
    query_ptr,
    key_ptr,
    out_ptr,
    sums_ptr,
    cos_ptr,
    sin_ptr,
    positions_ptr,
    amax_ptr,
    q_programs,
    k_programs,
    num_tokens,
    length,
    eps,
    H: tl.constexpr,
    G: tl.constexpr,
    HALF: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The first programs walk over the queries, the next over the keys; each of the others moves one tile of values."""
    C: tl.constexpr = 2 * HALF * (H + 2 * G)
    K_COLUMN: tl.constexpr = 2 * HALF * H
    V_COLUMN: tl.constexpr = 2 * HALF * (H + G)
    program = tl.program_id(0)
    if program < q_programs:
        _through_norm(
            grad_q_ptr, q_stride_b, q_stride_h, q_stride_s, qkv_ptr, query_ptr, out_ptr, sums_ptr,
            cos_ptr, sin_ptr, positions_ptr, amax_ptr, program, q_programs, num_tokens, length, eps,
            H, C, HALF, ROWS, BLOCK,
        )  # fmt: skip
    elif program < q_programs + k_programs:
        _through_norm(
            grad_k_ptr, k_stride_b, k_stride_h, k_stride_s, qkv_ptr + K_COLUMN, key_ptr, out_ptr + K_COLUMN,
            sums_ptr + q_programs * (2 * HALF), cos_ptr, sin_ptr, positions_ptr, amax_ptr, program - q_programs,
            k_programs, num_tokens, length, eps, G, C, HALF, ROWS, BLOCK,
        )  # fmt: skip
    else:
        gather_heads(
            grad_v_ptr, v_stride_b, v_stride_h, v_stride_s, out_ptr + V_COLUMN, cos_ptr, sin_ptr, positions_ptr,
            amax_ptr, program - q_programs - k_programs, num_tokens, length, False, G, C, HALF, ROWS, BLOCK,
        )  # fmt: skip


def norm_rope_forward(
    qkv_TC: Tensor,
    query_K: Tensor,
    key_K: Tensor,
    eps: float,
    cos_PK2: Tensor,
    sin_PK2: Tensor,
    positions_T: Tensor,
    *,
    num_heads: int,
    num_kv_heads: int,
) -> Tensor:
    """(T, (H + G) K): the queries and keys of fused rows, normed and rotated.

    Every position must lie in the table: the kernel does not check.
    """
    (num_tokens, _), dtype, (head_dim,) = qkv_TC.shape, storage("qkv_TC", qkv_TC), query_K.shape
    check("qkv_TC", qkv_TC, dtype, num_tokens, (num_heads + 2 * num_kv_heads) * head_dim)
    check("query_K", query_K, dtype, head_dim)
    check("key_K", key_K, dtype, head_dim)
    check_tables(cos_PK2, sin_PK2, positions_T, num_tokens, head_dim)
    num_normed = num_heads + num_kv_heads
    qk_TR = qkv_TC.new_empty(num_tokens, num_normed * head_dim)
    if num_tokens:
        rows, block, num_warps = tile(head_dim // 2)
        norm_rope_forward_kernel[(ceil_div(num_tokens * num_normed, rows),)](
            qkv_TC, query_K, key_K, qk_TR, cos_PK2, sin_PK2, positions_T, num_tokens, eps,
            H=num_heads, G=num_kv_heads, HALF=head_dim // 2, ROWS=rows, BLOCK=block,
            num_warps=num_warps, enable_fp_fusion=False,
        )  # fmt: skip
    return qk_TR


def shares(resident: int, heads: int, kv_heads: int) -> tuple[int, int]:
    """Of the programs that run at once, those of the queries and of the keys.

    One more in all would start when the others have ended, and take as long again.
    """
    queries = max(1, resident * heads // (heads + kv_heads))
    return queries, max(1, resident - queries)


def norm_rope_backward(
    grad_q_BHSK: Tensor,
    grad_k_BGSK: Tensor,
    grad_v_BGSK: Tensor,
    qkv_TC: Tensor,
    query_K: Tensor,
    key_K: Tensor,
    eps: float,
    cos_PK2: Tensor,
    sin_PK2: Tensor,
    positions_T: Tensor,
    *,
    grad_query_K: Tensor,
    grad_key_K: Tensor,
    amax: Tensor | None = None,
) -> Tensor:
    """grad_qkv_TC, from attention's gradients; adds those of the weights into fp32 `grad_query_K` and `grad_key_K`.

    Raises `amax` to the largest magnitude of the result. The gradients as in `rope.gather_unrotate`.
    """
    check_gradients(grad_q_BHSK, grad_k_BGSK, grad_v_BGSK)
    (batch, heads, length, dim), kv_heads, dtype = grad_q_BHSK.shape, grad_k_BGSK.shape[1], grad_q_BHSK.dtype
    num_tokens = batch * length
    check("qkv_TC", qkv_TC, dtype, num_tokens, (heads + 2 * kv_heads) * dim)
    for name, weight, grad in (("query_K", query_K, grad_query_K), ("key_K", key_K, grad_key_K)):
        check(name, weight, dtype, dim)
        check("grad_" + name, grad, torch.float32, dim)
    check_tables(cos_PK2, sin_PK2, positions_T, num_tokens, dim)
    grad_qkv_TC = torch.empty_like(qkv_TC)
    if num_tokens:
        block = power_of_two(dim // 2)
        rows = max(1, BACKWARD_TILE // block)
        num_warps = warps(rows * block, per_thread=8)
        resident = multiprocessors(qkv_TC.device) * max(1, RESIDENT_WARPS // num_warps)
        q_programs, k_programs = (
            min(share, ceil_div(num_tokens * own, rows))
            for share, own in zip(shares(resident, heads, kv_heads), (heads, kv_heads), strict=True)
        )
        sums_PK = qkv_TC.new_empty(q_programs + k_programs, dim, dtype=torch.float32)
        norm_rope_backward_kernel[(q_programs + k_programs + ceil_div(num_tokens * kv_heads, rows),)](
            grad_q_BHSK, grad_k_BGSK, grad_v_BGSK,
            *grad_q_BHSK.stride()[:3], *grad_k_BGSK.stride()[:3], *grad_v_BGSK.stride()[:3],
            qkv_TC, query_K, key_K, grad_qkv_TC, sums_PK, cos_PK2, sin_PK2, positions_T, amax_bits(amax),
            q_programs, k_programs, num_tokens, length, eps,
            H=heads, G=kv_heads, HALF=dim // 2, ROWS=rows, BLOCK=block, num_warps=num_warps, enable_fp_fusion=False,
        )  # fmt: skip
        for sums, grad in zip(sums_PK.split([q_programs, k_programs]), (grad_query_K, grad_key_K), strict=True):
            add_sums_kernel[(ceil_div(dim, SUM_COLUMNS),)](
                sums, grad, len(sums),
                D=dim, ROWS=SUM_ROWS, BLOCK=SUM_COLUMNS, num_warps=8, enable_fp_fusion=False,
            )  # fmt: skip
    return grad_qkv_TC
