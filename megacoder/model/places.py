"""Where in its sequence each of a rank's tokens is: what rotary angles and attention masks are computed from.

Legend: B sequences of S tokens, L of these on this rank: all, or its part under context parallelism.
A token has two numbers: its place in the sequence, which tells attention what comes before it, and its position for
the rotary embedding. They are equal where a sequence is one document. Where documents are packed and masked, positions
count from each document's beginning, so that the model reads each as if it were alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from megacoder.ops.attention import DocumentMask, causal_mask
from megacoder.parallel.context import UNCUT, ContextParallel

__all__ = ["Places", "position_ids"]


@dataclass(frozen=True, kw_only=True)
class Places:
    """The places of one microbatch's tokens on this rank."""

    positions_BL: Tensor
    """rotary positions, int64"""
    first_keys_BL: Tensor | None = None
    """place in the whole sequence of the first token that each may see, int64; None: the sequence's first"""
    documents: Sequence[DocumentMask] | None = None
    """the same for the hand-scheduled attention, one for each chunk that the rank holds; all layers share them"""

    @classmethod
    def of(
        cls,
        shape: tuple[int, ...],
        cp: ContextParallel = UNCUT,
        *,
        device: torch.device,
        starts_BS: Tensor | None = None,
    ) -> Self:
        """This rank's part of whole sequences of `shape` (B, S); ConfigError for a length that ranks cannot share.

        With `starts_BS` (bool), True where a document begins, tokens see only their own document. Pass it on the host:
        the document boundaries that attention kernels need are then found without waiting for the device.
        """
        batch, length = shape
        cp.check_length(length)
        if starts_BS is None:
            return cls(positions_BL=cp.places(length, device).repeat(batch, 1))
        positions_BL = cp.part(position_ids(starts_BS))
        first_keys_BL = cp.places(length, starts_BS.device) - positions_BL
        return cls(
            positions_BL=positions_BL.to(device), first_keys_BL=first_keys_BL.to(device),
            documents=cp.documents(first_keys_BL, device=device),
        )  # fmt: skip

    @property
    def batch(self) -> int:
        """Sequences."""
        return len(self.positions_BL)

    def mask(self, cp: ContextParallel) -> Tensor | None:
        """For `megacoder.ops.attention.attention` over keys of whole sequences: True is seen; None is plain causal."""
        if cp.size == 1 and self.first_keys_BL is None:
            return None
        length = cp.size * self.positions_BL.shape[1]
        return causal_mask(cp.places(length, self.positions_BL.device), length, first_keys_BS=self.first_keys_BL)


def position_ids(starts_BS: Tensor) -> Tensor:
    """(B, S) int64: each token's distance to the last start (True; a sequence's first token is one)."""
    places = torch.arange(starts_BS.shape[1], device=starts_BS.device).expand(starts_BS.shape)
    return places - torch.where(starts_BS, places, 0).cummax(dim=1).values
