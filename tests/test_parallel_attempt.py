"""Ranks restarted by torchrun agree on a name although the store still holds the keys of the previous start."""

import threading

import pytest
import torch.distributed as dist

from megacoder.parallel.attempt import agree_on_attempt


def start(store, ranks, size, timeout_seconds=20.0):
    """Those of `size` ranks that get so far; what each learns."""
    names = {}

    def of(rank):
        try:
            names[rank] = agree_on_attempt(store, rank, size, timeout_seconds=timeout_seconds)
        except RuntimeError as error:
            names[rank] = error

    threads = [threading.Thread(target=of, args=(rank,)) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return names


@pytest.mark.parametrize("size", [1, 2, 5])
def test_all_ranks_of_a_start_get_one_name_and_each_start_another(size):
    store, seen = dist.HashStore(), set()
    for _ in range(3):
        names = start(store, range(size), size)
        assert names.keys() == set(range(size))
        assert len(set(names.values())) == 1
        seen |= set(names.values())
    assert len(seen) == 3


@pytest.mark.parametrize("killed", [[0], [1], [2], [1, 2]])
def test_a_start_whose_ranks_died_early_does_not_confuse_the_next(killed):
    store = dist.HashStore()
    first = start(store, [rank for rank in range(3) if rank not in killed], 3, timeout_seconds=0.3)
    assert 0 in killed or isinstance(first[0], RuntimeError)
    names = start(store, range(3), 3)
    assert len(set(names.values())) == 1
    assert set(names.values()).isdisjoint(first.values())


def test_missing_ranks_are_counted():
    names = start(dist.HashStore(), [0, 2], 3, timeout_seconds=2.0)
    assert "1 of 2 other ranks have joined in 2 s" in str(names[0])
