"""Encoders of many texts: fastokens only where it equals the reference, long texts cut where no id notices."""

import importlib.util
import json
import random

import numpy as np
import pytest
from data_samples import NASTY_TEXTS, small_tokenizer, source_texts
from hypothesis import given, settings
from hypothesis import strategies as st

from megacoder.core.errors import ConfigError, DataError
from megacoder.data import encoders
from megacoder.data.encoders import cut, fast_encoder, places_to_cut, reference_encoder
from megacoder.data.tokenizer import SPECIAL_TOKENS, Tokenizer

has_fastokens = pytest.mark.skipif(importlib.util.find_spec("fastokens") is None, reason="fastokens is not installed")


@pytest.fixture(scope="module")
def fast():
    return fast_encoder("fastokens", small_tokenizer(), threads=2)


def texts_apart(ids, counts):
    return [part.tolist() for part in np.split(ids, np.cumsum(counts)[:-1])]


def test_the_reference_gives_what_the_tokenizer_gives():
    texts = [*NASTY_TEXTS, *source_texts(3)]
    ids, counts = reference_encoder(small_tokenizer())(texts)
    assert texts_apart(ids, counts) == [small_tokenizer().encode(text) for text in texts]
    ids, counts = reference_encoder(small_tokenizer())([])
    assert (ids.tolist(), counts.tolist()) == ([], [])


@has_fastokens
def test_fastokens_gives_the_references_ids(fast):
    texts = [*NASTY_TEXTS, *source_texts(8), *SPECIAL_TOKENS.values(), "", "x" + "".join(SPECIAL_TOKENS.values())]
    (ids, counts), (expected, expected_counts) = fast(texts), reference_encoder(small_tokenizer())(texts)
    assert counts.tolist() == expected_counts.tolist()
    assert ids.tolist() == expected.tolist()
    assert ids.max() < small_tokenizer().num_regular_tokens


@has_fastokens
@settings(max_examples=200, deadline=None)
@given(st.lists(st.text(max_size=40), min_size=1, max_size=4))
def test_fastokens_gives_the_references_ids_for_any_text(fast, texts):
    (ids, counts), (expected, expected_counts) = fast(texts), reference_encoder(small_tokenizer())(texts)
    assert (ids.tolist(), counts.tolist()) == (expected.tolist(), expected_counts.tolist())


def wrong_encoder(replaced):
    """As the reference, but for texts that hold `replaced`."""
    encode = reference_encoder(small_tokenizer())
    return lambda tokenizer: lambda texts: encode([text.replace(replaced, "?") for text in texts])


def test_the_check_meets_every_token_and_every_block():
    met = "\0".join(encoders._check_texts(small_tokenizer()))
    for text in [
        *SPECIAL_TOKENS.values(),
        "\u2ff81",
        "\uffff",
        "\U0002fffc",
        "\U000e0100",
        "\r\n" * 50,
        "a" * 500,
        "\x00" * 50,
    ]:
        assert text in met
    _, counts = np.unique(small_tokenizer().encode(met), return_counts=True)
    assert len(counts) > small_tokenizer().num_regular_tokens * 0.95  # some tokens serve only as parts of others


@has_fastokens
def test_an_encoder_with_one_fault_does_not_serve(monkeypatch, capsys):
    monkeypatch.setattr(encoders, "_fastokens", wrong_encoder("<｜fim▁hole｜>"))
    assert fast_encoder("auto", small_tokenizer(), threads=1) is None
    assert "encoding with tokenizers: fastokens gives other ids for " in capsys.readouterr().err
    with pytest.raises(ConfigError, match="encoder = 'fastokens': fastokens gives other ids for "):
        fast_encoder("fastokens", small_tokenizer(), threads=1)


def test_an_encoder_that_is_not_there_is_said(monkeypatch, capsys):
    monkeypatch.setattr(encoders.importlib.util, "find_spec", lambda name: None)
    assert fast_encoder("auto", small_tokenizer(), threads=1) is None
    assert r"not installed (pip install 'megacoder[fast]')" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="is not installed"):
        fast_encoder("fastokens", small_tokenizer(), threads=1)
    assert fast_encoder("tokenizers", small_tokenizer(), threads=1) is None
    assert capsys.readouterr().err == ""


@has_fastokens
def test_texts_at_which_it_gives_up_are_the_references(monkeypatch):
    class Panic(BaseException):
        """As PyO3 raises."""

    serving = True

    def fickle(tokenizer):
        encode = reference_encoder(tokenizer)

        def either(texts):
            if serving:
                return encode(texts)
            raise Panic

        return either

    monkeypatch.setattr(encoders, "_fastokens", fickle)
    encode = fast_encoder("auto", small_tokenizer(), threads=1)
    serving = False
    assert encode(["abc"])[0].tolist() == small_tokenizer().encode("abc")


pieces_of_code = st.sampled_from(
    ["a", " ", "\t", "1", "=", ".", "\n", "\r\n", "ab cd", " x", "3 4", "é", "中", "１", "\u3000", "  b", "_", "\x00"]
)


@settings(max_examples=300, deadline=None)
@given(st.lists(pieces_of_code, max_size=60).map("".join), st.integers(1, 9))
def test_a_text_may_be_cut_at_its_places(text, size):
    tokenizer = small_tokenizer()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoders, "_CUT_CHARACTERS", size)
        pieces = cut(text, places_to_cut(tokenizer))
    assert "".join(pieces) == text
    assert [index for piece in pieces for index in tokenizer.encode(piece)] == tokenizer.encode(text)


def test_long_texts_are_encoded_in_pieces(monkeypatch):
    monkeypatch.setattr(encoders, "_CUT_CHARACTERS", 100)
    handed = []
    tokenizer = small_tokenizer()
    monkeypatch.setattr(
        tokenizer, "encode_batch", lambda texts: handed.extend(texts) or [tokenizer.encode(text) for text in texts]
    )
    texts = ["", source_texts()[0][:5000], "short", "1" * 1000]
    ids, counts = reference_encoder(tokenizer)(texts)
    assert texts_apart(ids, counts) == [tokenizer.encode(text) for text in texts]
    assert max(map(len, handed)) < 250


def test_other_splits_are_cut_behind_line_breaks_alone():
    definition = json.loads(small_tokenizer().definition)
    del definition["pre_tokenizer"]["pretokenizers"][1:5]  # what keeps words and digits apart
    places = places_to_cut(Tokenizer(json.dumps(definition)))
    assert [match.group() for match in places.finditer("ab 12\ncd ef")] == ["\n"]


def test_a_run_without_end_is_refused(monkeypatch):
    monkeypatch.setattr(encoders, "_CUT_CHARACTERS", 10)
    monkeypatch.setattr(encoders, "_LONGEST_RUN", 50)
    places = places_to_cut(small_tokenizer())
    assert cut("=" * 50, places) == ["=" * 50]
    with pytest.raises(DataError, match="50 characters without a line break, digit or blank, from 'abc"):
        cut("abc\n" * 5 + "=" * 51, places)


def test_random_sources_are_cut_without_a_trace(monkeypatch):
    monkeypatch.setattr(encoders, "_CUT_CHARACTERS", 200)
    tokenizer, generator = small_tokenizer(), random.Random(0)
    for text in source_texts(6):
        flat = text.replace("\n", generator.choice([" ", "", "\t", "1"]))[:20_000]
        pieces = cut(flat, places_to_cut(tokenizer))
        assert len(pieces) > len(flat) / 300
        assert [index for piece in pieces for index in tokenizer.encode(piece)] == tokenizer.encode(flat)
