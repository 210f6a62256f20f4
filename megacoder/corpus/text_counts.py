"""What file filters count in a text: lines, letters, words, names. In C++ where compiled (csrc/cpp/text_counts.h); the
plain functions here define the counts and are used otherwise.
"""

import re
import string
from collections.abc import Callable
from typing import Any, NamedTuple

from megacoder.core.native import native

__all__ = ["LineCounts", "WordCounts", "line_counts", "reference_line_counts", "reference_word_counts", "word_counts"]

_WORDS = re.compile(r"[^\W\d]\w*|\d[\w.]*")
_ASCII_LETTERS = string.ascii_letters.encode()
_NON_ASCII = re.compile(r"[^\x00-\x7f]+")


class LineCounts(NamedTuple):
    """A line ends at LF, CR or CRLF; what follows the last line end is a line unless it is empty."""

    lines: int
    longest: int
    """characters of the longest line, without its end"""
    in_lines: int
    """characters of all lines, without their ends"""
    letters: int
    """characters that are letters to `str.isalpha`"""


class WordCounts(NamedTuple):
    """A word begins with a letter or `_`, or is a number: a digit and the letters, digits, `_` and `.` after it."""

    words: int
    numbers: int
    names: int
    """distinct words that are not numbers"""
    short_names: int
    """of these, those of one or two characters"""
    lines: int
    """lines that are not blank; here only LF ends a line"""
    distinct_lines: int
    """of these, distinct ones, ignoring white space at either end"""


def line_counts(text: str) -> LineCounts:
    """Counts for limits on lines and letters."""
    kernel = _kernel("count_lines")
    return reference_line_counts(text) if kernel is None else LineCounts(*kernel(text))


def word_counts(text: str) -> WordCounts:
    """Counts for rules of thumb about what is readable."""
    kernel = _kernel("count_words")
    return reference_word_counts(text) if kernel is None else WordCounts(*kernel(text))


def reference_line_counts(text: str) -> LineCounts:
    """`line_counts` in Python alone."""
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    if not lines[-1]:
        lines.pop()
    lengths = [len(line) for line in lines]
    return LineCounts(len(lines), max(lengths, default=0), sum(lengths), _count_letters(text))


def reference_word_counts(text: str) -> WordCounts:
    """`word_counts` in Python alone."""
    words = _WORDS.findall(text)
    names = {word for word in words if not word[0].isdigit()}
    lines = [line for line in map(str.strip, text.split("\n")) if line]
    return WordCounts(
        words=len(words),
        numbers=sum(word[0].isdigit() for word in words),
        names=len(names),
        short_names=sum(len(name) < 3 for name in names),
        lines=len(lines),
        distinct_lines=len(set(lines)),
    )


def _count_letters(text: str) -> int:
    """Counts ASCII letters by deleting them from the bytes, four times faster than `isalpha`; the rest by `isalpha`."""
    encoded = text.encode()
    letters = len(encoded) - len(encoded.translate(None, _ASCII_LETTERS))
    if not text.isascii():
        letters += sum(map(str.isalpha, "".join(_NON_ASCII.findall(text))))
    return letters


def _kernel(name: str) -> Callable[[str], tuple[Any, ...]] | None:
    """None where nothing is compiled."""
    return getattr(native(), name, None)
