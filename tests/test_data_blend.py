"""Blending: shares are exact in the long run and close at every step; which dataset a stream draws from."""

from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megacoder.core.errors import ConfigError
from megacoder.data.blend import MAX_ROUND, blend_table
from megacoder.data.permutation import stream_phase


@pytest.mark.parametrize(
    ("weights", "round_"),
    [
        ([0.5, 0.3, 0.2], [0, 1, 2, 0, 0, 1, 0, 2, 1, 0]),
        ([1], [0]),
        ([3, 1], [0, 0, 1, 0]),
        ([2.5, 2.5], [0, 1]),
        ([0, 1, 1, 0.0], [1, 2]),
    ],
)
def test_a_round_is_as_short_as_it_can_be(weights, round_):
    assert blend_table(weights).tolist() == round_


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 400), min_size=1, max_size=8))
def test_shares_are_exact_in_a_round_and_close_before(weights):
    table, total = blend_table([weight / 1000 for weight in weights]), sum(weights)
    counts = np.cumsum(table[:, None] == np.arange(len(weights)), axis=0)
    assert [Fraction(int(count), len(table)) for count in counts[-1]] == [Fraction(w, total) for w in weights]
    expected = np.arange(1, len(table) + 1)[:, None] * np.array(weights) / total
    assert np.abs(counts - expected).max() < len(weights)


def test_proportions_that_need_long_rounds_are_rounded():
    weights = [10**12 + 39, 10**9 + 7, 3]
    counts = Counter(blend_table(weights).tolist())
    assert sum(counts.values()) == MAX_ROUND
    assert counts[2] == 1, "a share below one part of a round is one, not none"
    assert abs(counts[1] / MAX_ROUND - weights[1] / sum(weights)) < 1 / MAX_ROUND
    for pair in ([10**12 + 39, 10**9 + 7], [10**12 + 39, 10**9 + 400_000]):  # to the nearest whole number
        assert Counter(blend_table(pair).tolist())[1] == round(MAX_ROUND * pair[1] / sum(pair))


@pytest.mark.parametrize("weights", [[0.87, 0.1, 0.03], [1, 1], [1, 2, 4, 8]])
def test_streams_together_keep_the_shares_in_every_prefix_and_batch(weights):
    """Streams that began at the same place would take their first windows from one dataset."""
    table, num_streams = blend_table(weights), 256
    phases = np.array([stream_phase(stream, num_streams, len(table)) for stream in range(num_streams)])
    taken = table[(np.arange(300)[:, None] + phases) % len(table)].ravel()
    counts = np.cumsum(taken[:, None] == np.arange(len(weights)), axis=0)
    expected = np.arange(1, len(taken) + 1)[:, None] * np.array(weights) / sum(weights)
    assert np.abs(counts - expected).max() < 8
    batches = np.diff(counts[63::64], axis=0)
    assert np.abs(batches - 64 * np.array(weights) / sum(weights)).max() < 4


@pytest.mark.parametrize("weights", [[0.0, 0], [1, -1], [float("nan")], [float("inf"), 1], []])
def test_invalid_weights_are_refused(weights):
    with pytest.raises(ConfigError, match=r"positive number|0 weights"):
        blend_table(weights)
