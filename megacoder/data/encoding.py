"""Documents to ids on many cores, in order, with a bounded number of pieces in memory.

Processes rather than the tokenizer's own threads: equal on two cores, but every piece's ids pass through Python on
their way into an array, under one lock in a single process. Workers import this module and nothing heavier.
"""

import functools
import itertools
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megacoder.core.errors import DataError
from megacoder.core.processes import starting_workers
from megacoder.data.indexed import token_dtype
from megacoder.data.tokenizer import Tokenizer

__all__ = ["Encoded", "Piece", "TokenizerFile", "encode_in_order"]

_PIECES_PER_WORKER = 3  # one being encoded, the others waiting, so that no worker does


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Consecutive documents of one input file."""

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
    """ids of all files, EOS behind the last one of each document"""
    lengths: list[int]
    """ids in each file"""
    sequences: list[int]
    """files in each document"""
    text_bytes: int
    """size of the texts in UTF-8"""


@dataclass(frozen=True, kw_only=True)
class TokenizerFile:
    """Where workers load the tokenizer from."""

    path: Path
    """tokenizer folder"""
    digest: str
    """which one it must be: the file may be replaced while others still use it"""


@contextmanager
def encode_in_order(
    pieces: Iterator[Piece], tokenizer: TokenizerFile, *, workers: int
) -> Iterator[Iterator[tuple[Piece, Encoded]]]:
    """Yields an iterator over the pieces with their ids, in the order of `pieces`.

    One worker means this process. Raises DataError where a worker was killed.
    """
    if workers == 1:
        yield ((piece, _encode(tokenizer, piece)) for piece in pieces)
        return
    context = multiprocessing.get_context("spawn")  # a fork would copy the locks of running native threads
    executor = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker)
    try:
        yield _results(executor, pieces, tokenizer, ahead=workers * _PIECES_PER_WORKER)
    except BrokenProcessPool:
        raise DataError(
            "an encoding process was killed, most often for lack of memory; the same command goes on, "
            f"with fewer than {workers} --workers if it happens again"
        ) from None
    finally:
        executor.shutdown(cancel_futures=True)


def _results(
    executor: ProcessPoolExecutor, pieces: Iterator[Piece], tokenizer: TokenizerFile, *, ahead: int
) -> Iterator[tuple[Piece, Encoded]]:
    pending: deque[tuple[Piece, Future[Encoded]]] = deque()
    for piece in pieces:
        with starting_workers():
            pending.append((piece, executor.submit(_encode, tokenizer, piece)))
        if len(pending) > ahead:
            first, future = pending.popleft()
            yield first, future.result()
    for first, future in pending:
        yield first, future.result()


def _start_worker() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends its workers
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    """A worker whose parent was killed would wait for work for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


@functools.cache
def _load(file: TokenizerFile) -> Tokenizer:
    tokenizer = Tokenizer.load(file.path)
    if tokenizer.digest != file.digest:
        raise DataError(f"{file.path}: the tokenizer changed while it was in use")
    return tokenizer


def _encode(file: TokenizerFile, piece: Piece) -> Encoded:
    tokenizer = _load(file)
    dtype = token_dtype(tokenizer.vocab_size)
    texts = [text for document in piece.documents for text in document]
    sequences = [len(document) for document in piece.documents]
    ids = tokenizer.encode_batch(texts)
    for last in itertools.accumulate(sequences):
        ids[last - 1].append(tokenizer.eos_id)
    return Encoded(
        tokens=np.concatenate([np.empty(0, dtype), *(np.array(sequence, dtype) for sequence in ids)]),
        lengths=[len(sequence) for sequence in ids],
        sequences=sequences,
        text_bytes=sum(len(text.encode()) for text in texts),
    )
