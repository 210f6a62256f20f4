"""Decontamination: drops files that hold a piece of a benchmark, by the paper's rule, and records which piece.

The rule (section 2.2 of arXiv 2401.14196): a file that shares any run of 10 words with a test is dropped; a test string
of 3 to 9 words must occur as a whole. The paper does not define a word; here, as in near-dedup, it is a run of letters,
digits, `_` and bytes from 128 on, ASCII in lower case. Of so few words many are all that `return x == y` and
`return x + y` have in common, so a short string must occur literally, but for case and the amount of white space.

Taken literally, the rule also drops tables of digits ("0 1 0 1 0 1 0 1 0 1" is in many tests), so every hit names the
run and the test, and `min_distinct_words` can exclude runs of few different words.

The hash of a run of n words is that of its first n - 1, times a constant, plus the last word's: all lengths cost one
pass (in C++ where compiled; the NumPy code defines it). A short string is searched for literally only in the few files
that hold its words. A bit table over the first words of the runs searched for
filters out nearly all other text before 64-bit hashes are compared. With 100,000 runs to search for, a chance collision
of hashes is expected in fewer than one of 100,000 corpora of a billion words.
"""

import functools
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from megacoder.core.config import check_at_least
from megacoder.core.errors import ConfigError
from megacoder.core.native import native
from megacoder.corpus.benchmarks import TestString, read_tests
from megacoder.corpus.documents import Document, Dropped
from megacoder.corpus.minhash import word_hashes

__all__ = ["BenchmarkIndex", "Decontamination", "DecontaminationConfig", "Hit", "read_hits"]

_BASE = np.uint64(0xD6E8FEB86659FD93)
_WORD_BYTE = rb"[0-9A-Za-z_\x80-\xff]"
_WORD = re.compile(_WORD_BYTE + rb"+")
_MAX_LISTED = 20


@dataclass(frozen=True, kw_only=True)
class DecontaminationConfig:
    """When a file counts as contaminated; the defaults are the paper's."""

    ngram: int = 10
    """files that share this many consecutive words with a test are dropped"""
    min_ngram: int = 3
    """test strings shorter than `ngram` are searched for as a whole if they have at least this many words"""
    min_distinct_words: int = 1
    """runs with fewer different words do not count; 1 is the paper's rule, 5 spares tables such as `0 1 0 1 ...`"""
    exceptions: tuple[str, ...] = ("return x + y", "return len(string)", "return n**2", "return ''.join(strings)")
    """test strings that are too common to count when they occur as a whole; default: BigCode's list for HumanEval"""
    fields: tuple[str, ...] = ()
    """columns of the benchmarks to search for; without any, all that hold text"""

    def __post_init__(self) -> None:
        if not 1 <= self.min_ngram <= self.ngram:
            raise ConfigError(f"decontamination.min_ngram = {self.min_ngram}: must be 1 to ngram = {self.ngram}")
        check_at_least(self, 1, "min_distinct_words", prefix="decontamination.")


@dataclass(frozen=True, kw_only=True)
class Hit:
    """A piece of a test in a file."""

    test: str
    """which test"""
    gram: str
    """the shared words"""
    whole: bool
    """whether the test string is shorter than `ngram` and occurs as a whole"""


@dataclass(frozen=True, kw_only=True)
class _Gram:
    """A run of words to look for."""

    words: bytes
    test: str
    literal: bytes | None
    """the test string itself, normalized, where it is shorter than `ngram`"""

    @functools.cached_property
    def pattern(self) -> re.Pattern[bytes]:
        """Finds `literal`, as whole words, in a text in lower case."""
        first, *more = map(re.escape, (self.literal or b"").split())
        if _WORD.match(self.literal or b""):  # looked for behind the first part, so that `re` can search for that
            first += rb"(?<!" + _WORD_BYTE + first + rb")"
        return re.compile(rb"\s+".join([first, *more]) + (rb"(?!" + _WORD_BYTE + rb")" if self._ends_in_word else b""))

    @property
    def _ends_in_word(self) -> bool:
        return _WORD.match((self.literal or b"")[-1:]) is not None


class BenchmarkIndex:
    """The runs of words to look for."""

    def __init__(self, tests: list[TestString], config: DecontaminationConfig) -> None:
        self._grams: dict[int, list[_Gram]] = {}  # by hash
        runs: list[np.ndarray] = []  # the word hashes of each
        exceptions = {_normalized(text) for text in config.exceptions}
        for test in tests:
            text = test.text.encode()
            words = _words(text)
            length = min(len(words), config.ngram)
            literal = _normalized(test.text) if length < config.ngram else None
            if length < config.min_ngram or literal in exceptions:
                continue
            hashes = word_hashes(text)
            for start, hashed in enumerate(_run_hashes(hashes, length).tolist()):
                run = words[start : start + length]
                if len(set(run)) >= config.min_distinct_words:
                    grams = self._grams.setdefault(hashed, [])
                    if all(gram.literal != literal for gram in grams):  # the first test with it is named
                        grams.append(_Gram(words=b" ".join(run), test=test.test, literal=literal))
                    runs.append(hashes[start : start + length])
        self._lengths = np.array(sorted(set(map(len, runs))), np.int64)
        self._hashes = np.array(sorted(self._grams), np.uint64)
        bits = max(16, min(24, len(self._grams).bit_length() + 4))
        self._shift = np.uint64(64 - bits)
        self._table = np.zeros(1 << bits, bool)
        for hashes in runs:
            self._table[_run_hashes(hashes[: self._lengths[0]], int(self._lengths[0])) >> self._shift] = True
        self._looked_for = (
            self._lengths.ctypes.data, len(self._lengths), self._table.ctypes.data, 64 - bits, self._hashes.ctypes.data,
            len(self._hashes),
        )  # fmt: skip

    def __len__(self) -> int:
        return len(self._grams)

    def hits(self, text: bytes) -> list[Hit]:
        """One hit for each test of which `text` holds a piece, in the order of the text."""
        hits: dict[str, Hit] = {}
        lower: bytes | None = None
        for hashed in dict.fromkeys(hashed for _, _, hashed in sorted(self.runs(text))):
            for gram in self._grams[hashed]:
                if gram.test in hits:
                    continue
                if gram.literal is not None:
                    lower = text.lower() if lower is None else lower
                    if not gram.pattern.search(lower):
                        continue
                words = gram.words.decode("utf-8", "replace")
                hits[gram.test] = Hit(test=gram.test, gram=words, whole=gram.literal is not None)
        return list(hits.values())

    def runs(self, text: bytes) -> list[tuple[int, int, int]]:
        """(position, number of words, hash) of every run of words in `text` that the index holds."""
        kernel = getattr(native(), "find_grams", None) if sys.byteorder == "little" else None
        return self.reference_runs(text) if kernel is None else kernel(text, *self._looked_for)

    def reference_runs(self, text: bytes) -> list[tuple[int, int, int]]:
        """`runs` in NumPy alone."""
        words = word_hashes(text)
        found: list[tuple[int, int, int]] = []
        if not len(self._lengths) or len(words) < self._lengths[0]:
            return []
        length = int(self._lengths[0])
        hashes = _run_hashes(words, length)
        # int64: NumPy would first copy an index of another type
        places = np.flatnonzero(self._table.take((hashes >> self._shift).view(np.int64)))
        hashes = hashes[places]
        for wanted in self._lengths.tolist():
            for place in range(length, wanted):
                inside = places + place < len(words)
                places, hashes = places[inside], hashes[inside]
                hashes = hashes * _BASE + words[places + place]
            length = wanted
            known = self._hashes[np.minimum(np.searchsorted(self._hashes, hashes), len(self._hashes) - 1)] == hashes
            pairs = zip(places[known].tolist(), hashes[known].tolist(), strict=True)
            found += ((place, wanted, hashed) for place, hashed in pairs)
        return found


def _run_hashes(words: np.ndarray, length: int) -> np.ndarray:
    runs = words
    for size in range(1, length):
        runs = runs[:-1] * _BASE + words[size:]
    return runs


def _normalized(text: str) -> bytes:
    """The text in lower case, with one blank wherever it has white space inside; ASCII only, as for words."""
    return b" ".join(text.encode().lower().split())


def _words(text: bytes) -> list[bytes]:
    return _WORD.findall(text.lower())  # bytes.lower() changes ASCII only


@functools.lru_cache(maxsize=1)
def _index(benchmarks: tuple[Path, ...], config: DecontaminationConfig) -> BenchmarkIndex:
    return BenchmarkIndex(read_tests(benchmarks, config.fields), config)


@dataclass(frozen=True, kw_only=True)
class Decontamination:
    """The stage; each process reads the benchmarks once."""

    benchmarks: tuple[Path, ...]
    config: DecontaminationConfig = field(default_factory=DecontaminationConfig)
    name: str = "decontamination"

    def __call__(self, document: Document) -> Document | Dropped:
        hits = _index(self.benchmarks, self.config).hits(document.text.encode())
        if not hits:
            return document
        whole = all(hit.whole for hit in hits)
        reason = "a benchmark's string" if whole else f"{self.config.ngram} words of a benchmark"
        listed = [f"{hit.test}: {hit.gram}" for hit in hits[:_MAX_LISTED]]
        more = [f"and {len(hits) - _MAX_LISTED} more"] if len(hits) > _MAX_LISTED else []
        return document.dropped(self.name, reason, "\n".join(listed + more))


def read_hits(detail: str) -> list[tuple[str, str]]:
    """Parses a dropped row's detail: (test, words) of each hit listed; words hold no colon."""
    parts = (line.rpartition(": ") for line in detail.split("\n"))
    return [(test, gram) for test, colon, gram in parts if colon]
