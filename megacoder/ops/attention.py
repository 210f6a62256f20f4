"""Causal attention with grouped queries: the plain reference, torch's fused kernels, and a blocked path for CPUs.

Legend: B sequences, S queries each, P keys, H query heads, G key-value heads (H a multiple of G), K head dim; N = BH.
A query sees the keys from the beginning of its sequence, or of its own document where several are packed into one, up
to its own token. Queries may be those of a part of the sequence: the same primitive serves context parallelism.
`lse` is the log-sum-exp of the scaled scores, the one thing besides inputs and output that a backward needs.

Why a blocked path: torch's CPU flash kernel reaches 80 GFLOP/s in bf16 on two cores where batched GEMMs reach 700.
Scores of one block of queries against the keys before it go through batched GEMMs, with softmax in one fused pass
between them; memory stays at BLOCK_ELEMENTS scores for any length. The backward recomputes the scores. Keys that no
query of a block sees are skipped, so that packing short documents into long sequences costs less, not more. Masks and
dtypes that no fused kernel supports (`megacoder.ops.fused_attention`) take the blocked path too, with torch instead of
our fused pass. On processors with AMX, bf16 has a fused kernel of our own instead (`megacoder.ops.tile_attention`).
"""

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from megacoder.ops import fused_attention as fused
from megacoder.ops import tile_attention
from megacoder.ops.backends import backend
from megacoder.ops.cpp import address, kernels
from megacoder.ops.fused_attention import DocumentMask

__all__ = [
    "DocumentMask",
    "attention",
    "attention_backward",
    "attention_forward",
    "attention_reference",
    "block_shape",
    "causal_mask",
]

BLOCK_QUERIES = {torch.bfloat16: 256, torch.float32: 64}
"""Queries per block, the fastest of 64, 128 and 256 at S=512: smaller blocks skip more future keys, larger ones keep
bf16's faster GEMM busy."""
BLOCK_ELEMENTS = 1 << 21
"""Scores held at a time, 4 MB in bf16: they stay in a server's last-level cache between the passes."""


def causal_mask(places_S: Tensor, num_keys: int, *, first_keys_BS: Tensor | None = None) -> Tensor:
    """True is seen: keys up to each query's place in the sequence, (S, P), and from its first key on, (B, 1, S, P)."""
    return _seen(places_S, num_keys, None if first_keys_BS is None else first_keys_BS[:, None])


def attention_reference(q_BHSK: Tensor, k_BGPK: Tensor, v_BGPK: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(K)) v, causal or under `mask` (see `attention`), every score in memory.

    fp32 inside, fp64 for fp64.
    """
    groups, wide = q_BHSK.shape[1] // k_BGPK.shape[1], _wide(q_BHSK)
    k, v = (t.to(wide).repeat_interleave(groups, dim=1) for t in (k_BGPK, v_BGPK))
    scores = q_BHSK.to(wide) @ k.mT / q_BHSK.shape[-1] ** 0.5
    if mask is None:
        mask = causal_mask(torch.arange(q_BHSK.shape[2], device=q_BHSK.device), k_BGPK.shape[2])
    return (scores.masked_fill(~mask, float("-inf")).softmax(-1) @ v).to(q_BHSK.dtype)


def attention(q_BHSK: Tensor, k_BGPK: Tensor, v_BGPK: Tensor, *, mask: Tensor | None) -> Tensor:
    """Differentiable by torch; causal, or under a boolean `mask` (True is seen) of (B, 1, S, P) or (S, P).

    P equals S, or is larger when decoding with a cache and where ranks share the queries.
    """
    return F.scaled_dot_product_attention(
        q_BHSK, k_BGPK, v_BGPK, attn_mask=mask, is_causal=mask is None, enable_gqa=q_BHSK.shape[1] != k_BGPK.shape[1]
    )


def attention_forward(
    q_BHSK: Tensor, k_BGPK: Tensor, v_BGPK: Tensor, *, query_start: int = 0, documents: DocumentMask | None = None
) -> tuple[Tensor, Tensor]:
    """(out (B, S, H, K) contiguous, lse (B, H, S) fp32), causal.

    Queries are tokens `query_start`, `query_start` + 1, ... of their sequences, keys are tokens 0, 1, ...; keys after
    the last query are not read. `documents`, for the same queries, restricts each query to its own document where
    sequences are packed.
    """
    batch, heads, length, dim = q_BHSK.shape
    k_BGPK, v_BGPK = _reached(query_start + length, k_BGPK, v_BGPK)
    name = _backend(q_BHSK, query_start, documents)
    if name == "cudnn":
        return fused.cudnn_forward(q_BHSK, k_BGPK, v_BGPK)
    if name == "amx":
        first_keys_BS = _first_keys(q_BHSK, query_start, documents)
        return tile_attention.forward(q_BHSK, k_BGPK, v_BGPK, query_start=query_start, first_keys_BS=first_keys_BS)
    if name in fused.FLASH:
        fused.choose_flash(name)
        k, v = _for_flash(heads, k_BGPK, v_BGPK)
        return fused.flash_forward(q_BHSK, k, v, documents)
    q_NSK, k_NPK, v_NPK = _merge(q_BHSK, *_expand(heads, k_BGPK, v_BGPK))
    out_NSK = torch.empty_like(q_NSK)
    lse_NS = q_NSK.new_empty(batch * heads, length, dtype=torch.float32)
    for block in _blocks(q_BHSK, query_start, documents):
        rows, queries, keys = block.rows, block.queries, block.keys
        scores = torch.bmm(q_NSK[rows, queries], k_NPK[rows, keys].mT)
        lse_NS[rows, queries] = _softmax_(scores, block, dim**-0.5, name)
        out_NSK[rows, queries] = torch.bmm(scores, v_NPK[rows, keys])
    return out_NSK.unflatten(0, (batch, heads)).transpose(1, 2).contiguous(), lse_NS.unflatten(0, (batch, heads))


def attention_backward(
    grad_out_BSHK: Tensor,
    q_BHSK: Tensor,
    k_BGPK: Tensor,
    v_BGPK: Tensor,
    out_BSHK: Tensor,
    lse_BHS: Tensor,
    *,
    query_start: int = 0,
    documents: DocumentMask | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(grad_q (B, H, S, K), grad_k, grad_v (B, G, P, K)); gradients of shared heads are summed over their queries."""
    batch, heads, length, dim = q_BHSK.shape
    k_BGRK, v_BGRK = _reached(query_start + length, k_BGPK, v_BGPK)
    grad_out_BHSK, out_BHSK = grad_out_BSHK.transpose(1, 2), out_BSHK.transpose(1, 2)
    name = _backend(q_BHSK, query_start, documents)
    if name == "cudnn":
        grad_q, grad_k, grad_v = fused.cudnn_backward(grad_out_BHSK, q_BHSK, k_BGRK, v_BGRK, out_BHSK, lse_BHS)
        return grad_q, _like(k_BGPK, grad_k), _like(v_BGPK, grad_v)
    if name == "amx":
        return tile_attention.backward(
            grad_out_BHSK, q_BHSK, k_BGPK, v_BGPK, out_BHSK, lse_BHS,
            query_start=query_start, first_keys_BS=_first_keys(q_BHSK, query_start, documents),
        )  # fmt: skip
    if name in fused.FLASH:
        fused.choose_flash(name)
        k, v = _for_flash(heads, k_BGRK, v_BGRK)
        grad_q, grad_k, grad_v = fused.flash_backward(grad_out_BHSK, q_BHSK, k, v, out_BHSK, lse_BHS, documents)
        return grad_q, _like(k_BGPK, grad_k), _like(v_BGPK, grad_v)
    q_NSK, k_NPK, v_NPK, grad_out_NSK = _merge(q_BHSK, *_expand(heads, k_BGRK, v_BGRK), grad_out_BHSK)
    delta_NS = (grad_out_BSHK.float() * out_BSHK.float()).sum(-1).transpose(1, 2).flatten(0, 1).contiguous()
    lse_NS = lse_BHS.flatten(0, 1)
    grad_q_NSK, grad_k_NPK, grad_v_NPK = torch.empty_like(q_NSK), torch.zeros_like(k_NPK), torch.zeros_like(v_NPK)
    for block in _blocks(q_BHSK, query_start, documents):
        rows, queries, keys = block.rows, block.queries, block.keys
        q, k, v, grad_out = q_NSK[rows, queries], k_NPK[rows, keys], v_NPK[rows, keys], grad_out_NSK[rows, queries]
        scores, grad_scores = torch.bmm(q, k.mT), torch.bmm(grad_out, v.mT)
        _softmax_backward_(scores, grad_scores, lse_NS[rows, queries], delta_NS[rows, queries], block, dim**-0.5, name)
        grad_q_NSK[rows, queries] = torch.bmm(grad_scores, k)
        grad_k_NPK[rows, keys] += torch.bmm(grad_scores.mT, q)
        grad_v_NPK[rows, keys] += torch.bmm(scores.mT, grad_out)
    split = (batch, heads)
    return (
        grad_q_NSK.unflatten(0, split),
        _like(k_BGPK, grad_k_NPK.unflatten(0, split)),
        _like(v_BGPK, grad_v_NPK.unflatten(0, split)),
    )


def _backend(q_BHSK: Tensor, query_start: int, documents: DocumentMask | None) -> str:
    """The backend for these queries; ValueError where `documents` is for different ones."""
    if documents is not None and documents.query_start != query_start:
        raise ValueError(f"documents are for queries from {documents.query_start} on, not from {query_start} on")
    return backend(
        "attention", q_BHSK, able=partial(fused.serves, q_BHSK=q_BHSK, query_start=query_start, documents=documents)
    )


def block_shape(num_queries: int, num_keys: int, dtype: torch.dtype) -> tuple[int, int]:
    """(queries, heads) that the blocked path works on together: at most BLOCK_ELEMENTS scores, or one head."""
    size = min(num_queries, BLOCK_QUERIES.get(dtype, 64))
    return size, max(1, BLOCK_ELEMENTS // (size * num_keys))


class _Block(NamedTuple):
    """Queries that are processed together, and the keys that any of them sees."""

    rows: slice
    """heads of the sequences, end to end"""
    queries: slice
    keys: slice
    visible: int
    """keys of the block up to and including the first query's own token; each later query sees one more"""
    first_keys_Q: Tensor | None
    """first key of the block that each query sees; None: every query sees the block's first key"""

    def hidden(self, device: torch.device) -> Tensor:
        """True is not seen (Q, P)."""
        num_queries, num_keys = (span.stop - span.start for span in (self.queries, self.keys))
        places_Q = torch.arange(self.visible - 1, self.visible - 1 + num_queries, device=device)
        return ~_seen(places_Q, num_keys, self.first_keys_Q)


def _blocks(q_BHSK: Tensor, query_start: int, documents: DocumentMask | None) -> Iterator[_Block]:
    """The blocks (see `block_shape`); each is of a single sequence where there are documents."""
    batch, num_heads, length, _ = q_BHSK.shape
    _first_keys(q_BHSK, query_start, documents)  # refuses wrong ones
    size, heads = block_shape(length, query_start + length, q_BHSK.dtype)
    in_turn, together = (1, batch * num_heads) if documents is None else (batch, num_heads)
    for sequence in range(in_turn):
        end = (sequence + 1) * together
        for head in range(end - together, end, heads):
            for first in range(0, length, size):
                last = min(first + size, length)
                first_keys_Q, start = None, 0
                if documents is not None:
                    start = int(documents.host_first_keys_BS[sequence, first:last].min())
                    first_keys_Q = documents.first_keys_BS[sequence, first:last] - start
                yield _Block(
                    slice(head, min(head + heads, end)), slice(first, last), slice(start, query_start + last),
                    query_start + first + 1 - start, first_keys_Q,
                )  # fmt: skip


def _first_keys(q_BHSK: Tensor, query_start: int, documents: DocumentMask | None) -> Tensor | None:
    """What `documents` says of these queries (B, S), on the host; ValueError for what would send a kernel outside its
    buffers."""
    if documents is None:
        return None
    first_keys_BS, batch = documents.host_first_keys_BS, len(q_BHSK)
    places = range(query_start, query_start + q_BHSK.shape[2])
    if first_keys_BS.shape != (batch, len(places)):
        raise ValueError(f"first keys of {batch} x {len(places)} queries have shape {list(first_keys_BS.shape)}")
    own_S = torch.arange(places.start, places.stop, device=first_keys_BS.device)
    outside = (first_keys_BS < 0) | (first_keys_BS > own_S)
    if outside.any():
        sequence, query = outside.nonzero()[0].tolist()
        first, own = int(first_keys_BS[sequence, query]), places[query]
        raise ValueError(f"the first key of token {own} of sequence {sequence} is {first}; it must be from 0 to {own}")
    return first_keys_BS


def _softmax_(scores_NQP: Tensor, block: _Block, scale: float, backend_name: str) -> Tensor:
    """Turns raw scores into probabilities, in place; returns lse (N, Q) fp32."""
    if backend_name == "torch":
        hidden = block.hidden(scores_NQP.device)
        scaled = (scores_NQP.to(_wide(scores_NQP)) * scale).masked_fill_(hidden, float("-inf"))
        lse = scaled.logsumexp(-1)
        scores_NQP.copy_(scaled.sub_(lse[..., None]).exp_())
        return lse
    rows, queries, keys = scores_NQP.shape
    lse = scores_NQP.new_empty(rows, queries, dtype=torch.float32)
    kernels().attention_softmax(
        scores_NQP.dtype == torch.bfloat16, address(scores_NQP, scores_NQP.dtype), address(lse, torch.float32),
        address(block.first_keys_Q, torch.int64, queries), rows * queries, queries, keys, block.visible, scale,
    )  # fmt: skip
    return lse


def _softmax_backward_(
    scores_NQP: Tensor,
    grad_NQP: Tensor,
    lse_NQ: Tensor,
    delta_NQ: Tensor,
    block: _Block,
    scale: float,
    backend_name: str,
) -> None:
    """Turns raw scores into probabilities, and the probabilities' gradients into those of the raw scores, in place."""
    if backend_name == "torch":
        wide, hidden = _wide(scores_NQP), block.hidden(scores_NQP.device)
        probability = (scores_NQP.to(wide) * scale - lse_NQ[..., None]).exp_().masked_fill_(hidden, 0.0)
        grad_NQP.copy_((grad_NQP.to(wide) - delta_NQ[..., None]) * probability * scale)
        scores_NQP.copy_(probability)
        return
    rows, queries, keys = scores_NQP.shape
    lse_NQ, delta_NQ = lse_NQ.contiguous(), delta_NQ.contiguous()
    kernels().attention_softmax_backward(
        scores_NQP.dtype == torch.bfloat16, address(scores_NQP, scores_NQP.dtype),
        address(grad_NQP, scores_NQP.dtype, rows, queries, keys), address(lse_NQ, torch.float32),
        address(delta_NQ, torch.float32), address(block.first_keys_Q, torch.int64, queries),
        rows * queries, queries, keys, block.visible, scale,
    )  # fmt: skip


def _seen(places_S: Tensor, num_keys: int, first_keys: Tensor | None) -> Tensor:
    """(..., S, P) bool for first keys (..., S)."""
    keys_P = torch.arange(num_keys, device=places_S.device)
    causal_SP = keys_P <= places_S[:, None]
    return causal_SP if first_keys is None else causal_SP & (keys_P >= first_keys[..., None])


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _reached(num_keys: int, *tensors_BGPK: Tensor) -> tuple[Tensor, ...]:
    for tensor in tensors_BGPK:
        if tensor.shape[2] < num_keys:
            raise ValueError(
                f"{tensor.shape[2]} keys for queries up to token {num_keys - 1}; at least {num_keys} are needed"
            )
    return tuple(t[:, :, :num_keys] for t in tensors_BGPK)


def _expand(heads: int, *tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(t if t.shape[1] == heads else t.repeat_interleave(heads // t.shape[1], dim=1) for t in tensors)


def _for_flash(heads: int, *tensors: Tensor) -> tuple[Tensor, ...]:
    """FlashAttention reads shared heads in place; torch's CPU kernel needs a copy for each query head."""
    return _expand(heads, *tensors) if tensors[0].device.type == "cpu" else tensors


def _merge(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.contiguous().flatten(0, 1) for t in tensors)


def _like(whole_BGPK: Tensor, grad_BHPK: Tensor) -> Tensor:
    """Gradients of the keys that were read, one for each query head -> those of all keys in their own heads."""
    grad = grad_BHPK
    if grad.shape[1] != whole_BGPK.shape[1]:
        grad = grad.unflatten(1, (whole_BGPK.shape[1], -1)).sum(2, dtype=torch.float32).to(grad.dtype)
    unread = whole_BGPK.shape[2] - grad.shape[2]
    return F.pad(grad, (0, 0, 0, unread)) if unread else grad
