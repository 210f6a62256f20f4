"""Counts over texts: the compiled ones equal Python's definitions, character by character."""

import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megacoder.core.native import native
from megacoder.corpus import text_counts
from megacoder.corpus.text_counts import (
    LineCounts,
    WordCounts,
    line_counts,
    reference_line_counts,
    reference_word_counts,
    word_counts,
)

needs_build = pytest.mark.skipif(not hasattr(native(), "count_words"), reason="the kernels are not built")
ODD = "ab1_ .\n\r\t\x0b\x1c\x85\xa0é²½߀ـ\u0301\u2028中Ⅷ\U0001d400\U0001d7ce"  # every kind and width


def test_lines_and_words_are_counted():
    assert line_counts("ab\r\ncde\r\n\n1") == LineCounts(lines=4, longest=3, in_lines=6, letters=5)
    assert line_counts("") == LineCounts(lines=0, longest=0, in_lines=0, letters=0)
    found = word_counts("abc x_1 x_1 1.5e3 é \n  abc\nabc  \n\n")
    assert found == WordCounts(words=7, numbers=1, names=3, short_names=1, lines=3, distinct_lines=2)


@needs_build
@settings(max_examples=300, deadline=None)
@given(st.text(st.sampled_from(ODD)) | st.text(st.sampled_from("ab1_ .\n\r")) | st.text())
def test_the_kernels_equal_the_definition(text):
    assert line_counts(text) == reference_line_counts(text)
    assert word_counts(text) == reference_word_counts(text)


@needs_build
def test_every_character_is_classified_as_python_does():
    for start in range(0, sys.maxunicode + 1, 1 << 12):
        surrogates = range(0xD800, 0xE000)  # no text holds one
        text = "\n".join(chr(code) for code in range(start, start + (1 << 12)) if code not in surrogates)
        assert line_counts(text) == reference_line_counts(text)
        assert word_counts(text) == reference_word_counts(text)


@needs_build
def test_many_different_words_and_lines():
    text = "".join(f"name{i} = value{i % 977} + {i}\n" for i in range(20_000))
    assert word_counts(text) == reference_word_counts(text)
    assert word_counts(text).names == 20_977


def _mixed(value):
    value = value * 0x9E3779B97F4A7C15 % 2**64
    return value ^ value >> 32


@needs_build
def test_lines_of_the_same_hash_are_not_the_same():
    """The hash of 16 bytes mixes the first 8 with their number, and the last 8 with the result."""
    one, number = b"sixteen of Latin", 10**7
    while True:
        first = b"%8d" % number
        last = int.from_bytes(one[8:], "little") ^ _mixed(16 ^ int.from_bytes(one[:8], "little"))
        other = first + (last ^ _mixed(16 ^ int.from_bytes(first, "little"))).to_bytes(8, "little")
        if other.decode("latin1").split() == [other.decode("latin1")]:  # one line, with no blanks at its ends
            break
        number += 1
    text = f"{one.decode()}\n{other.decode('latin1')}"
    assert word_counts(text) == reference_word_counts(text)
    assert word_counts(text).distinct_lines == 2


def test_without_the_kernels_python_answers(monkeypatch):
    monkeypatch.setattr(text_counts, "native", lambda: None)
    assert line_counts("a\nb") == reference_line_counts("a\nb")
    assert word_counts("a\nb") == reference_word_counts("a\nb")
