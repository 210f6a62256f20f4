"""Position ids and `cu_seqlens` of packed windows, from where documents start in them.

Legend: B windows, S tokens. `starts` are bool, True at first tokens of documents and of windows.
"""

import torch
from torch import Tensor

__all__ = ["cu_seqlens", "position_ids"]


def position_ids(starts: Tensor) -> Tensor:
    """(B, S) starts -> (B, S) int64: the distance of each token to the start of its document in the window."""
    places = torch.arange(starts.shape[1], device=starts.device).expand(starts.shape)
    return places - torch.where(starts, places, 0).cummax(dim=1).values


def cu_seqlens(starts: Tensor) -> Tensor:
    """(B, S) starts -> (documents + 1,) int32: where each document begins in the B S tokens, and B S at the end."""
    places = starts.flatten().nonzero().flatten()
    return torch.cat([places, places.new_tensor([starts.numel()])]).to(torch.int32)
