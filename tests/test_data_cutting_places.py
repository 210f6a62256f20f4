"""Places where text can be cut, found in text and between ids, without a change of any id."""

import json
import random
from itertools import pairwise

import numpy as np
import pytest
from data_samples import NASTY_TEXTS, small_tokenizer, source_texts
from hypothesis import given, settings
from hypothesis import strategies as st

from megacoder.core.errors import DataError
from megacoder.data import cutting_places as module
from megacoder.data.cutting_places import CuttingPlaces
from megacoder.data.tokenizer import Tokenizer

PLACES = CuttingPlaces(small_tokenizer())

pieces_of_code = st.sampled_from(
    ["a", " ", "\t", "1", "=", ".", "\n", "\r\n", "ab cd", " x", "3 4", "é", "e\u0301", "中", "１", "\u3000", "  b",
     "_", "'", '"s', "\x00", "a'", "b-", "👍"]
)  # fmt: skip


def assert_cut(text, borders):
    """Each stretch of the ids of `text` between two `borders` is what its text encodes to."""
    tokenizer = small_tokenizer()
    ids = tokenizer.encode(text)
    for start, stop in pairwise(borders):
        part = tokenizer.decode_bytes(ids[start:stop]).decode("utf-8")
        assert tokenizer.encode(part) == ids[start:stop]


@settings(max_examples=300, deadline=None)
@given(st.lists(pieces_of_code, max_size=60).map("".join), st.integers(1, 9))
def test_a_text_may_be_cut_at_its_places(text, size):
    tokenizer = small_tokenizer()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_PART_CHARACTERS", size)
        parts = PLACES.cut(text)
    assert "".join(parts) == text
    assert [index for part in parts for index in tokenizer.encode(part)] == tokenizer.encode(text)


@settings(max_examples=300, deadline=None)
@given(st.lists(pieces_of_code, max_size=30).map("".join), st.randoms())
def test_ids_may_be_cut_at_their_borders(text, generator):
    borders = PLACES.borders(np.array(small_tokenizer().encode(text), np.uint16)).tolist()
    assert borders[0] == 0
    assert borders[-1] == len(small_tokenizer().encode(text))
    assert_cut(text, borders)
    assert_cut(text, sorted(generator.sample(borders, min(3, len(borders)))))


@pytest.mark.parametrize("text", [*source_texts(8), *NASTY_TEXTS])
def test_sources_may_be_cut_at_their_borders(text):
    assert_cut(text, PLACES.borders(np.array(small_tokenizer().encode(text), np.uint16)).tolist())


def test_places_are_as_dense_as_words():
    text = "for(var i=0;i<n;i++){total+=values[i]*weight_of(i)}"
    assert [match.end() for match in PLACES.pattern.finditer(text)] == [
        place for place in range(1, len(text))
        if text[place - 1].isdigit() or (text[place - 1].isalpha() and not text[place].isalpha())
    ]  # fmt: skip
    for source in source_texts(8):
        ids = np.array(small_tokenizer().encode(source))
        assert len(PLACES.borders(ids)) > len(ids) / 4


def test_line_breaks_are_tokens_of_their_own():
    ids = np.array(small_tokenizer().encode("é\n\r\n=\n"))
    borders = PLACES.borders(ids)
    for place in np.flatnonzero(np.isin(ids, [small_tokenizer().encode(character)[0] for character in "\r\n"])):
        assert {place, place + 1} <= set(borders.tolist())
    assert PLACES.borders(np.empty(0, np.uint16)).tolist() == [0]


def test_other_pre_tokenizers_are_cut_only_at_line_breaks():
    definition = json.loads(small_tokenizer().definition)
    del definition["pre_tokenizer"]["pretokenizers"][1:5]  # what keeps words and digits apart
    tokenizer = Tokenizer(json.dumps(definition))
    places, text = CuttingPlaces(tokenizer), "ab 12\ncd.ef"
    assert [match.group() for match in places.pattern.finditer(text)] == ["\n"]
    ids = np.array(tokenizer.encode(text))
    line_break = ids.tolist().index(tokenizer.encode("\n")[0])
    assert places.borders(ids).tolist() == [0, line_break, line_break + 1, len(ids)]


def test_a_run_without_end_is_refused(monkeypatch):
    monkeypatch.setattr(module, "_PART_CHARACTERS", 10)
    monkeypatch.setattr(module, "_LONGEST_RUN", 50)
    assert PLACES.cut("=" * 50) == ["=" * 50]
    with pytest.raises(DataError, match="50 characters without a line break, digit or end of a word, from 'abc"):
        PLACES.cut("abc\n" * 5 + "=" * 51)


def test_random_sources_are_cut_without_a_trace(monkeypatch):
    monkeypatch.setattr(module, "_PART_CHARACTERS", 200)
    tokenizer, generator = small_tokenizer(), random.Random(0)
    for text in source_texts(6):
        flat = text.replace("\n", generator.choice([" ", "", "\t", "1"]))[:20_000]
        parts = PLACES.cut(flat)
        assert len(parts) > len(flat) / 300
        assert [index for part in parts for index in tokenizer.encode(part)] == tokenizer.encode(flat)
