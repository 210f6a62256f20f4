"""Rotary position embedding (arXiv:2104.09864) in Hugging Face's rotate-half convention.

Legend: T tokens, H heads, K head dim, P positions in the table. Angle = position * frequency i; that is
theta^(-2i/K), stretched to a longer context as `megacoder.ops.rope_scaling` says. Tables and rotation are fp32.
The tables hold cos and sin times one magnitude m, which is 1 except with YaRN. So a pair is multiplied by m times a
rotation, and the backward, the transpose, is m times the rotation by the opposite angle: the same tables with -sin.
It is the inverse only where m is 1, so nothing may use it to get back what was rotated.
"""

import math

import torch
from torch import Tensor

from megacoder.ops.backends import backend, triton_module
from megacoder.ops.cpp import address, kernels
from megacoder.ops.fp8 import note_magnitude
from megacoder.ops.rope_scaling import RopeScaling

__all__ = ["apply_rope", "apply_rope_", "gather_heads", "gather_unrotate", "rope_frequencies", "rope_tables"]

LINEAR = RopeScaling()


def rope_frequencies(head_dim: int, *, theta: float, factor: float = 1.0, scaling: RopeScaling = LINEAR) -> Tensor:
    """Radians by which each pair of a head's columns turns from one position to the next, (K/2,) fp64."""
    frequencies = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    if scaling.kind == "linear":
        return frequencies / factor
    original = scaling.original_max_position_embeddings
    assert original is not None
    if scaling.kind == "llama3":
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        turns = original * frequencies / (2 * math.pi)
        kept = ((turns - low) / (high - low)).clamp(0, 1)
    else:
        low, high = scaling.mixed_range(head_dim, theta)
        indices = torch.arange(head_dim // 2, dtype=torch.float64)
        width = high - low or 0.001  # of no width: a step
        kept = 1 - ((indices - low) / width).clamp(0, 1)
    return kept * frequencies + (1 - kept) * frequencies / factor


def rope_tables(
    num_positions: int, head_dim: int, *, theta: float, factor: float = 1.0, scaling: RopeScaling = LINEAR
) -> tuple[Tensor, Tensor]:
    """(cos, sin), each (P, K/2) fp32; angles are computed in fp64 so that large positions keep their phase."""
    frequencies = rope_frequencies(head_dim, theta=theta, factor=factor, scaling=scaling)
    angles = torch.outer(torch.arange(num_positions, dtype=torch.float64), frequencies)
    magnitude = scaling.magnitude(factor)
    return (magnitude * angles.cos()).float(), (magnitude * angles.sin()).float()


def apply_rope(x_THK: Tensor, cos_PK2: Tensor, sin_PK2: Tensor, positions_T: Tensor) -> Tensor:
    """Reference, differentiable by torch: rotates every head of each token to its position."""
    cos, sin = cos_PK2[positions_T][:, None], sin_PK2[positions_T][:, None]
    low, high = x_THK.to(torch.promote_types(x_THK.dtype, torch.float32)).chunk(2, dim=-1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1).to(x_THK.dtype)


def apply_rope_(
    qkv_TC: Tensor,
    cos_PK2: Tensor,
    sin_PK2: Tensor,
    positions_T: Tensor,
    *,
    num_rotated: int,
    head_dim: int,
    inverse: bool = False,
) -> None:
    """Rotates in place the first `num_rotated` heads (queries, keys) of rows [q | k | v]; `inverse` is the backward.

    Every position must lie in the table: the kernel does not check.
    """
    name = backend("rope", qkv_TC)
    if name == "triton":
        triton_module("rope").rope_(
            qkv_TC, cos_PK2, sin_PK2, positions_T, num_rotated=num_rotated, head_dim=head_dim, inverse=inverse
        )
        return
    if name == "torch":
        heads = qkv_TC[:, : num_rotated * head_dim].unflatten(1, (num_rotated, head_dim))
        heads.copy_(apply_rope(heads, cos_PK2, -sin_PK2 if inverse else sin_PK2, positions_T))
        return
    table, rows = (len(cos_PK2), head_dim // 2), len(qkv_TC)
    kernels().rope(
        qkv_TC.dtype == torch.bfloat16, address(qkv_TC, qkv_TC.dtype), address(cos_PK2, torch.float32, *table),
        address(sin_PK2, torch.float32, *table), address(positions_T, torch.int64, rows),
        qkv_TC.shape[0], qkv_TC.shape[1], num_rotated, head_dim, -1.0 if inverse else 1.0,
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
    """The backward of `apply_rope_` on fused rows, from what attention returns: (B S, (H + 2 G) K) rows [q | k | v].

    A Triton kernel reads each gradient once and writes it rotated where it belongs, in one pass instead of five.
    `amax`, an fp32 scalar, zero on entry, receives the largest magnitude of the result, for a cast to fp8.
    """
    if backend("rope", grad_q_BHSK) == "triton":
        return triton_module("rope").gather_unrotate(
            grad_q_BHSK, grad_k_BGSK, grad_v_BGSK, cos_PK2, sin_PK2, positions_T, amax=amax
        )
    merged_TC = gather_heads(grad_q_BHSK, grad_k_BGSK, grad_v_BGSK)
    rotated, dim = grad_q_BHSK.shape[1] + grad_k_BGSK.shape[1], grad_q_BHSK.shape[3]
    apply_rope_(merged_TC, cos_PK2, sin_PK2, positions_T, num_rotated=rotated, head_dim=dim, inverse=True)
    note_magnitude(merged_TC, amax)
    return merged_TC


def gather_heads(q_BHSK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor) -> Tensor:
    """(B S, (H + 2 G) K): rows [q | k | v]."""
    (batch, heads, length, dim), kv_heads = q_BHSK.shape, k_BGSK.shape[1]
    merged = q_BHSK.new_empty(batch, length, heads + 2 * kv_heads, dim)
    targets = merged.split([heads, kv_heads, kv_heads], dim=2)
    for target, part in zip(targets, (q_BHSK, k_BGSK, v_BGSK), strict=True):
        target.copy_(part.transpose(1, 2))
    return merged.flatten(2).flatten(0, 1)
