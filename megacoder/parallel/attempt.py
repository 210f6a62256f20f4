"""A name that all ranks of one start of a run agree on, and no other start has.

torchrun restarts ranks that have failed, and lets them meet at the same store: what the last ranks left there, such as
the addresses of processes that are dead by now, is taken for the new ranks' word. Behind a prefix of its own each start
sees only itself. torchrun's own count of restarts is no such name: hosts count the failures of their own ranks.

The first rank draws the name. Every other rank leaves a token, drawn anew, under a key of its own, and waits for an
answer to that very token; the first rank answers each token that it finds, until all have said that they got the name.
A token from before gets an answer that nobody reads.
"""

import datetime
import secrets
import time

import torch.distributed as dist

__all__ = ["agree_on_attempt"]

_PAUSE_SECONDS = 0.01


def agree_on_attempt(store: dist.Store, rank: int, size: int, *, timeout_seconds: float) -> str:
    """The name of this start; all `size` ranks call it. Raises RuntimeError (DistError) where one does not in time."""
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
            raise dist.DistStoreError(f"{met} of {size - 1} other ranks have come in {timeout_seconds:g} s")
        time.sleep(_PAUSE_SECONDS)
    return name
