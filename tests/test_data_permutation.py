"""The keyed order: a bijection for every size, different for every key, uniform."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megacoder.data.permutation import permute


@pytest.mark.parametrize("n", [*range(1, 70), 255, 256, 257, 1023, 4096, 4097, 100_003])
def test_every_item_appears_once(n):
    order = permute(np.arange(n), n, seed=1, epoch=0)
    assert np.array_equal(np.sort(order), np.arange(n))


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 3000), st.integers(-(2**63), 2**64), st.integers(0, 2**40))
def test_any_seed_and_epoch_give_a_bijection(n, seed, epoch):
    assert np.array_equal(np.sort(permute(np.arange(n), n, seed=seed, epoch=epoch)), np.arange(n))


def test_positions_are_independent_of_each_other():
    n, epochs = 1000, np.array([0, 1, 5, 5])
    whole = {epoch: permute(np.arange(n), n, seed=3, epoch=epoch) for epoch in (0, 1, 5)}
    some = permute(np.array([7, 7, 999, 0]), n, seed=3, epoch=epochs)
    assert some.tolist() == [whole[0][7], whole[1][7], whole[5][999], whole[5][0]]


def test_keys_give_unrelated_orders():
    """Two random orders agree at one position on average (a Poisson count); equal or shifted keys would show."""
    n, seen = 10_000, set()
    for seed, epoch in [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (0, 2**32)]:
        seen.add(permute(np.arange(n), n, seed=seed, epoch=epoch).tobytes())
    orders = [np.frombuffer(order, dtype=np.int64) for order in seen]
    assert len(orders) == 6
    agreements = [int((a == b).sum()) for i, a in enumerate(orders) for b in orders[:i]]
    assert max(agreements) < 10


@pytest.mark.parametrize("n", [2, 3, 5, 16, 17, 100])
def test_each_item_is_equally_likely_at_each_position(n):
    """Chi-square over (position, item) for 4,000 epochs; (n-1)^2 degrees of freedom, five standard deviations."""
    epochs = 4000
    grid = np.tile(np.arange(n), (epochs, 1))
    items = permute(grid, n, seed=9, epoch=np.broadcast_to(np.arange(epochs)[:, None], grid.shape))
    counts = np.zeros((n, n))
    np.add.at(counts, (grid, items), 1)
    chi_square = ((counts - epochs / n) ** 2 / (epochs / n)).sum()
    freedom = (n - 1) ** 2
    assert chi_square < freedom + 5 * np.sqrt(2 * freedom)


def test_neighbours_are_spread():
    """Items that follow each other in the files are not near each other in the order (correlation 0 +- 5 sigma)."""
    n = 50_000
    order = permute(np.arange(n), n, seed=4, epoch=0)
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 5 / np.sqrt(n)


def test_a_large_range_needs_no_memory():
    positions = np.array([0, 1, 2**61, 2**62 - 1])
    items = permute(positions, 2**62, seed=1, epoch=7)
    assert len(set(items.tolist())) == 4
    assert items.min() >= 0
    assert items.max() < 2**62


def test_the_order_is_pinned():
    """The order of a run is part of its record: another version of this code must deal the same."""
    assert permute(np.arange(8), 1000, seed=1234, epoch=1).tolist() == [125, 312, 949, 882, 755, 484, 740, 785]
