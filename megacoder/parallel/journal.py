"""What a rank is doing, recorded cheaply enough to be always on: for the line that says why a run ended.

A `Journal` is one rank's: the step and microbatch that the loop or the pipeline runner is at, and the collective, send
or receive that it began last. Only the rank's main thread writes it, by plain assignments; `megacoder.parallel.watch`
reads it from another thread, which may see a microbatch with the activity of the one before; that is harmless.

How collectives find it: torch's process groups allow no attributes, so `megacoder.parallel.collectives` keeps a
`GroupNote` beside each group, in a dictionary with weak keys. Every group of a process leads to the journal of the
default group's World. So no collective has to be given a journal, and no caller can forget it. A process alone has no
group: there the pipeline runner is given the journal of its World.

To learn how long a rank spends on what, as a profile does, register as the journal's `Listener`. Without a listener,
a note costs one check more.
"""

from types import TracebackType
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from megacoder.core.errors import RankLost
from megacoder.parallel.shared_memory import SharedMemory

__all__ = ["CHECKPOINT", "DATA", "UPDATE", "GroupNote", "Journal", "Listener", "Operation"]

CHECKPOINT = "checkpoint"
"""An activity in which a rank may wait for other ranks' files, with a separate time-out."""
DATA, UPDATE = "reading data", "update"
"""Activities at the two ends of a step; those between are the schedule's (see `megacoder.parallel.pipeline`)."""


class Listener(Protocol):
    """Is called at every note, by the thread that makes it."""

    def at(self, activity: str) -> None:
        """The rank turns to `activity`."""

    def entered(self, operation: str) -> None:
        """Within an activity, the rank begins a collective, send or receive of that name, or waits for one."""

    def left(self) -> None:
        """The rank continues with the activity."""


class Journal:
    """What one rank is doing."""

    __slots__ = ("activity", "listener", "microbatch", "moves", "operation", "step", "stop_asked", "waiting")

    def __init__(self) -> None:
        self.activity = "starting"
        self.step: int | None = None
        self.microbatch: int | None = None
        """the last one begun in this step, counted from 0"""
        self.operation: Operation | None = None
        """the last collective, send or receive that was begun"""
        self.waiting = False
        """whether the rank is in that operation now; stays true if it failed"""
        self.moves = 0
        """grows with every note, so that a reader sees whether the rank moves"""
        self.stop_asked = False
        """whether a signal has asked the run to stop"""
        self.listener: Listener | None = None

    def begin_step(self, step: int) -> None:
        """Notes the step under way, from 1; its microbatches are yet to come."""
        self.step, self.microbatch = step, None
        self.moves += 1

    def at(self, activity: str, microbatch: int | None = None) -> None:
        """Notes the activity that the rank begins; without `microbatch` the last one stays."""
        self.activity = activity
        if microbatch is not None:
            self.microbatch = microbatch
        self.moves += 1
        if self.listener is not None:
            self.listener.at(activity)

    def place(self) -> str:
        """Such as 'step 5, microbatch 2, forward'."""
        step = "" if self.step is None else f"step {self.step}, "
        microbatch = "" if self.microbatch is None else f"microbatch {self.microbatch}, "
        return f"{step}{microbatch}{self.activity}"


class GroupNote:
    """What is kept for each process group: the journal of its operations, its ranks, its backend and shared memory."""

    __slots__ = ("backend", "journal", "memory", "ranks")

    def __init__(self, journal: Journal, ranks: tuple[int, ...], backend: str) -> None:
        self.journal, self.ranks, self.backend = journal, ranks, backend
        self.memory: SharedMemory | None = None


class Operation:
    """One use of the network; a context manager around each call that may wait for other ranks.

    Costs less than a microsecond, and keeps no tensor alive. A network failure is raised as RankLost.
    """

    __slots__ = ("_dtype", "_name", "_note", "_num_elements", "_peer")

    def __init__(self, name: str, tensor: Tensor | None, note: GroupNote, peer: int | None = None) -> None:
        """`peer` is the other rank of a send or receive, by its index in the group."""
        self._name, self._note, self._peer = name, note, peer
        self._num_elements: int | None = None
        self._dtype: torch.dtype | None = None
        if tensor is not None:
            self._num_elements, self._dtype = tensor.numel(), tensor.dtype

    def __enter__(self) -> None:
        journal = self._note.journal
        journal.operation, journal.waiting = self, True
        journal.moves += 1
        if journal.listener is not None:
            journal.listener.entered(self._name)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            journal = self._note.journal
            journal.waiting = False
            journal.moves += 1
            if journal.listener is not None:
                journal.listener.left()
        elif _is_of_the_network(error):
            raise RankLost(f"{self} failed: {_first_line(error)}") from error

    def __str__(self) -> str:
        """Such as 'reduce-scatter of 3,145,728 float32 over ranks 0, 4' or 'receive of 64 float32 from rank 2'."""
        size = "" if self._num_elements is None else f" of {self._num_elements:,} {str(self._dtype).split('.')[-1]}"
        ranks = self._note.ranks
        if self._peer is not None:
            return f"{self._name}{size} {'to' if self._name == 'send' else 'from'} rank {ranks[self._peer]}"
        if len(ranks) > 8:
            return f"{self._name}{size} over {len(ranks)} ranks, {ranks[0]} to {ranks[-1]}"
        return f"{self._name}{size} over ranks {', '.join(map(str, ranks))}"


def _is_of_the_network(error: BaseException) -> bool:
    """Whether the error means a lost rank or network rather than a wrong call; gloo raises plain RuntimeErrors."""
    if isinstance(error, dist.DistError | ConnectionError | TimeoutError):
        return True
    return isinstance(error, RuntimeError) and "gloo/transport" in str(error)


def _first_line(error: BaseException) -> str:
    """torch's message, without the source file before it and the advice after it."""
    text = str(error).partition("\n")[0].strip()
    if text.startswith("["):
        text = text.partition("] ")[2] or text
    return text.partition(". This is typically")[0].rstrip(".")
