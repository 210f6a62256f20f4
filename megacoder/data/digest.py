"""A digest of each step's tokens: shows whether two runs, machines or versions see the same data, without training.

Windows of all ranks are digested in the run's order, so that the digest does not depend on the number of ranks.
"""

from collections.abc import Iterator, Sequence
from hashlib import sha256

import torch

from megacoder.data.stream import Batch, ResumableBatches

__all__ = ["step_digest", "step_digests"]


def step_digests(ranks: Sequence[ResumableBatches], *, skip: int, steps: int) -> Iterator[str]:
    """The digests of `steps` steps after `skip` others, from the streams of all ranks, which advance together."""
    for step in range(skip + steps):
        first_window = ranks[0].windows
        batches = [rank.next_batch() for rank in ranks]
        if step >= skip:
            yield step_digest(batches, first_window=first_window)


def step_digest(batches: Sequence[Batch], *, first_window: int) -> str:
    """SHA-256 of a global batch's tokens, labels and, with document masks, document starts, as 32-bit numbers.

    `batches` are those of all ranks; `first_window` is the number of the batch's first window in the run.
    """
    digest = sha256()
    for name in ("tokens", "labels", "starts"):
        parts = [getattr(batch, name) for batch in batches]
        if parts[0] is not None:
            whole = torch.empty(sum(map(len, parts)), parts[0].shape[1], dtype=torch.int32)
            for rank, part in enumerate(parts):
                whole[(rank - first_window) % len(parts) :: len(parts)] = part
            digest.update(whole.numpy().astype("<i4").tobytes())
    return digest.hexdigest()
