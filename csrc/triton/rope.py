"""Rotary embedding in the fused rows [q | k | v], and its backward from the three gradients that attention returns.

Legend: T = BS tokens of B sequences, C = (H + 2G)K columns of a fused row, H query and G key-value heads, K head dim,
P positions in the table; within a kernel a tile is R (token, head) pairs by half a head's columns, padded to B. The
op is described in `megacoder.ops.rope`.

A pair is always a contiguous run of K elements, and pairs are numbered over all tokens, so that a program has the same
work for any number of heads. A thread holds the same columns of both halves and rotates in its own registers. The fp32
tables are read once per pair, for all but the first head of a token from the L1 cache.
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
    power_of_two,
    raise_amax,
    storage,
    warps,
)

__all__ = ["check_gradients", "check_tables", "gather_heads", "gather_unrotate", "rope_", "rotation", "tile"]

TILE = 2048
"""Elements of each half. With 8 of them per thread, each thread has two 16-byte loads in flight, and a multiprocessor
has registers for 40 warps."""


@triton.jit
def rotation(cos_ptr, sin_ptr, positions_ptr, tokens_R, real_R, cols_B, inside_RB, HALF: tl.constexpr):
    """(cos, sin) at each pair's position."""
    positions_R = tl.load(positions_ptr + tokens_R, mask=real_R, other=0)
    places_RB = positions_R[:, None] * HALF + cols_B[None, :]
    cos_RB = tl.load(cos_ptr + places_RB, mask=inside_RB, other=0.0)
    return cos_RB, tl.load(sin_ptr + places_RB, mask=inside_RB, other=0.0)


@triton.jit(do_not_specialize=["num_tokens"])
def rope_kernel(
    qkv_ptr,
    cos_ptr,
    sin_ptr,
    positions_ptr,
    num_tokens,
    INVERSE: tl.constexpr,
    HEADS: tl.constexpr,
    C: tl.constexpr,
    HALF: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pairs_R = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    tokens_R, heads_R = pairs_R // HEADS, pairs_R % HEADS
    cols_B = tl.arange(0, BLOCK)
    real_R = tokens_R < num_tokens
    inside_RB = real_R[:, None] & (cols_B < HALF)[None, :]
    low_ptr = qkv_ptr + (tokens_R.to(tl.int64) * C + heads_R * (2 * HALF))[:, None] + cols_B[None, :]
    low_RB = tl.load(low_ptr, mask=inside_RB, other=0.0).to(tl.float32)
    high_RB = tl.load(low_ptr + HALF, mask=inside_RB, other=0.0).to(tl.float32)
    cos_RB, sin_RB = rotation(cos_ptr, sin_ptr, positions_ptr, tokens_R, real_R, cols_B, inside_RB, HALF)
    if INVERSE:
        sin_RB = -sin_RB
    rotated_low_RB = tl.fma(-high_RB, sin_RB, low_RB * cos_RB)
    rotated_high_RB = tl.fma(low_RB, sin_RB, high_RB * cos_RB)
    tl.store(low_ptr, rotated_low_RB.to(qkv_ptr.dtype.element_ty), mask=inside_RB)
    tl.store(low_ptr + HALF, rotated_high_RB.to(qkv_ptr.dtype.element_ty), mask=inside_RB)


@triton.jit
def gather_heads(
    grad_ptr,
    stride_b,
    stride_h,
    stride_s,
    out_ptr,
    cos_ptr,
    sin_ptr,
    positions_ptr,
    amax_ptr,
    block,
    num_tokens,
    length,
    ROTATED: tl.constexpr,
    HEADS: tl.constexpr,
    C: tl.constexpr,
    HALF: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Writes one block of pairs of one gradient; `out_ptr` points to its first head in the first token's row."""
    pairs_R = block * ROWS + tl.arange(0, ROWS)
    tokens_R, heads_R = pairs_R // HEADS, pairs_R % HEADS
    cols_B = tl.arange(0, BLOCK)
    real_R = tokens_R < num_tokens
    inside_RB = real_R[:, None] & (cols_B < HALF)[None, :]
    sequences_R, steps_R = (tokens_R // length).to(tl.int64), (tokens_R % length).to(tl.int64)
    from_R = sequences_R * stride_b + steps_R * stride_s + heads_R.to(tl.int64) * stride_h
    from_ptr = grad_ptr + from_R[:, None] + cols_B[None, :]
    to_ptr = out_ptr + (tokens_R.to(tl.int64) * C + heads_R * (2 * HALF))[:, None] + cols_B[None, :]
    low_RB = tl.load(from_ptr, mask=inside_RB, other=0.0)
    high_RB = tl.load(from_ptr + HALF, mask=inside_RB, other=0.0)
    if ROTATED:
        cos_RB, sin_RB = rotation(cos_ptr, sin_ptr, positions_ptr, tokens_R, real_R, cols_B, inside_RB, HALF)
        wide_low_RB, wide_high_RB = low_RB.to(tl.float32), high_RB.to(tl.float32)
        low_RB = tl.fma(wide_high_RB, sin_RB, wide_low_RB * cos_RB).to(out_ptr.dtype.element_ty)
        high_RB = tl.fma(-wide_low_RB, sin_RB, wide_high_RB * cos_RB).to(out_ptr.dtype.element_ty)
    tl.store(to_ptr, low_RB, mask=inside_RB)
    tl.store(to_ptr + HALF, high_RB, mask=inside_RB)
    if amax_ptr is not None:
        raise_amax(amax_ptr, tl.maximum(magnitudes(low_RB), magnitudes(high_RB)))


@triton.jit(do_not_specialize=["num_tokens", "length"])
def gather_unrotate_kernel(
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
    out_ptr,
    cos_ptr,
    sin_ptr,
    positions_ptr,
    amax_ptr,
    num_tokens,
    length,
    H: tl.constexpr,
    G: tl.constexpr,
    HALF: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The first programs write the queries' gradient, the next the keys', the last the values'."""
    C: tl.constexpr = 2 * HALF * (H + 2 * G)
    K_COLUMN: tl.constexpr = 2 * HALF * H
    V_COLUMN: tl.constexpr = 2 * HALF * (H + G)
    block = tl.program_id(0)
    q_blocks, kv_blocks = tl.cdiv(num_tokens * H, ROWS), tl.cdiv(num_tokens * G, ROWS)
    if block < q_blocks:
        gather_heads(
            grad_q_ptr, q_stride_b, q_stride_h, q_stride_s, out_ptr, cos_ptr, sin_ptr, positions_ptr,
            amax_ptr, block, num_tokens, length, True, H, C, HALF, ROWS, BLOCK,
        )  # fmt: skip
    elif block < q_blocks + kv_blocks:
        gather_heads(
            grad_k_ptr, k_stride_b, k_stride_h, k_stride_s, out_ptr + K_COLUMN, cos_ptr, sin_ptr, positions_ptr,
            amax_ptr, block - q_blocks, num_tokens, length, True, G, C, HALF, ROWS, BLOCK,
        )  # fmt: skip
    else:
        gather_heads(
            grad_v_ptr, v_stride_b, v_stride_h, v_stride_s, out_ptr + V_COLUMN, cos_ptr, sin_ptr, positions_ptr,
            amax_ptr, block - q_blocks - kv_blocks, num_tokens, length, False, G, C, HALF, ROWS, BLOCK,
        )  # fmt: skip


def rope_(
    qkv_TC: Tensor,
    cos_PK2: Tensor,
    sin_PK2: Tensor,
    positions_T: Tensor,
    *,
    num_rotated: int,
    head_dim: int,
    inverse: bool = False,
) -> None:
    """Rotates in place the first `num_rotated` heads of rows [q | k | v]; `inverse` is the backward.

    Every position must lie in the table: the kernel does not check.
    """
    num_tokens, columns = qkv_TC.shape
    check("qkv_TC", qkv_TC, storage("qkv_TC", qkv_TC), num_tokens, columns)
    check_tables(cos_PK2, sin_PK2, positions_T, num_tokens, head_dim)
    if num_rotated * head_dim > columns:
        raise ValueError(f"{num_rotated} heads of {head_dim} do not fit in rows of {columns} columns")
    if num_tokens and num_rotated:
        rows, block, num_warps = tile(head_dim // 2)
        rope_kernel[(ceil_div(num_tokens * num_rotated, rows),)](
            qkv_TC, cos_PK2, sin_PK2, positions_T, num_tokens,
            INVERSE=inverse, HEADS=num_rotated, C=columns, HALF=head_dim // 2, ROWS=rows, BLOCK=block,
            num_warps=num_warps, enable_fp_fusion=False,
        )  # fmt: skip


def gather_unrotate(
    grad_q_BHSK: Tensor,
    grad_k_BGSK: Tensor,
    grad_v_BGSK: Tensor,
    cos_PK2: Tensor,
    sin_PK2: Tensor,
    positions_T: Tensor,
    *,
    amax: Tensor | None = None,
) -> Tensor:
    """grad_qkv_TC: attention's gradients in fused rows, those of queries and keys rotated back.

    Raises `amax` to the result's largest magnitude. The gradients may have any memory order of batch, head and step;
    each head's K elements must be contiguous.
    """
    check_gradients(grad_q_BHSK, grad_k_BGSK, grad_v_BGSK)
    (batch, heads, length, dim), kv_heads = grad_q_BHSK.shape, grad_k_BGSK.shape[1]
    num_tokens = batch * length
    check_tables(cos_PK2, sin_PK2, positions_T, num_tokens, dim)
    grad_qkv_TC = grad_q_BHSK.new_empty(num_tokens, (heads + 2 * kv_heads) * dim)
    if num_tokens:
        rows, block, num_warps = tile(dim // 2)
        num_programs = ceil_div(num_tokens * heads, rows) + 2 * ceil_div(num_tokens * kv_heads, rows)
        gather_unrotate_kernel[(num_programs,)](
            grad_q_BHSK, grad_k_BGSK, grad_v_BGSK,
            *grad_q_BHSK.stride()[:3], *grad_k_BGSK.stride()[:3], *grad_v_BGSK.stride()[:3],
            grad_qkv_TC, cos_PK2, sin_PK2, positions_T, amax_bits(amax), num_tokens, length,
            H=heads, G=kv_heads, HALF=dim // 2, ROWS=rows, BLOCK=block, num_warps=num_warps, enable_fp_fusion=False,
        )  # fmt: skip
    return grad_qkv_TC


def check_gradients(grad_q_BHSK: Tensor, grad_k_BGSK: Tensor, grad_v_BGSK: Tensor) -> None:
    """ValueError unless these are gradients of queries, keys and values, each head's elements contiguous."""
    batch, heads, length, dim = grad_q_BHSK.shape
    kv_heads, dtype = grad_k_BGSK.shape[1], storage("grad_q_BHSK", grad_q_BHSK)
    for name, grad, own_heads in (
        ("grad_q_BHSK", grad_q_BHSK, heads),
        ("grad_k_BGSK", grad_k_BGSK, kv_heads),
        ("grad_v_BGSK", grad_v_BGSK, kv_heads),
    ):
        if grad.dtype != dtype or grad.shape != (batch, own_heads, length, dim) or grad.stride(3) != 1:
            raise ValueError(
                f"{name} must be {dtype} {[batch, own_heads, length, dim]} with contiguous heads; got {grad.dtype} "
                f"{list(grad.shape)} with strides {list(grad.stride())}"
            )


def check_tables(cos_PK2: Tensor, sin_PK2: Tensor, positions_T: Tensor, num_tokens: int, head_dim: int) -> None:
    """ValueError unless there is a table of both for such heads, and a position for every token."""
    if head_dim < 2 or head_dim % 2:
        raise ValueError(f"head_dim = {head_dim}: must be even and positive, to have two halves to rotate")
    table = len(cos_PK2), head_dim // 2
    check("cos_PK2", cos_PK2, torch.float32, *table)
    check("sin_PK2", sin_PK2, torch.float32, *table)
    check("positions_T", positions_T, torch.int64, num_tokens)


def tile(half: int) -> tuple[int, int, int]:
    """(pairs, columns, warps) of a program's tile."""
    block = power_of_two(half)
    rows = max(1, TILE // block)
    return rows, block, warps(rows * block, per_thread=8)
