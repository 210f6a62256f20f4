"""The attention kernels behind torch's ops, cuDNN's and FlashAttention's, with forward and backward called by hand.

torch includes version 2 of FlashAttention; 3 and 4 are packages whose kernels it can put behind the same ops. There is
no FlexAttention: in half precision these two cover causal masks, grouped queries, packed documents and parts of
sequences.

Autograd would keep (out, lse) between forward and backward, so these are all that is taken and returned; there is no
dropout here, so there are no random states either. Layouts are those of `megacoder.ops.attention`: B sequences, S
queries, P keys, H query heads, G key-value heads, K head dim.

The kernels read lse by its address alone, as if it were packed, so every backward packs it first: context parallelism
passes halves of longer ones. cuDNN's backward gets the output and its gradient packed, too: torch keeps a plan for each
shape and strides of q, k and v, and the plan has the strides that the output and its gradient had in its first call.

Packed documents go to FlashAttention as one ragged (varlen) batch: every piece of a document that has queries here is a
sequence of its own, whose last query is aligned to its last key. No key outside a document is read, let alone masked.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.attention import (
    activate_flash_attention_impl,
    current_flash_attention_impl,
    restore_flash_attention_impl,
)

__all__ = [
    "FLASH",
    "DocumentMask",
    "Pieces",
    "choose_flash",
    "cudnn_backward",
    "cudnn_forward",
    "flash_backward",
    "flash_forward",
    "serves",
]

FLASH = {"flash": None, "flash3": "FA3", "flash4": "FA4"}
"""Backends that run through torch's FlashAttention ops, and torch's names for the kernels that it does not include."""
LARGEST_HEAD = {"cudnn": 128, "flash": 256, "flash3": 256, "flash4": 128}
"""Largest head dim that a backend supports on a GPU."""

_cudnn_forward = torch.ops.aten._scaled_dot_product_cudnn_attention
_cudnn_backward = torch.ops.aten._scaled_dot_product_cudnn_attention_backward
_flash_forward = torch.ops.aten._flash_attention_forward
_flash_backward = torch.ops.aten._flash_attention_backward
_cpu_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_cpu_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass(frozen=True, eq=False)
class DocumentMask:
    """The keys that queries of packed sequences see: those of their own document up to their own token."""

    first_keys_BS: Tensor
    """int64: place in its sequence of the first token of each query's document, at most the query's own"""
    query_start: int = 0
    """place in its sequence of the first query; the others follow"""
    known_pieces: "Pieces | None" = None
    """the pieces, where they were computed already from first keys on the host"""

    @cached_property
    def pieces(self) -> "Pieces":
        """What a ragged kernel needs. Unless known, it costs one wait for the device, so all layers share the mask.

        ValueError where the first keys are not those of consecutive documents.
        """
        return self.known_pieces or Pieces.of(self.host_first_keys_BS, self.query_start, self.first_keys_BS.device)

    @cached_property
    def host_first_keys_BS(self) -> Tensor:
        """The first keys on the host; unless the pieces are known, they cost one wait for the device, too."""
        return self.first_keys_BS.cpu() if self.known_pieces is None else self.known_pieces.first_keys_BS


@dataclass(frozen=True, eq=False)
class Pieces:
    """Documents, cut where these queries begin, all sequences end to end."""

    query_ends: Tensor
    """int32 (pieces + 1,): cu_seqlens of the queries"""
    key_ends: Tensor
    """int32 (pieces + 1,): cu_seqlens of the keys"""
    max_queries: int
    max_keys: int
    first_keys_BS: Tensor
    """what they were computed from, on the host"""

    @cached_property
    def key_starts(self) -> list[int]:
        """Of each sequence, the first key that any of its queries sees."""
        return self.first_keys_BS[:, 0].tolist()

    @classmethod
    def of(cls, first_keys: Tensor, query_start: int, device: torch.device) -> "Pieces":
        """See `DocumentMask.pieces`; first keys (B, S) on the host, for a kernel on `device`."""
        batch, length = first_keys.shape
        places = torch.arange(query_start, query_start + length, device="cpu").expand(batch, length)
        begins = first_keys == places
        begins[:, 0] = True
        wrong = ~begins
        wrong[:, 1:] &= first_keys[:, 1:] != first_keys[:, :-1]
        wrong[:, 0] = first_keys[:, 0] > query_start
        if wrong.any():
            sequence, query = wrong.nonzero()[0].tolist()
            raise ValueError(
                f"the first key of token {query_start + query} of sequence {sequence} is "
                f"{int(first_keys[sequence, query])}: documents are consecutive, so it must be the token itself or the "
                "first key of the token before it"
            )
        starts = begins.flatten().nonzero()[:, 0]
        stops = torch.cat([starts[1:], starts.new_tensor([batch * length])])
        num_keys = (places.flatten()[stops - 1] + 1) - first_keys.flatten()[starts]
        query_ends = torch.cat([starts, stops[-1:]])
        key_ends = torch.cat([num_keys.new_zeros(1), num_keys.cumsum(0)])
        return cls(
            query_ends.to(device, torch.int32), key_ends.to(device, torch.int32),
            int((stops - starts).max()), int(num_keys.max()), first_keys,
        )  # fmt: skip

    def seen(self, keys_BGPK: Tensor, num_keys: int) -> Tensor:
        """The keys that any query sees, (tokens, G, K), among the first `num_keys` of each sequence."""
        by_token = keys_BGPK.transpose(1, 2)
        if not any(self.key_starts):
            return by_token[:, :num_keys].flatten(0, 1)
        return torch.cat([keys[start:num_keys] for keys, start in zip(by_token, self.key_starts, strict=True)])

    def unseen(self, grad_TGK: Tensor, keys_BGPK: Tensor, num_keys: int) -> Tensor:
        """The inverse of `seen` for gradients: (B, G, P, K), zero for keys that nobody saw."""
        if not any(self.key_starts) and num_keys == keys_BGPK.shape[2]:
            return grad_TGK.unflatten(0, (len(self.key_starts), num_keys)).transpose(1, 2)
        grad_BPGK = grad_TGK.new_zeros(*keys_BGPK.transpose(1, 2).shape)
        counts = [num_keys - start for start in self.key_starts]
        for grad, part, start in zip(grad_BPGK, grad_TGK.split(counts), self.key_starts, strict=True):
            grad[start:num_keys] = part
        return grad_BPGK.transpose(1, 2)


def serves(name: str, q_BHSK: Tensor, *, query_start: int, documents: DocumentMask | None) -> bool:
    """Whether backend `name` supports the mask and the head dim.

    cuDNN and the CPU kernel align a causal mask to the first key, FlashAttention to the last one.
    """
    if name not in LARGEST_HEAD:
        return True
    if q_BHSK.device.type == "cpu":
        return query_start == 0 and documents is None
    if q_BHSK.shape[-1] % 8 or q_BHSK.shape[-1] > LARGEST_HEAD[name] or not q_BHSK.numel():
        return False
    # cuDNN does not support a single query and key.
    return name != "cudnn" or (query_start == 0 and documents is None and q_BHSK.shape[2] > 1)


def choose_flash(name: str) -> None:
    """Puts the kernels of `name` behind torch's FlashAttention ops, for the whole process; the default is version 2."""
    kernels = FLASH[name]
    if current_flash_attention_impl() == kernels:
        return
    if kernels is None:
        restore_flash_attention_impl()
    else:
        activate_flash_attention_impl(kernels)


def cudnn_forward(q_BHSK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor) -> tuple[Tensor, Tensor]:
    """(out (B, S, H, K) contiguous, lse (B, H, S) fp32), causal."""
    out, lse, *_ = _cudnn_forward(q_BHSK, k_BGSK, v_BGSK, None, True, 0.0, True)
    return out.transpose(1, 2).contiguous(), lse.view(lse.shape[:3])


def cudnn_backward(
    grad_out_BHSK: Tensor, q_BHSK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, out_BHSK: Tensor, lse_BHS: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    lengths = q_BHSK.shape[2], k_BGSK.shape[2]
    no_dropout = torch.empty((), dtype=torch.int64, device=q_BHSK.device)
    return _cudnn_backward(
        _packed(grad_out_BHSK), q_BHSK, k_BGSK, v_BGSK, _packed(out_BHSK), lse_BHS.contiguous()[..., None],
        no_dropout, no_dropout, None, None, None, *lengths, 0.0, True,
    )  # fmt: skip


def _packed(heads_BHSK: Tensor) -> Tensor:
    """The same values as `cudnn_forward` lays them out: (B, S, H, K) contiguous."""
    return heads_BHSK.transpose(1, 2).contiguous().transpose(1, 2)


def flash_forward(
    q_BHSK: Tensor, k_BGPK: Tensor, v_BGPK: Tensor, documents: DocumentMask | None
) -> tuple[Tensor, Tensor]:
    """(out (B, S, H, K) contiguous, lse (B, H, S) fp32), causal with the last query at the last key."""
    if q_BHSK.device.type == "cpu":
        out, lse = _cpu_forward(q_BHSK, k_BGPK, v_BGPK, 0.0, True)
        return out.transpose(1, 2).contiguous(), lse
    batch, _, length, _ = q_BHSK.shape
    num_keys = k_BGPK.shape[2]
    if documents is None:
        by_token = (t.transpose(1, 2) for t in (q_BHSK, k_BGPK, v_BGPK))
        out_BSHK, lse_BHS, *_ = _flash_forward(*by_token, None, None, length, num_keys, 0.0, True, False)
        return out_BSHK, lse_BHS
    pieces = documents.pieces
    q_THK, k_TGK, v_TGK = q_BHSK.transpose(1, 2).flatten(0, 1), *(pieces.seen(t, num_keys) for t in (k_BGPK, v_BGPK))
    out_THK, lse_HT, *_ = _flash_forward(
        q_THK, k_TGK, v_TGK, pieces.query_ends, pieces.key_ends, pieces.max_queries, pieces.max_keys, 0.0, True, False
    )
    return out_THK.unflatten(0, (batch, length)), lse_HT.unflatten(1, (batch, length)).transpose(0, 1)


def flash_backward(
    grad_out_BHSK: Tensor,
    q_BHSK: Tensor,
    k_BGPK: Tensor,
    v_BGPK: Tensor,
    out_BHSK: Tensor,
    lse_BHS: Tensor,
    documents: DocumentMask | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    if q_BHSK.device.type == "cpu":
        return _cpu_backward(grad_out_BHSK, q_BHSK, k_BGPK, v_BGPK, out_BHSK, lse_BHS, 0.0, True)
    no_dropout = torch.empty(2, dtype=torch.uint64, device=q_BHSK.device)
    length, num_keys = q_BHSK.shape[2], k_BGPK.shape[2]
    if documents is None:
        tensors = [t.transpose(1, 2) for t in (grad_out_BHSK, q_BHSK, k_BGPK, v_BGPK, out_BHSK)]
        grads = _flash_backward(
            *tensors, lse_BHS.contiguous(), None, None, length, num_keys, 0.0, True, no_dropout, no_dropout
        )  # fmt: skip
        grad_q, grad_k, grad_v = (grad.transpose(1, 2) for grad in grads)
        return grad_q, grad_k, grad_v
    pieces, batch = documents.pieces, len(q_BHSK)
    grad_out, q, out = (t.transpose(1, 2).flatten(0, 1) for t in (grad_out_BHSK, q_BHSK, out_BHSK))
    k, v = pieces.seen(k_BGPK, num_keys), pieces.seen(v_BGPK, num_keys)
    lse_HT = lse_BHS.transpose(0, 1).flatten(1).contiguous()  # flatten is a view where there is one sequence
    grad_q_THK, grad_k_TGK, grad_v_TGK = _flash_backward(
        grad_out, q, k, v, out, lse_HT, pieces.query_ends, pieces.key_ends, pieces.max_queries, pieces.max_keys, 0.0,
        True, no_dropout, no_dropout,
    )  # fmt: skip
    grad_q = grad_q_THK.unflatten(0, (batch, length)).transpose(1, 2)
    return grad_q, pieces.unseen(grad_k_TGK, k_BGPK, num_keys), pieces.unseen(grad_v_TGK, v_BGPK, num_keys)
