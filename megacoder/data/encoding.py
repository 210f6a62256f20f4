"""Documents to ids on many cores, in order, with a bounded number of pieces in memory.

fastokens works in threads of its own, without the GIL, and returns arrays: it takes one process, which reads the next
pieces meanwhile. The reference's ids pass through Python as lists, under the GIL: it takes several processes. Workers
import this module and nothing heavier.
"""

import functools
import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megacoder.core.errors import DataError
from megacoder.core.processes import begin_worker, starting_workers
from megacoder.data.encoders import BatchEncoder, reference_encoder
from megacoder.data.indexed import token_dtype
from megacoder.data.tokenizer import Tokenizer

__all__ = ["Encoded", "Piece", "encode_in_order"]

_PIECES_PER_WORKER = 3  # one being encoded, the others queued, so that no worker waits
_THREADS_THAT_ASK = 2  # fastokens begins the next piece while it finishes the last texts of one


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Consecutive documents of one input file."""

    path: Path
    """the input file"""
    documents: list[list[str]]
    """texts of the files of each document"""
    read: float
    """bytes of the input file read up to the end of the piece"""
    ends_file: bool
    """whether this is the file's last piece"""


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """A piece as IndexedDatasetWriter.add_documents takes it."""

    tokens: np.ndarray
    """ids of all files, EOS after the last file of each document that has any"""
    lengths: np.ndarray
    """int64: ids in each file"""
    sequences: list[int]
    """files in each document; none of one without ids, as in Megatron: EOS alone would teach a model to end at once"""
    text_bytes: int
    """size of the texts in UTF-8"""


@contextmanager
def encode_in_order(
    pieces: Iterator[Piece], tokenizer: Tokenizer, *, folder: Path, workers: int, fast: BatchEncoder | None
) -> Iterator[Iterator[tuple[Piece, Encoded]]]:
    """Yields an iterator over the pieces with their ids, in the order of `pieces`.

    `fast` is an encoder with threads of its own; without one the reference is used, in `workers` processes that load
    the tokenizer from `folder`, or in this process if `workers` is 1. Raises DataError where a worker was killed.
    """
    if fast is not None:
        with ThreadPoolExecutor(_THREADS_THAT_ASK) as threads:
            yield _results(threads, pieces, functools.partial(_encode, tokenizer, fast), ahead=_THREADS_THAT_ASK + 1)
        return
    if workers == 1:
        encode = reference_encoder(tokenizer)
        yield ((piece, _encode(tokenizer, encode, piece)) for piece in pieces)
        return
    context = multiprocessing.get_context("spawn")  # a fork would copy the locks of running native threads
    executor = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker)
    in_worker = functools.partial(_encode_in_worker, folder, tokenizer.digest)
    try:
        yield _results(executor, pieces, in_worker, ahead=workers * _PIECES_PER_WORKER)
    except BrokenProcessPool:
        raise DataError(
            "an encoding process was killed, most often for lack of memory; run the same command to resume, "
            f"with fewer than {workers} --workers if it happens again"
        ) from None
    finally:
        executor.shutdown(cancel_futures=True)


def _results(
    executor: Executor, pieces: Iterator[Piece], encode: Callable[[Piece], Encoded], *, ahead: int
) -> Iterator[tuple[Piece, Encoded]]:
    pending: deque[tuple[Piece, Future[Encoded]]] = deque()
    failure: Exception | None = None
    while True:
        try:
            piece = next(pieces, None)
        except (DataError, OSError) as error:  # pieces read before it are complete and must not be lost
            failure = error
            break
        if piece is None:
            break
        with starting_workers():
            pending.append((piece, executor.submit(encode, piece)))
        if len(pending) > ahead:
            first, future = pending.popleft()
            yield first, future.result()
    for first, future in pending:
        yield first, future.result()
    if failure is not None:
        raise failure


def _start_worker() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    begin_worker()


@functools.cache
def _load(folder: Path, digest: str) -> tuple[Tokenizer, BatchEncoder]:
    """The tokenizer, which must have this digest: the file may be replaced while other processes still use it."""
    tokenizer = Tokenizer.load(folder)
    if tokenizer.digest != digest:
        raise DataError(f"{folder}: the tokenizer changed while it was in use")
    return tokenizer, reference_encoder(tokenizer)


def _encode_in_worker(folder: Path, digest: str, piece: Piece) -> Encoded:
    return _encode(*_load(folder, digest), piece)


def _encode(tokenizer: Tokenizer, encode: BatchEncoder, piece: Piece) -> Encoded:
    sequences = [len(document) for document in piece.documents]
    texts = [text for document in piece.documents for text in document]
    try:
        ids, lengths = encode(texts)
    except DataError as error:
        raise DataError(f"{piece.path}: {error}") from None
    if sequences:
        counts = np.array(sequences, dtype=np.int64)
        stops = np.cumsum(counts)
        filled = np.add.reduceat(lengths, stops - counts) > 0  # documents with ids
        last = stops[filled] - 1  # the last file of each
        ids = np.insert(ids, np.cumsum(lengths)[last], tokenizer.eos_id)
        lengths[last] += 1
        lengths, sequences = lengths[np.repeat(filled, counts)], np.where(filled, counts, 0).tolist()
    return Encoded(
        tokens=ids.astype(token_dtype(tokenizer.vocab_size)),
        lengths=lengths,
        sequences=sequences,
        text_bytes=sum(len(text) if text.isascii() else len(text.encode()) for text in texts),
    )
