"""Many texts to ids: `tokenizers`, the reference that is always there, or the optional `fastokens`, six times as fast.

fastokens is young, and ids that are wrong once in a million texts train a model on noise without any error. So it is
used only where it has just given the reference's ids for this very tokenizer: on code points of every block, alone
and in context, every token of the vocabulary, control tokens spelled out, and long runs. Otherwise the reference is
used, and one line says why.
"""

import importlib
import importlib.util
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal, Protocol

import numpy as np

from megacoder.core.console import say
from megacoder.core.errors import ConfigError
from megacoder.data.control_tokens import SPECIAL_TOKENS
from megacoder.data.cutting_places import CuttingPlaces
from megacoder.data.tokenizer import Tokenizer

__all__ = ["BatchEncoder", "EncoderName", "fast_encoder", "reference_encoder"]

EncoderName = Literal["auto", "fastokens", "tokenizers"]

_THREADS = "FASTOKENS_BPE_THREADS"  # read once, when fastokens starts to encode
_REFERENCE_CHARACTERS = 1 << 22  # that the reference encodes at once, at 260 bytes of memory each

_Encoded = tuple[np.ndarray, np.ndarray]  # as a BatchEncoder returns


class BatchEncoder(Protocol):
    """Encodes texts, taken literally, without control ids."""

    def __call__(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """(uint32 ids of all texts one after another, int64 number of ids of each text)"""


def fast_encoder(asked: EncoderName, tokenizer: Tokenizer, *, threads: int) -> BatchEncoder | None:
    """fastokens, if requested or installed and if it gives the ids of `tokenizer`; None where the reference is used.

    `threads` is how many it may use in this process, if it has not encoded in it yet. Raises ConfigError where it is
    requested by name and cannot be used.
    """
    if asked == "tokenizers":
        return None
    os.environ[_THREADS] = str(threads)
    try:
        return _checked_fastokens(tokenizer)
    except _CannotServe as error:
        if asked == "fastokens":
            raise ConfigError(f"encoder = 'fastokens': {error}") from None
        say(f"encoding with tokenizers: {error}")
        return None


def reference_encoder(tokenizer: Tokenizer) -> BatchEncoder:
    """tokenizers, in its own threads unless TOKENIZERS_PARALLELISM=false."""

    def encode(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        ids = [np.array(one, np.uint32) for batch in _batches(texts) for one in tokenizer.encode_batch(batch)]
        return np.concatenate([np.empty(0, np.uint32), *ids]), np.fromiter(map(len, ids), np.int64, len(ids))

    return _cutting(encode, tokenizer)


def _batches(texts: Sequence[str]) -> Iterator[Sequence[str]]:
    """`texts` in stretches of about `_REFERENCE_CHARACTERS`."""
    start = gathered = 0
    for stop, text in enumerate(texts, start=1):
        gathered += len(text)
        if gathered >= _REFERENCE_CHARACTERS or stop == len(texts):
            yield texts[start:stop]
            start, gathered = stop, 0


def _cutting(encode: BatchEncoder, tokenizer: Tokenizer) -> BatchEncoder:
    places = CuttingPlaces(tokenizer)

    def encode_cut(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        pieces = [places.cut(text) for text in texts]
        if len(texts) == sum(map(len, pieces)):
            return encode(texts)
        ids, counts = encode([piece for of_text in pieces for piece in of_text])
        firsts = np.cumsum([0, *map(len, pieces[:-1])])  # every text has a piece, as `reduceat` requires
        return ids, np.add.reduceat(counts, firsts)

    return encode_cut


class _CannotServe(Exception):
    """Why fastokens cannot be used."""


def _checked_fastokens(tokenizer: Tokenizer) -> BatchEncoder:
    if importlib.util.find_spec("fastokens") is None:
        raise _CannotServe("fastokens, six times as fast, is not installed (pip install 'megacoder[fast]')")
    reference, texts = reference_encoder(tokenizer), _check_texts(tokenizer)
    try:
        with ThreadPoolExecutor(1) as thread:  # neither holds the GIL
            building = thread.submit(_fastokens, tokenizer)
            expected = reference(texts)
            encode = building.result()
        different = _first_difference(encode(texts), expected, texts)
    except BaseException as error:
        if not (isinstance(error, Exception) or _is_fastokens_own(error)):  # another version may raise anything
            raise
        raise _CannotServe(f"fastokens does not accept this tokenizer ({error})") from None
    if different is not None:
        raise _CannotServe(f"fastokens gives different ids for {different!r}")
    return _or_else(encode, reference)


def _or_else(encode: BatchEncoder, reference: BatchEncoder) -> BatchEncoder:
    """`encode`, or `reference` for texts on which it fails: its regular expressions have limits of their own."""

    def encode_either(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        try:
            return encode(texts)
        except BaseException as error:
            if not _is_fastokens_own(error):
                raise
        if len(texts) == 1:
            return reference(texts)
        ids, counts = zip(*(encode_either([text]) for text in texts), strict=True)  # most do not fail
        return np.concatenate(ids), np.concatenate(counts)

    return encode_either


def _is_fastokens_own(error: BaseException) -> bool:
    """Whether `error` is how fastokens says that it cannot encode.

    It raises ValueError and, where its Rust code panics, PyO3's PanicException. That derives directly from
    BaseException, and each extension module has a class of its own that it does not export: only the name tells.
    """
    return isinstance(error, ValueError) or type(error).__module__ == "pyo3_runtime"


def _fastokens(tokenizer: Tokenizer) -> BatchEncoder:
    backend = importlib.import_module("fastokens").Tokenizer.from_json_str(tokenizer.definition)

    def encode(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        ids, offsets = backend.encode_batch_flat([*map(tokenizer.spelled, texts)], split_special_tokens=True)
        return np.frombuffer(ids, "<u4"), np.diff(np.frombuffer(offsets, "<u8").astype(np.int64))

    return _cutting(encode, tokenizer)


def _first_difference(found: _Encoded, reference: _Encoded, texts: Sequence[str]) -> str | None:
    """The first of `texts` that the two have encoded differently, its first 40 characters."""
    (ids, counts), (expected, expected_counts) = found, reference
    if np.array_equal(counts, expected_counts) and np.array_equal(ids, expected):
        return None
    same = [np.array_equal(*pair) for pair in zip(_apart(ids, counts), _apart(expected, expected_counts), strict=True)]
    return texts[same.index(False)][:40]


def _apart(ids: np.ndarray, counts: np.ndarray) -> list[np.ndarray]:
    return np.split(ids, np.cumsum(counts)[:-1])


def _check_texts(tokenizer: Tokenizer) -> list[str]:
    """Less than half a megabyte that exercises every rule of the splits and every token; takes a third of a second."""
    beyond = range(0x10000, 0x30000, 4)  # there, each block has characters of one kind
    every = "".join(map(chr, (*range(0xD800), *range(0xE000, 0x10000), *beyond, *range(0xE0000, 0xE0200))))
    marks = map(chr, (*range(0x300), *range(0x300, 0x3000, 8)))
    in_context = "".join(f"{mark}a {mark}1 .{mark}\n" for mark in marks)
    tokens = [token.decode(errors="ignore") for token in tokenizer.token_bytes]
    apart = "".join(token if token.startswith(" ") else f"\n{token}" for token in tokens)
    runs = [mark * 3000 for mark in ("a", " ", "=", "\x00", "0", "\r\n", "ab1", "中", "é", "\t x", "().")]
    names = {*SPECIAL_TOKENS.values(), *tokenizer.control_texts.values()}
    controls = [f"{left}{control}{right}" for control in sorted(names) for left in "a " for right in "1\n"]
    return [*_slices(every), *_slices(in_context), *_slices(apart), *runs, *controls]


def _slices(text: str) -> list[str]:
    return [text[start : start + 20_000] for start in range(0, len(text), 20_000)]
