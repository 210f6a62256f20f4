"""Where documents begin and end inside packed windows: labels, position ids and `cu_seqlens`, read off the tokens.

Legend: B windows, S tokens. Text never encodes to a control id, so that the ids alone show the edges: before each BOS
where the stream puts one in front of documents, after each EOS where it does not (`bos_id=None`).
"""

import torch
from torch import Tensor

from megacoder.ops.cross_entropy import IGNORE_INDEX

__all__ = ["cu_seqlens", "document_starts", "next_token_labels", "position_ids"]


def next_token_labels(windows: Tensor, *, bos_id: int | None, eos_id: int) -> Tensor:
    """(B, S + 1) tokens -> (B, S) labels: the next token, or IGNORE_INDEX where that begins another document."""
    labels = windows[:, 1:].clone()
    crosses = windows[:, :-1] == eos_id if bos_id is None else labels == bos_id
    return labels.masked_fill_(crosses, IGNORE_INDEX)


def document_starts(tokens: Tensor, *, bos_id: int | None, eos_id: int) -> Tensor:
    """(B, S) tokens -> (B, S) bool: first tokens of documents, and of each window, whose past is not in it."""
    starts = torch.ones_like(tokens, dtype=torch.bool)
    starts[:, 1:] = tokens[:, :-1] == eos_id if bos_id is None else tokens[:, 1:] == bos_id
    return starts


def position_ids(starts: Tensor) -> Tensor:
    """(B, S) starts -> (B, S) int64: the distance of each token to the start of its document in the window."""
    places = torch.arange(starts.shape[1], device=starts.device).expand(starts.shape)
    return places - torch.where(starts, places, 0).cummax(dim=1).values


def cu_seqlens(starts: Tensor) -> Tensor:
    """(B, S) starts -> (documents + 1,) int32: where each document begins in the B S tokens, and B S at the end."""
    places = starts.flatten().nonzero().flatten()
    return torch.cat([places, places.new_tensor([starts.numel()])]).to(torch.int32)
