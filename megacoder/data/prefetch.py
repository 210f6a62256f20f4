"""Batches made ahead in the background; their state is that of the last batch handed out, not of the last made.

Threads, not processes: nearly all the time goes to copies and to the tokenizer's native code, and a thread needs no
second copy of the tables, no pickling and no start-up. One thread serves far more tokens than a GPU trains on; several
split the streams of each batch, which changes nothing but time.
"""

import contextlib
import queue
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from megacoder.core.errors import ConfigError
from megacoder.data.stream import Batch, ResumableBatches

__all__ = ["Prefetcher"]


class Prefetcher:
    """Serves a stream's batches; as a context manager it stops its threads on leaving.

    An error in a thread reaches the consumer at the batch that it concerns, and again at every later call.
    """

    def __init__(self, stream: ResumableBatches, *, workers: int = 1, depth: int = 2) -> None:
        """Keeps up to `depth` batches ready, made by `workers` threads; with 0, each is made when it is requested."""
        if workers < 0:
            raise ConfigError(f"data_workers = {workers}: must be at least 0")
        self._stream, self._workers, self._depth = stream, workers, depth
        self._state = stream.state_dict()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def next_batch(self) -> Batch:
        if self._error is not None:
            raise self._error
        if self._workers == 0:
            batch = self._stream.next_batch()
            self._state = self._stream.state_dict()
            return batch
        if self._thread is None:
            self._start()
        batch, state, self._error = self._ready.get()
        if self._error is not None:
            raise self._error
        self._state = state
        return batch

    def state_dict(self) -> dict[str, Any]:
        """The stream's state after the last batch that `next_batch` returned."""
        return self._state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Drops what was made ahead and continues from `state`."""
        self.close()
        self._stream.load_state_dict(state)
        self._state = self._stream.state_dict()

    def close(self) -> None:
        """Stops the threads; a later `next_batch` continues after the last batch that was handed out."""
        if self._thread is not None:
            self._stop.set()
            self._thread.join()
            self._thread = None
            self._stream.load_state_dict(self._state)
        self._error = None

    def __enter__(self) -> "Prefetcher":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _start(self) -> None:
        self._ready: queue.Queue[Any] = queue.Queue(self._depth)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="prefetch", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        with contextlib.ExitStack() as stack:
            threads = None
            if self._workers > 1:  # a single worker is this thread, which would only wait for another
                threads = stack.enter_context(ThreadPoolExecutor(self._workers, thread_name_prefix="prefetch"))
            while not self._stop.is_set():
                try:
                    batch = self._stream.next_batch(threads=threads, num_threads=self._workers)
                    self._put((batch, self._stream.state_dict(), None))
                except BaseException as error:  # goes to the consumer, who raises it
                    self._put((None, None, error))
                    return

    def _put(self, item: tuple[Batch | None, dict[str, Any] | None, BaseException | None]) -> None:
        while not self._stop.is_set():
            with contextlib.suppress(queue.Full):
                self._ready.put(item, timeout=0.1)
                return
