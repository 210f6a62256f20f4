"""A name that all ranks of one start of a run agree on, and no other start has.

torchrun restarts failed ranks and lets them meet at the same store: what the old ranks left there, such as the
addresses of dead processes, would be mistaken for the new ranks' data. With its own key prefix each start sees only
itself. torchrun's restart count cannot serve as the name: each host counts only the failures of its own ranks.

The first rank draws the name. Every other rank leaves a fresh random token under its own key and waits for an answer to
exactly that token; the first rank answers each token that it finds, until all have confirmed that they got the name.
A token from an earlier start gets an answer that nobody reads.
"""

import datetime
import secrets
import time

import torch.distributed as dist

__all__ = ["agree_on_attempt"]

_PAUSE_SECONDS = 0.01


def agree_on_attempt(store: dist.Store, rank: int, size: int, *, timeout_seconds: float) -> str:
    """The name of this start; all `size` ranks call it. Raises RuntimeError (DistError) if one is not there in time."""
    if rank != 0:
        token = secrets.token_hex(8)
        store.set(f"token/{rank}", token)
        store.wait([f"name/{token}"], datetime.timedelta(seconds=timeout_seconds))
        name = store.get(f"name/{token}").decode()
        store.add(f"met/{name}", 1)
        return name
    name, answered = secrets.token_hex(8), dict[int, bytes]()
    deadline = time.monotonic() + timeout_seconds
    while store.add(f"met/{name}", 0) < size - 1:
        for other in range(1, size):
            key = f"token/{other}"
            if store.check([key]) and (token_found := store.get(key)) != answered.get(other):
                store.set(f"name/{token_found.decode()}", name)
                answered[other] = token_found
        if time.monotonic() > deadline:
            met = store.add(f"met/{name}", 0)
            raise dist.DistStoreError(f"only {met} of {size - 1} other ranks have joined in {timeout_seconds:g} s")
        time.sleep(_PAUSE_SECONDS)
    return name
