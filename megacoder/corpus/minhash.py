"""MinHash signatures of texts, and of sets of texts: the lowest hash of the shingles under each of K hash functions.

A word is a run of ASCII letters, digits, `_` and bytes from 128 on (so UTF-8 letters stay whole), lower case in ASCII;
a shingle is `ngram` words in a row, or all words where there are fewer. A shingle is hashed to two 32-bit numbers, and
hash function i gives low + i high + q_i modulo 2^32. The functions are pairwise independent, as the error of the
estimate requires, at the cost of an addition each; the fixed random q_i keep a shingle with a small `high` from being
the lowest for many i in a row.

The share of equal places in two signatures of K hashes estimates the Jaccard similarity J of the shingle sets with a
standard error of sqrt(J (1 - J) / K). The signature of a union is the elementwise minimum: a repository's signature
costs nothing beyond those of its files, and depends neither on their order nor on how they are joined.

`signatures` uses the kernel of csrc/cpp/minhash.inc where it is built; the NumPy path below defines it, bit for bit.
"""

import functools
import sys
from collections.abc import Sequence
from types import ModuleType

import numpy as np

from megacoder.core.native import native

__all__ = ["EMPTY", "HASH_MULTIPLE", "reference_signatures", "shingle_hashes", "signatures", "word_hashes"]

EMPTY = np.uint32(0xFFFFFFFF)
"""Fills the signature of a text without words; the identity of the minimum."""
HASH_MULTIPLE = 64
"""The number of hashes is a multiple of this: the kernel keeps this many minima in registers."""

_WORD_BASE, _SHINGLE_BASE = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xC2B2AE3D27D4EB4F)
_CHUNK = 512


def signatures(texts: Sequence[bytes], *, num_hashes: int, ngram: int) -> tuple[np.ndarray, np.ndarray]:
    """For N texts in UTF-8: their signatures, (N, num_hashes) uint32, and their word counts, (N,) int64."""
    kernels = _kernels()
    if kernels is None:
        return reference_signatures(texts, num_hashes=num_hashes, ngram=ngram)
    joined = np.frombuffer(b"".join(texts), np.uint8)
    offsets = np.zeros(len(texts) + 1, np.int64)
    np.cumsum([len(text) for text in texts], out=offsets[1:])
    addends = _addends(num_hashes)
    out, num_words = np.empty((len(texts), num_hashes), np.uint32), np.empty(len(texts), np.int64)
    kernels.minhash(
        joined.ctypes.data, offsets.ctypes.data, len(texts), addends.ctypes.data, num_hashes, ngram, out.ctypes.data,
        num_words.ctypes.data,
    )  # fmt: skip
    return out, num_words


def word_hashes(text: bytes) -> np.ndarray:
    """The 64-bit hashes of the words of `text`, in order."""
    kernels = _kernels()
    if kernels is None:
        return reference_word_hashes(text)
    hashes = np.empty((len(text) + 1) // 2, np.uint64)
    data = np.frombuffer(text, np.uint8)
    return hashes[: kernels.word_hashes(data.ctypes.data, len(data), hashes.ctypes.data)]


def reference_signatures(texts: Sequence[bytes], *, num_hashes: int, ngram: int) -> tuple[np.ndarray, np.ndarray]:
    """`signatures` in NumPy alone."""
    functions, addends = np.arange(num_hashes, dtype=np.uint32)[:, None], _addends(num_hashes)[:, None]
    out = np.full((len(texts), num_hashes), EMPTY)
    num_words = np.zeros(len(texts), np.int64)
    for row, text in enumerate(texts):
        words = reference_word_hashes(text)
        num_words[row] = len(words)
        shingles = shingle_hashes(words, ngram)
        low, high = shingles.astype(np.uint32), (shingles >> np.uint64(32)).astype(np.uint32)
        for start in range(0, len(shingles), _CHUNK):  # (K, chunk) fits a cache
            part = slice(start, start + _CHUNK)
            np.minimum(out[row], (low[part] + functions * high[part] + addends).min(axis=1), out=out[row])
    return out, num_words


def shingle_hashes(words: np.ndarray, ngram: int) -> np.ndarray:
    """Those of the shingles in order, repeats included, from those of the words: as a polynomial, mixed."""
    length = min(len(words), ngram)
    if length == 0:
        return np.zeros(0, np.uint64)
    count = len(words) - length + 1
    hashes = np.zeros(count, np.uint64)
    for place in range(length):
        hashes = hashes * _SHINGLE_BASE + words[place : place + count]
    return _mix64(hashes)


def reference_word_hashes(text: bytes) -> np.ndarray:
    """`word_hashes` in NumPy alone: a word is hashed eight bytes at a time, the last eight padded with zeros."""
    folded = _fold()[np.frombuffer(text, np.uint8)]
    edges = np.flatnonzero(np.diff(folded != 0, prepend=False, append=False))
    starts, left = edges[::2], np.diff(edges)[::2]
    padded = np.concatenate([folded, np.zeros(8, np.uint8)])
    eights = np.ndarray((len(folded) + 1,), "<u8", padded, strides=(1,))  # the eight bytes from each place on
    hashes = np.zeros(len(starts), np.uint64)
    active = np.arange(len(starts))
    while len(active):
        shift = np.uint64(64) - np.uint64(8) * np.minimum(left[active], 8).astype(np.uint64)
        hashed = (hashes[active] ^ (eights[starts[active]] << shift)) * _WORD_BASE
        hashes[active] = hashed ^ (hashed >> np.uint64(32))
        active = active[left[active] > 8]
        starts[active] += 8
        left[active] -= 8
    return hashes


def _mix64(hashes: np.ndarray) -> np.ndarray:
    """The finalizer of MurmurHash3: every input bit affects about half of the output bits."""
    hashes = (hashes ^ (hashes >> np.uint64(33))) * np.uint64(0xFF51AFD7ED558CCD)
    hashes = (hashes ^ (hashes >> np.uint64(33))) * np.uint64(0xC4CEB9FE1A85EC53)
    return hashes ^ (hashes >> np.uint64(33))


@functools.cache
def _addends(num_hashes: int) -> np.ndarray:
    """q_i, (K,) uint32: fixed forever, so that signatures of different runs can be compared."""
    counters = np.arange(1, num_hashes + 1, dtype=np.uint64) * _WORD_BASE
    return (_mix64(counters) >> np.uint64(32)).astype(np.uint32)


@functools.cache
def _fold() -> np.ndarray:
    """(256,) uint8: a byte of a word in lower case, 0 for a byte between words."""
    table = np.zeros(256, np.uint8)
    for byte in range(256):
        if byte >= 128 or chr(byte).isalnum() or byte == ord("_"):
            table[byte] = ord(chr(byte).lower()) if byte < 128 else byte
    return table


def _kernels() -> ModuleType | None:
    return native() if sys.byteorder == "little" else None
