"""Attention on CPUs that multiply tiles of bf16 (csrc/cpp/amx_attention.inc): a kernel each way, scores never stored.

Queries, keys and values are read where they are, as rows of fused projections, and shared heads are not copied. Legend:
that of `megacoder.ops.attention`. The kernels see addresses and strides, so dtype and layout are checked here.
"""

import torch
from torch import Tensor

from megacoder.ops.cpp import address, kernels

__all__ = ["backward", "forward"]


def forward(
    q_BHSK: Tensor, k_BGPK: Tensor, v_BGPK: Tensor, *, query_start: int, first_keys_BS: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(out (B, S, H, K), lse (B, H, S) fp32); each query sees keys from its first one, or from 0, to its own token.

    First keys outside that range would be read: they must have been checked.
    """
    batch, heads, length, dim = q_BHSK.shape
    out_BSHK = q_BHSK.new_empty(batch, length, heads, dim)
    lse_BHS = q_BHSK.new_empty(batch, heads, length, dtype=torch.float32)
    first_keys_BS = None if first_keys_BS is None else first_keys_BS.contiguous()
    read = [_readable(t) for t in (q_BHSK, k_BGPK, v_BGPK)]
    kernels().tile_attention(
        address(out_BSHK, torch.bfloat16), address(lse_BHS, torch.float32), *map(_rows, read),
        address(first_keys_BS, torch.int64, batch, length), _shape(q_BHSK, k_BGPK, v_BGPK, query_start), dim**-0.5,
    )  # fmt: skip
    return out_BSHK, lse_BHS


def backward(
    grad_out_BHSK: Tensor,
    q_BHSK: Tensor,
    k_BGPK: Tensor,
    v_BGPK: Tensor,
    out_BHSK: Tensor,
    lse_BHS: Tensor,
    *,
    query_start: int,
    first_keys_BS: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, in their shapes; those of shared heads are summed in fp32, of unseen keys zero."""
    batch, heads, length, dim = q_BHSK.shape
    groups, num_keys = k_BGPK.shape[1:3]
    grad_q_BSHK = q_BHSK.new_empty(batch, length, heads, dim)
    grad_k_BPGK, grad_v_BPGK = k_BGPK.new_empty(2, batch, num_keys, groups, dim)
    if not grad_out_BHSK.shape == out_BHSK.shape == q_BHSK.shape:
        shapes = [list(t.shape) for t in (grad_out_BHSK, out_BHSK, q_BHSK)]
        raise ValueError("gradient of the output, output and queries have shapes {}, {} and {}".format(*shapes))
    lse_BHS, first_keys_BS = lse_BHS.contiguous(), None if first_keys_BS is None else first_keys_BS.contiguous()
    read = [_readable(t) for t in (grad_out_BHSK, q_BHSK, k_BGPK, v_BGPK, out_BHSK)]
    kernels().tile_attention_backward(
        *(address(grad, torch.bfloat16) for grad in (grad_q_BSHK, grad_k_BPGK, grad_v_BPGK)), *map(_rows, read),
        address(lse_BHS, torch.float32, batch, heads, length), address(first_keys_BS, torch.int64, batch, length),
        _shape(q_BHSK, k_BGPK, v_BGPK, query_start), dim**-0.5,
    )  # fmt: skip
    return grad_q_BSHK.transpose(1, 2), grad_k_BPGK.transpose(1, 2), grad_v_BPGK.transpose(1, 2)


def _readable(tensor: Tensor) -> Tensor:
    """With each row's K values side by side; ValueError unless in bf16 on the CPU."""
    if tensor.dtype != torch.bfloat16 or tensor.device.type != "cpu":
        raise ValueError(f"tile attention needs torch.bfloat16 on the CPU; got {tensor.dtype} on {tensor.device}")
    return tensor if tensor.stride(3) == 1 else tensor.contiguous()


def _rows(tensor: Tensor) -> tuple[int, ...]:
    """Address, and strides by sequence, head and token."""
    return tensor.data_ptr(), *tensor.stride()[:3]


def _shape(q_BHSK: Tensor, k_BGPK: Tensor, v_BGPK: Tensor, query_start: int) -> tuple[int, ...]:
    """What the kernels take; ValueError for shapes that do not fit each other."""
    batch, heads, length, dim = q_BHSK.shape
    if k_BGPK.shape != v_BGPK.shape or k_BGPK.shape[::3] != (batch, dim) or heads % k_BGPK.shape[1]:
        q, k, v = (list(t.shape) for t in (q_BHSK, k_BGPK, v_BGPK))
        raise ValueError(f"attention of queries {q} to keys {k} and values {v}: these shapes do not fit")
    return batch, heads, k_BGPK.shape[1], length, k_BGPK.shape[2], dim, query_start
