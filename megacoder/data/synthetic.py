"""Batches of random tokens: the shape of a run without its corpus, for profiles. Nothing can be learned from them."""

import torch

from megacoder.data.stream import Batch

__all__ = ["SyntheticStream"]


class SyntheticStream:
    """Endless windows of uniformly random ids; ranks of one replica draw the same ones, replicas different ones."""

    def __init__(
        self,
        *,
        vocab_size: int,
        seq_length: int,
        global_batch_size: int,
        dp_rank: int,
        dp_size: int,
        document_masks: bool = False,
        seed: int = 0,
    ) -> None:
        """With `document_masks` each window is one document: the code for masks runs, but they hide nothing."""
        self._vocab_size, self._shape = vocab_size, (global_batch_size // dp_size, seq_length + 1)
        self._document_masks = document_masks
        self._generator = torch.Generator().manual_seed(seed * dp_size + dp_rank)

    def next_batch(self) -> Batch:
        """This data-parallel rank's windows of the next step."""
        windows = torch.randint(0, self._vocab_size, self._shape, generator=self._generator)
        tokens, labels, starts = windows[:, :-1].contiguous(), windows[:, 1:].contiguous(), None
        if self._document_masks:
            starts = torch.zeros_like(tokens, dtype=torch.bool)
            starts[:, 0] = True
        return Batch(tokens=tokens, labels=labels, starts=starts)
