"""Megatron's MMapIndexedDataset, byte for byte: tokens in `.bin`, the places of sequences and documents in `.idx`.

`.idx`, little-endian and without padding, for S sequences and D = documents + 1:

    offset        type      field
    0             9 bytes   magic "MMIDIDX" and two zero bytes
    9             uint64    version, 1
    17            uint8     dtype code: 1 uint8, 2 int8, 3 int16, 4 int32, 5 int64, 8 uint16
    18            uint64    S
    26            uint64    D
    34            int32[S]  tokens in each sequence
    34 + 4 S      int64[S]  byte offset of each sequence in `.bin`: exclusive running sum of the sizes
    34 + 12 S     int64[D]  first sequence of each document; starts with 0, ends with S

`.bin` is the tokens alone. A document usually has several sequences here: it is a repository sample, and a sequence is
one file of it. Megatron's reader checks magic and version and trusts the rest; this one checks every field at open, so
that an edited or truncated pair is an error that names the field and never a read out of bounds. Floating point (whose
codes differ between forks) and the older TNTIDX layout are refused.
"""

import mmap
import os
import shutil
import struct
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import IO, BinaryIO

import numpy as np

from megacoder.core.errors import DataError, FormatError
from megacoder.core.files import fsync_path, replacing
from megacoder.core.native import native

__all__ = ["IndexedDataset", "IndexedDatasetWriter", "bin_path", "idx_path", "rename_dataset", "token_dtype"]

_MAGIC = b"MMIDIDX\x00\x00"
_OLD_MAGIC = b"TNTIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
_CODES = {np.dtype(dtype): code for code, dtype in _DTYPES.items()}
_FLOAT_CODES = (6, 7)
_CHUNK = 1 << 20  # entries of the index that are written at a time
_CHECKED_AT_ONCE = 1 << 15  # entries of the index, as many as a core's cache holds
_CHECKING_THREADS = 4  # NumPy releases the GIL


def bin_path(prefix: Path) -> Path:
    return Path(f"{prefix}.bin")


def idx_path(prefix: Path) -> Path:
    return Path(f"{prefix}.idx")


def rename_dataset(prefix: Path, new: Path) -> None:
    """Renames a pair within its file system, replacing any pair of that name; a mixture of the two is never there."""
    idx_path(new).unlink(missing_ok=True)  # an older index must not outlive its tokens
    for path in (bin_path, idx_path):
        os.replace(path(prefix), path(new))
        fsync_path(new.parent)


def token_dtype(vocab_size: int) -> np.dtype:
    """uint16 for less than 65,500 ids and int32 from there on, as Megatron chooses."""
    return np.dtype(np.uint16 if vocab_size < 65_500 else np.int32)


class IndexedDataset:
    """Read-only view of a `.bin/.idx` pair, mapped into memory: nothing is copied, pages are read when touched.

    Raises DataError if a file is missing and FormatError, naming the field, if the pair is not consistent.
    """

    def __init__(self, prefix: Path) -> None:
        self.prefix = Path(prefix)
        if self.prefix.suffix in (".bin", ".idx") and self.prefix.exists() and not idx_path(self.prefix).exists():
            raise DataError(f"{prefix}: a dataset is named without {self.prefix.suffix}; give {prefix.with_suffix('')}")
        index = _map(idx_path(self.prefix))
        self.dtype, self.num_sequences, num_offsets = _read_header(idx_path(self.prefix), index)
        self.num_documents = num_offsets - 1
        pointers_at = _HEADER.size + 4 * self.num_sequences
        documents_at = pointers_at + 8 * self.num_sequences
        self.sequence_lengths = np.frombuffer(index, "<i4", self.num_sequences, _HEADER.size)
        """int32 (S,): tokens in each sequence"""
        self._pointers = np.frombuffer(index, "<i8", self.num_sequences, pointers_at)
        self.document_offsets = np.frombuffer(index, "<i8", num_offsets, documents_at)
        """int64 (documents + 1,): the first sequence of each document, and S at the end"""
        content = np.frombuffer(_map(bin_path(self.prefix)), np.uint8)
        self._check(len(content))
        self.tokens = content.view(self.dtype)
        """all tokens, document after document"""

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    def sequence(self, index: int) -> np.ndarray:
        """The tokens of sequence `index` in the file's dtype, a read-only view."""
        start = self._start(index)
        return self.tokens[start : start + int(self.sequence_lengths[index])]

    def document(self, index: int) -> np.ndarray:
        """The tokens of all sequences of document `index`, a read-only view."""
        sequences = self.document_sequences(index)
        return self.tokens[self._start(sequences.start) : self._start(sequences.stop)]

    def document_tokens(self, indices: np.ndarray) -> np.ndarray:
        """Tokens in each of these documents, int64."""
        last, size = self.num_sequences - 1, self.tokens.nbytes
        if last < 0:
            return np.zeros(indices.shape, dtype=np.int64)
        firsts = (self.document_offsets[indices], self.document_offsets[indices + 1])
        starts, stops = (np.where(at <= last, self._pointers[np.minimum(at, last)], size) for at in firsts)
        return (stops - starts) // self.dtype.itemsize

    def document_sequences(self, index: int) -> range:
        """The numbers of the sequences that make up document `index`."""
        if not 0 <= index < self.num_documents:
            raise IndexError(f"document {index} of {self.num_documents}")
        return range(int(self.document_offsets[index]), int(self.document_offsets[index + 1]))

    def _start(self, sequence: int) -> int:
        if sequence == self.num_sequences:
            return self.num_tokens
        if not 0 <= sequence < self.num_sequences:
            raise IndexError(f"sequence {sequence} of {self.num_sequences}")
        return int(self._pointers[sequence]) // self.dtype.itemsize

    def _check(self, bin_size: int) -> None:
        """Compares every entry with its neighbours and with the size of `.bin`; 100 million entries a second."""
        path, kernels = idx_path(self.prefix), native() if sys.byteorder == "little" else None
        if kernels is None:
            _for_each_chunk(self._check_sequences, self.num_sequences)
        else:
            lengths, pointers = self.sequence_lengths.ctypes.data, self._pointers.ctypes.data
            wrong = kernels.first_wrong_sequences(lengths, pointers, self.num_sequences, self.dtype.itemsize)
            if wrong >= 0:  # here or at the entry before; these raise the error
                self._check_sequences(max(0, wrong - 1))
                self._check_sequences(wrong)
        last = self.num_sequences - 1
        described = (
            self.dtype.itemsize * int(self.sequence_lengths[last]) + int(self._pointers[last]) if last >= 0 else 0
        )
        if described != bin_size:
            raise FormatError(
                f"{bin_path(self.prefix)}: {bin_size:,} bytes, but the index describes {described:,}; "
                "a truncated copy, or files of two datasets"
            )
        offsets = self.document_offsets
        if offsets[0] != 0 or offsets[-1] != self.num_sequences:
            raise FormatError(
                f"{path}: document offsets run from {offsets[0]} to {offsets[-1]}, expected 0 to {self.num_sequences}"
            )
        if kernels is None:
            _for_each_chunk(self._check_documents, self.num_documents)
        elif (wrong := kernels.first_falling_offsets(offsets.ctypes.data, self.num_documents)) >= 0:
            self._check_documents(wrong)

    def _check_sequences(self, start: int) -> None:
        path, lengths = idx_path(self.prefix), self.sequence_lengths[start : start + _CHECKED_AT_ONCE]
        pointers = self._pointers[start : start + _CHECKED_AT_ONCE + 1]
        if lengths.min() < 0:
            raise FormatError(f"{path}: length of sequence {start + int(lengths.argmin())} is {lengths.min()}")
        right = np.diff(pointers) == lengths[: len(pointers) - 1] * np.int64(self.dtype.itemsize)
        first_is_right = pointers[0] == 0 if start == 0 else pointers[0] >= 0  # wrapped sums stay negative for long
        if not (first_is_right and right.all()):
            wrong = start + (int(right.argmin()) + 1 if first_is_right else 0)
            raise FormatError(f"{path}: byte offset of sequence {wrong} is not the sum of the lengths before it")

    def _check_documents(self, start: int) -> None:
        window = self.document_offsets[start : start + _CHECKED_AT_ONCE + 1]
        falls = window[1:] < window[:-1]
        if falls.any():
            raise FormatError(
                f"{idx_path(self.prefix)}: document offsets fall after document {start + int(falls.argmax())}"
            )


class IndexedDatasetWriter:
    """Writes a `.bin/.idx` pair as a stream, in memory that does not grow with the data.

    A context manager: the pair gets its names when the block ends without an error, `.idx` last, so that a dataset
    whose `.idx` exists is complete.
    """

    def __init__(self, prefix: Path, *, dtype: np.dtype) -> None:
        self.prefix, self.dtype = Path(prefix), np.dtype(dtype)
        if self.dtype not in _CODES:
            raise DataError(f"dtype {self.dtype}: the format holds {', '.join(map(str, _CODES))}")
        self.num_tokens = self.num_sequences = self.num_documents = 0

    def __enter__(self) -> "IndexedDatasetWriter":
        with ExitStack() as files:
            idx = files.enter_context(replacing(idx_path(self.prefix)))
            tokens = files.enter_context(replacing(bin_path(self.prefix)))  # exited first, so renamed first
            self._idx: BinaryIO = files.enter_context(idx.open("wb"))
            self._bin: BinaryIO = files.enter_context(tokens.open("wb"))
            self._lengths: IO[bytes] = files.enter_context(tempfile.TemporaryFile(dir=self.prefix.parent))
            self._offsets: IO[bytes] = files.enter_context(tempfile.TemporaryFile(dir=self.prefix.parent))
            self._offsets.write(np.zeros(1, "<i8").tobytes())
            self._files = files.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._files.__exit__(kind, error, trace)
            return
        with self._files:
            self._write_index()
            idx_path(self.prefix).unlink(missing_ok=True)  # an older index must not outlive its tokens

    def add_document(self, sequences: Sequence[np.ndarray]) -> None:
        """Appends one document of these sequences of token ids."""
        tokens = np.concatenate(sequences) if sequences else np.empty(0, self.dtype)
        self.add_documents(tokens, [len(sequence) for sequence in sequences], [len(sequences)])

    def add_documents(
        self, tokens: np.ndarray, lengths: Sequence[int] | np.ndarray, sequences: Sequence[int] | np.ndarray
    ) -> None:
        """Appends documents: all their tokens, the length of each sequence, the sequences of each document."""
        if tokens.dtype != self.dtype and len(tokens):
            limits = np.iinfo(self.dtype)
            if tokens.min() < limits.min or tokens.max() > limits.max:
                raise DataError(f"token id {tokens.max()} does not fit {self.dtype}; the vocabulary is larger")
        sizes, counts = np.asarray(lengths, dtype=np.int64), np.asarray(sequences, dtype=np.int64)
        if sizes.sum() != len(tokens) or counts.sum() != len(sizes):
            raise ValueError("lengths must sum to the number of tokens, and sequences to the number of lengths")
        if len(sizes) and sizes.max() > np.iinfo(np.int32).max:
            raise DataError(f"a sequence of {sizes.max():,} tokens: the format allows at most 2,147,483,647")
        self._bin.write(np.ascontiguousarray(tokens, dtype=self.dtype).data)
        self._lengths.write(sizes.astype("<i4").tobytes())
        self._offsets.write((np.cumsum(counts) + self.num_sequences).astype("<i8").tobytes())
        self.num_tokens += len(tokens)
        self.num_sequences += len(sizes)
        self.num_documents += len(counts)

    def append(self, dataset: IndexedDataset) -> None:
        """Appends all documents of another dataset of the same dtype."""
        if dataset.dtype != self.dtype:
            raise DataError(f"{dataset.prefix}: tokens are {dataset.dtype}, expected {self.dtype}")
        with bin_path(dataset.prefix).open("rb") as tokens:
            shutil.copyfileobj(tokens, self._bin, 1 << 24)
        for chunk in _chunks(dataset.sequence_lengths):
            self._lengths.write(chunk.tobytes())
        for chunk in _chunks(dataset.document_offsets[1:]):
            self._offsets.write((chunk + self.num_sequences).astype("<i8").tobytes())
        self.num_tokens += dataset.num_tokens
        self.num_sequences += dataset.num_sequences
        self.num_documents += dataset.num_documents

    def _write_index(self) -> None:
        self._bin.flush()
        code = _CODES[self.dtype]
        self._idx.write(_HEADER.pack(_MAGIC, 1, code, self.num_sequences, self.num_documents + 1))
        self._lengths.seek(0)
        shutil.copyfileobj(self._lengths, self._idx, 1 << 22)
        self._lengths.seek(0)
        pointer = 0
        while chunk := self._lengths.read(4 * _CHUNK):
            ends = np.cumsum(np.frombuffer(chunk, "<i4"), dtype=np.int64) * self.dtype.itemsize + pointer
            self._idx.write(np.concatenate([[pointer], ends[:-1]]).astype("<i8").tobytes())
            pointer = int(ends[-1])
        self._offsets.seek(0)
        shutil.copyfileobj(self._offsets, self._idx, 1 << 22)
        self._idx.flush()


def _map(path: Path) -> mmap.mmap | bytes:
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size == 0:  # an empty file cannot be mapped
                return b""
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; a dataset is a .bin and an .idx of one name") from None


def _read_header(path: Path, index: mmap.mmap | bytes) -> tuple[np.dtype, int, int]:
    """(dtype, S, D), after comparing what the header says with the size of the file."""
    if index[: len(_OLD_MAGIC)] == _OLD_MAGIC:
        raise FormatError(f"{path}: the older TNTIDX layout; convert it with the tool that wrote it")
    if len(index) < _HEADER.size:
        raise FormatError(f"{path}: {len(index)} bytes, less than the header's {_HEADER.size}")
    magic, version, code, num_sequences, num_offsets = _HEADER.unpack(index[: _HEADER.size])
    if magic != _MAGIC:
        raise FormatError(f"{path}: magic {magic!r}, expected {_MAGIC!r}")
    if version != 1:
        raise FormatError(f"{path}: version {version}, expected 1")
    if code in _FLOAT_CODES:
        raise FormatError(f"{path}: dtype code {code} is floating point, which is not token data")
    if code not in _DTYPES:
        raise FormatError(f"{path}: dtype code {code}, expected one of {', '.join(map(str, _DTYPES))}")
    expected = _HEADER.size + 12 * num_sequences + 8 * num_offsets
    if num_offsets < 1 or expected != len(index):
        raise FormatError(
            f"{path}: {len(index):,} bytes, but {num_sequences:,} sequences and {num_offsets:,} document offsets "
            f"need {expected:,}"
        )
    return np.dtype(_DTYPES[code]), num_sequences, num_offsets


def _for_each_chunk(check: Callable[[int], None], length: int) -> None:
    """Calls `check` with the start of each chunk, in threads where there are many; raises the error of the first."""
    starts = range(0, length, _CHECKED_AT_ONCE)
    if len(starts) < 2 * _CHECKING_THREADS:
        deque(map(check, starts), maxlen=0)
        return
    with ThreadPoolExecutor(_CHECKING_THREADS) as threads:
        deque(threads.map(check, starts), maxlen=0)


def _chunks(array: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(array), _CHUNK):
        yield array[start : start + _CHUNK]
