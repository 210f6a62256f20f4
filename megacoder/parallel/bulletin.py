"""What ranks leave for each other in their rendezvous store: a record each, and why the run ended.

Nothing here hangs. torch's store waits forever for an answer lost in a cut network, so every use of it runs in a
thread, with a time-out after which the caller continues without the answer.
"""

import contextlib
import json
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Generic, TypeVar

import torch.distributed as dist

from megacoder.parallel.blame import Record
from megacoder.parallel.world import connect_store

__all__ = ["Answer", "Bulletin", "End", "Looks"]

T = TypeVar("T")

Looks = tuple[dict[int, Record], dict[int, Record]]
"""All ranks' records, and again a while later."""


class Answer(Generic[T]):
    """What `work` returns, which runs in a thread of its own, and may hang."""

    def __init__(self, work: Callable[[], T]) -> None:
        self._work = work
        self._answers: list[T] = []
        self._thread = threading.Thread(target=self._run, name="answer", daemon=True)
        self._thread.start()

    def within(self, seconds: float) -> T | None:
        """None if it did not come in time, or failed with a RuntimeError."""
        self._thread.join(seconds)
        return self._answers[0] if self._answers else None

    def _run(self) -> None:
        with contextlib.suppress(RuntimeError):
            self._answers.append(self._work())


@dataclass(frozen=True, kw_only=True)
class End:
    """Why the run ended, as one rank found and announced it."""

    line: str
    host: str
    """host of the rank that announced it, which prints the line"""
    silent: list[tuple[str, int]]
    """(host, pid) of ranks that did not answer"""
    code: int
    """exit code of every rank"""


class Bulletin:
    """One rank's access to the store; call `connect` first, which may take as long as the network does."""

    def __init__(self, num_ranks: int, attempt: str) -> None:
        self._attempt = attempt
        self._keys = {rank: f"rank/{rank}" for rank in range(num_ranks)}
        self._store: dist.Store | None = None
        self._connected = threading.Event()

    def connect(self, timeout_seconds: float) -> None:
        """Raises RuntimeError where the store does not answer."""
        if self._store is None:
            self._store = connect_store(self._attempt, timeout_seconds)
            self._connected.set()

    def publish(self, record: Record) -> None:
        self._connection().set(self._keys[record.rank], json.dumps(asdict(record)))

    def records(self) -> dict[int, Record]:
        """The newest record of each rank that has published one."""
        store, keys = self._connection(), list(self._keys.values())
        if not store.check(keys):
            keys = [key for key in keys if store.check([key])]
        records = [Record(**json.loads(value)) for value in store.multi_get(keys)] if keys else []
        return {record.rank: record for record in records}

    def announced(self) -> End | None:
        store = self._connection()
        return _decode(store.get("end")) if store.check(["end"]) else None

    def announce(self, end: End) -> End:
        """The announcement that counts: this one, unless another came first."""
        return _decode(self._connection().compare_set("end", "", json.dumps(asdict(end))))

    def claim(self, host: str) -> bool:
        """Whether this rank is the first of `host` to ask; it then prints the announcement there."""
        return self._connection().add(f"claimed/{host}", 1) == 1

    def two_looks(self, seconds: float) -> Looks:
        """All records now, and again `seconds` later, or sooner if the end is announced meanwhile."""
        before, deadline = self.records(), time.monotonic() + seconds
        while time.monotonic() < deadline and self.announced() is None:
            time.sleep(0.1)
        return before, self.records()

    def ask(self, question: Callable[[], T], *, seconds: float) -> T | None:
        """The answer of `question`, which uses this bulletin; None if it did not come in time, or the store failed."""

        def once_connected() -> T:
            self._connected.wait()
            return question()

        return Answer(once_connected).within(seconds)

    def _connection(self) -> dist.Store:
        assert self._store is not None, "connect first"
        return self._store


def _decode(value: bytes) -> End:
    table = json.loads(value)
    silent = [(host, pid) for host, pid in table["silent"]]
    return End(line=table["line"], host=table["host"], silent=silent, code=table["code"])
