"""Encoders of many texts: fastokens only where it equals the reference, with the reference as fallback."""

import importlib.util

import numpy as np
import pytest
from data_samples import NASTY_TEXTS, small_tokenizer, source_texts
from hypothesis import given, settings
from hypothesis import strategies as st

from megacoder.core.errors import ConfigError
from megacoder.data import cutting_places, encoders
from megacoder.data.control_tokens import SPECIAL_TOKENS
from megacoder.data.encoders import fast_encoder, reference_encoder

has_fastokens = pytest.mark.skipif(importlib.util.find_spec("fastokens") is None, reason="fastokens is not installed")


@pytest.fixture(scope="module")
def fast():
    return fast_encoder("fastokens", small_tokenizer(), threads=2)


def texts_apart(ids, counts):
    return [part.tolist() for part in np.split(ids, np.cumsum(counts)[:-1])]


def test_the_reference_encoder_equals_the_tokenizer():
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


def test_the_encoder_check_covers_every_token_and_unicode_block():
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
def test_an_encoder_with_one_fault_is_not_used(monkeypatch, capsys):
    monkeypatch.setattr(encoders, "_fastokens", wrong_encoder("<｜fim▁hole｜>"))
    assert fast_encoder("auto", small_tokenizer(), threads=1) is None
    assert "encoding with tokenizers: fastokens gives different ids for " in capsys.readouterr().err
    with pytest.raises(ConfigError, match="encoder = 'fastokens': fastokens gives different ids for "):
        fast_encoder("fastokens", small_tokenizer(), threads=1)


def test_a_missing_encoder_is_reported(monkeypatch, capsys):
    monkeypatch.setattr(encoders.importlib.util, "find_spec", lambda name: None)
    assert fast_encoder("auto", small_tokenizer(), threads=1) is None
    assert r"not installed (pip install 'megacoder[fast]')" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="is not installed"):
        fast_encoder("fastokens", small_tokenizer(), threads=1)
    assert fast_encoder("tokenizers", small_tokenizer(), threads=1) is None
    assert capsys.readouterr().err == ""


Panic = type("PanicException", (BaseException,), {"__module__": "pyo3_runtime"})
"""As PyO3 makes one in each extension module."""


def giving_up(monkeypatch, error):
    """The fast encoder of a fastokens that raises `error` at texts with "bad"; the texts that it is handed."""
    handed, checked = [], False

    def fickle(tokenizer):
        encode = reference_encoder(tokenizer)

        def either(texts):
            handed.append(list(texts))
            if checked and any("bad" in text for text in texts):
                raise error
            return encode(texts)

        return either

    monkeypatch.setattr(encoders, "_fastokens", fickle)
    monkeypatch.setattr(encoders.importlib.util, "find_spec", lambda name: True)
    encode, checked = fast_encoder("auto", small_tokenizer(), threads=1), True
    handed.clear()
    return encode, handed


@pytest.mark.parametrize("error", [Panic("at a text"), ValueError("match limit exceeded")])
def test_texts_that_fastokens_rejects_go_to_the_reference(monkeypatch, error):
    encode, handed = giving_up(monkeypatch, error)
    texts = ["abc", "bad", "", "x = 1\n"]
    assert texts_apart(*encode(texts)) == [small_tokenizer().encode(text) for text in texts]
    assert handed == [texts, *([text] for text in texts)]  # one text does not bring down the others


OTHER_ERRORS = [KeyboardInterrupt(), SystemExit(), GeneratorExit(), MemoryError(), OSError(28, "full")]


@pytest.mark.parametrize("error", OTHER_ERRORS)
def test_other_errors_are_raised_without_fallback(monkeypatch, error):
    encode, handed = giving_up(monkeypatch, error)
    with pytest.raises(type(error)):
        encode(["abc", "bad"])
    assert handed == [["abc", "bad"]]


@has_fastokens
def test_a_panic_in_the_check_is_reported(monkeypatch, capsys):
    def panics(tokenizer):
        raise Panic("index out of bounds")

    monkeypatch.setattr(encoders, "_fastokens", panics)
    assert fast_encoder("auto", small_tokenizer(), threads=1) is None
    assert "fastokens does not accept this tokenizer (index out of bounds)" in capsys.readouterr().err


def test_long_texts_are_encoded_in_parts_and_few_at_a_time(monkeypatch):
    monkeypatch.setattr(cutting_places, "_PART_CHARACTERS", 100)
    monkeypatch.setattr(encoders, "_REFERENCE_CHARACTERS", 500)
    handed = []
    tokenizer = small_tokenizer()
    monkeypatch.setattr(
        tokenizer, "encode_batch", lambda texts: handed.append(texts) or [tokenizer.encode(text) for text in texts]
    )
    texts = ["", source_texts()[0][:5000], "short", "1" * 1000]
    assert texts_apart(*reference_encoder(tokenizer)(texts)) == [tokenizer.encode(text) for text in texts]
    assert max(len(text) for batch in handed for text in batch) < 250
    assert max(sum(map(len, batch)) for batch in handed) < 750
    assert [part for batch in handed for part in batch if part == "short"] == ["short"]
