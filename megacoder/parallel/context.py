"""Context parallelism: a rank holds a part of every sequence, and sees the rest through all ranks' keys and values.

Zig-zag layout. Under a causal mask the work of a token grows with its place in the sequence: if each rank held one
contiguous run of tokens, all would wait for the last. So a sequence is cut into 2 * cp chunks, of which rank r holds
chunks r and 2 * cp - 1 - r, an early one and a late one. For cp = 2, the keys that each chunk sees:

    rank 0    chunk 0 |#...|    chunk 3 |####|      5 of 8
    rank 1    chunk 1 |##..|    chunk 2 |###.|      5 of 8

With packed documents the work depends on where they begin, and is equal only on average.

Each layer all-gathers keys and values before its attention, and again in its backward (Llama 3, arXiv:2407.21783,
3.3.2). Why not ring attention: with grouped queries keys and values are a small part of what a layer computes, and with
all keys on every rank any mask works and the attention is that of a single process, run once for each chunk, with no
partial softmaxes to merge. The cost: memory for one layer's keys and values of whole sequences, and an exchange that
runs before attention, not overlapped with it. Gradients of keys and values are sums over all ranks' queries; they are
computed and added up in fp32, so that more ranks do not mean more rounding.

Legend: B sequences of S tokens, L = S / cp of these on this rank, H query heads, G key-value heads, K head dim. With
one rank everything is the identity and copies nothing.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megacoder.core.errors import ConfigError
from megacoder.ops.attention import DocumentMask, attention_backward, attention_forward
from megacoder.ops.fused_attention import Pieces
from megacoder.parallel.collectives import start_all_gather, start_reduce_scatter_sum

__all__ = [
    "UNCUT",
    "ContextParallel",
    "context_attention_backward",
    "context_attention_forward",
    "gather_keys",
    "start_gather_keys",
]


@dataclass(frozen=True, kw_only=True)
class ContextParallel:
    """A rank's place on the context axis."""

    rank: int = 0
    """index in the group"""
    size: int = 1
    """ranks that share every sequence"""
    group: dist.ProcessGroup | None = None
    """None for one rank, and where only the layout is needed"""

    def check_length(self, length: int) -> None:
        """ConfigError, with the nearest lengths that work, unless the ranks can share sequences of `length` tokens."""
        multiple = 2 * self.size
        if self.size > 1 and length % multiple:
            down = length // multiple * multiple
            nearest = f"{down} or {down + multiple}" if down else f"{multiple}"
            raise ConfigError(
                f"cp = {self.size}: sequences of {length} tokens cannot be cut into {multiple} equal chunks; nearest "
                f"lengths that can: {nearest}"
            )

    def chunks(self, length: int) -> list[range]:
        """The places in a sequence of `length` tokens that this rank holds, first to last."""
        if self.size == 1:
            return [range(length)]
        chunk = length // (2 * self.size)
        return [range(n * chunk, (n + 1) * chunk) for n in (self.rank, 2 * self.size - 1 - self.rank)]

    def places(self, length: int, device: torch.device | None = None) -> Tensor:
        """`chunks` as int64 (L,)."""
        return torch.cat([torch.arange(chunk.start, chunk.stop, device=device) for chunk in self.chunks(length)])

    def documents(self, first_keys_BL: Tensor, *, device: torch.device) -> "Sequence[DocumentMask]":
        """One mask for each of `chunks`, from the first keys of this rank's tokens.

        From first keys on the host, all that GPU kernels need is computed now; otherwise on first use, which then waits
        for the device.
        """
        chunks = self.chunks(first_keys_BL.shape[1] * self.size)
        parts = first_keys_BL.split([len(chunk) for chunk in chunks], dim=1)
        find = device.type == "cuda" and first_keys_BL.device.type == "cpu"
        return [
            DocumentMask(part.to(device), chunk.start, Pieces.of(part, chunk.start, device) if find else None)
            for part, chunk in zip(parts, chunks, strict=True)
        ]

    def part(self, whole_BS: Tensor) -> Tensor:
        """This rank's tokens (B, L, ...) of whole sequences (B, S, ...); ConfigError as `check_length`."""
        if self.size == 1:
            return whole_BS
        length = whole_BS.shape[1]
        self.check_length(length)
        return torch.cat([whole_BS[:, chunk.start : chunk.stop] for chunk in self.chunks(length)], dim=1)


UNCUT = ContextParallel()
"""No context parallelism: sequences are whole."""

KeysAndValues = tuple[Tensor, Tensor]
Documents = Sequence[DocumentMask] | None
"""Masks of packed documents for the chunks that a rank holds (see `ContextParallel.documents`)."""


def start_gather_keys(k_BGLK: Tensor, v_BGLK: Tensor, cp: ContextParallel) -> Callable[[], KeysAndValues]:
    """Begins to gather whole sequences' keys and values, in one exchange.

    The returned function waits for them: (B, G, S, K) each.
    """
    if cp.size == 1:
        return lambda: (k_BGLK, v_BGLK)
    assert cp.group is not None
    local_2BGLK = torch.stack((k_BGLK, v_BGLK))
    by_rank = local_2BGLK.new_empty(cp.size * 2, *k_BGLK.shape)
    gathering = start_all_gather(by_rank, local_2BGLK, cp.group)

    def wait() -> KeysAndValues:
        early, late = gathering.wait().unflatten(0, (cp.size, 2)).chunk(2, dim=-2)
        k, v = torch.cat((*early, *reversed(late.unbind())), dim=-2)
        return k, v

    return wait


def gather_keys(k_BGLK: Tensor, v_BGLK: Tensor, cp: ContextParallel) -> KeysAndValues:
    """Differentiable `start_gather_keys`, with the wait; its backward sums all ranks' gradients on the owner."""
    return (k_BGLK, v_BGLK) if cp.size == 1 else _GatherKeys.apply(k_BGLK, v_BGLK, cp)


def context_attention_forward(
    q_BHLK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, cp: ContextParallel, *, documents: Documents
) -> tuple[Tensor, Tensor]:
    """`attention_forward` of this rank's queries: (out (B, L, H, K), lse (B, H, L))."""
    if cp.size == 1:
        return attention_forward(q_BHLK, k_BGSK, v_BGSK, documents=documents[0] if documents else None)
    halves = [
        attention_forward(
            q_BHLK[:, :, half], k_BGSK[:, :, : chunk.stop], v_BGSK[:, :, : chunk.stop],
            query_start=chunk.start, documents=mask,
        )
        for half, chunk, mask in _halves(cp, k_BGSK.shape[2], documents)
    ]  # fmt: skip
    outs, lses = zip(*halves, strict=True)
    return torch.cat(outs, dim=1), torch.cat(lses, dim=2)


def context_attention_backward(
    grad_out_BLHK: Tensor,
    q_BHLK: Tensor,
    k_BGSK: Tensor,
    v_BGSK: Tensor,
    out_BLHK: Tensor,
    lse_BHL: Tensor,
    cp: ContextParallel,
    *,
    documents: Documents,
) -> tuple[Tensor, Callable[[], KeysAndValues]]:
    """Gradient of q (B, H, L, K), and a function that waits for those of this rank's k and v, (B, G, L, K) each.

    The gradients of k and v are reduced in the background until then.
    """
    if cp.size == 1:
        grad_q, *grad_kv = attention_backward(
            grad_out_BLHK, q_BHLK, k_BGSK, v_BGSK, out_BLHK, lse_BHL, documents=documents[0] if documents else None
        )
        return grad_q, lambda: (grad_kv[0], grad_kv[1])
    grads_q = []
    grad_kv_2BGSK = k_BGSK.new_zeros(2, *k_BGSK.shape, dtype=torch.promote_types(k_BGSK.dtype, torch.float32))
    for half, chunk, mask in _halves(cp, k_BGSK.shape[2], documents):
        grad_q, *grad_kv = attention_backward(
            grad_out_BLHK[:, half], q_BHLK[:, :, half], k_BGSK[:, :, : chunk.stop], v_BGSK[:, :, : chunk.stop],
            out_BLHK[:, half], lse_BHL[:, :, half], query_start=chunk.start, documents=mask,
        )  # fmt: skip
        grads_q.append(grad_q)
        for total, grad in zip(grad_kv_2BGSK, grad_kv, strict=True):
            total[:, :, : chunk.stop] += grad
    return torch.cat(grads_q, dim=2), _start_sum(grad_kv_2BGSK, k_BGSK.dtype, cp)


def _start_sum(grad_kv_2BGSK: Tensor, dtype: torch.dtype, cp: ContextParallel) -> Callable[[], KeysAndValues]:
    """Begins to sum all ranks' gradients; the returned function waits for those of this rank's tokens, in `dtype`."""
    assert cp.group is not None
    chunks = grad_kv_2BGSK.chunk(2 * cp.size, dim=-2)
    by_rank = torch.cat([torch.cat((chunks[n], chunks[2 * cp.size - 1 - n]), dim=-2) for n in range(cp.size)])
    summing = start_reduce_scatter_sum(torch.empty_like(by_rank[:2]), by_rank, cp.group)

    def wait() -> KeysAndValues:
        grad_k, grad_v = summing.wait().to(dtype)
        return grad_k, grad_v

    return wait


def _halves(
    cp: ContextParallel, length: int, documents: Documents
) -> Iterator[tuple[slice, range, DocumentMask | None]]:
    """For each of this rank's two chunks: (its slice of the local tokens, its places in the sequence, its mask)."""
    own = length // cp.size // 2
    slices = (slice(0, own), slice(own, 2 * own))
    return zip(slices, cp.chunks(length), documents or (None, None), strict=True)


class _GatherKeys(torch.autograd.Function):
    """All-gather forward, reduce-scatter backward."""

    @staticmethod
    def forward(ctx: Any, k: Tensor, v: Tensor, cp: ContextParallel) -> KeysAndValues:
        ctx.cp = cp
        return start_gather_keys(k, v, cp)()

    @staticmethod
    def backward(ctx: Any, grad_k: Tensor, grad_v: Tensor) -> tuple[Tensor, Tensor, None]:
        wide = torch.promote_types(grad_k.dtype, torch.float32)
        return *_start_sum(torch.stack((grad_k, grad_v)).to(wide), grad_k.dtype, ctx.cp)(), None
