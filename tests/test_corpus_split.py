"""The two global steps: exact dedup keeps the first, the split holds out repositories near its target."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from megacoder.corpus.dedup import RECORD, copies_among, digest
from megacoder.corpus.split import SplitConfig, choose_heldout


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from("abcdef"), max_size=30), st.randoms())
def test_dedup_keeps_the_first_of_equal_texts_in_any_order(texts, generator):
    expected = [(place, texts.index(text)) for place, text in enumerate(texts) if texts.index(text) < place]
    places = list(range(len(texts)))
    generator.shuffle(places)
    records = np.zeros(len(texts), RECORD)
    halves = np.frombuffer(b"".join(digest(texts[place]) for place in places), "<u8").reshape(-1, 2)
    records["key"], records["low"] = halves.T
    assert sorted(copies_among(records, np.array(places, np.int64)).tolist()) == expected


def test_records_with_half_of_the_digest_equal_are_not_copies():
    records = np.array([(1, 1, 0), (1, 2, 1), (2, 1, 2), (1, 1, 3)], RECORD)
    assert copies_among(records, np.arange(4)).tolist() == [(3, 0)]


def test_a_digest_tells_texts_apart():
    assert len({digest(text) for text in ("", "a", "b", "a\n", "é")}) == 5


@settings(max_examples=200, deadline=None)
@given(
    st.dictionaries(st.text(min_size=1, max_size=5), st.integers(1, 1000), min_size=2, max_size=30),
    st.floats(0.001, 0.9),
    st.integers(0, 3),
)
def test_some_but_never_all_is_held_out(sizes, fraction, seed):
    config = SplitConfig(fraction=fraction, seed=seed, max_bytes=10_000)
    held = choose_heldout(sizes, config)
    assert 0 < len(held) < len(sizes)
    target = min(fraction * sum(sizes.values()), 10_000)
    assert sum(sizes[name] for name in held) <= max(target, min(sizes.values()))
    assert held == choose_heldout(dict(reversed(sizes.items())), config)


def test_the_target_is_met_and_no_large_repository_fills_it():
    sizes = {f"repo{index}": 1000 for index in range(100)} | {"huge": 5000}
    held = choose_heldout(sizes, SplitConfig(fraction=0.05))
    assert sum(sizes[name] for name in held) == 5000
    assert "huge" not in held
    assert held != choose_heldout(sizes, SplitConfig(fraction=0.05, seed=1))
    draws = [choose_heldout(sizes, SplitConfig(fraction=0.05, seed=seed)) for seed in range(200)]
    assert not any("huge" in draw for draw in draws), "nor where it is drawn first"
    assert len(choose_heldout(sizes, SplitConfig(fraction=0.05, max_bytes=2500))) == 2


def test_of_a_large_corpus_30_megabytes_are_held_out():
    sizes = {f"repo{index}": 1_000_000 for index in range(1000)}
    assert len(choose_heldout(sizes, SplitConfig())) == 30
    assert len(choose_heldout(dict(list(sizes.items())[:200]), SplitConfig())) == 10


def test_the_smallest_is_held_out_if_all_exceed_the_target():
    assert choose_heldout({"a": 100, "b": 90, "c": 110}, SplitConfig(fraction=0.05)) == {"b"}


def test_nothing_is_held_out_on_request_or_of_a_single_unit():
    assert choose_heldout({"a": 1, "b": 1}, SplitConfig(fraction=0)) == frozenset()
    assert choose_heldout({"a": 1}, SplitConfig()) == frozenset()
