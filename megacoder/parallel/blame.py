"""Which rank stopped a run, from what all ranks last reported about themselves: a pure function.

Every rank writes a Record to the store at regular intervals (see `megacoder.parallel.watch`). A rank whose collective
failed or timed out reads all records twice. A rank whose record did not change in between is dead, stopped or
unreachable: that is the strongest evidence. If all still answer, the culprit is a rank that is not waiting itself; of
those, the one that has been still longest is named. If all wait, they wait for each other, and the rank furthest behind
is named.
"""

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["Loss", "Record", "find_loss"]

STUCK_SECONDS = 1.0
"""A rank that moved more recently than this is not the one that the others waited for."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """One rank at one moment; plain values, so that it travels as JSON."""

    rank: int
    host: str
    pid: int
    beat: int
    """grows with every record"""
    time: float
    """when it was written, in seconds of the rank's own clock since 1970"""
    step: int | None
    microbatch: int | None
    moves: int
    """grows with everything that the main thread does"""
    place: str
    """such as 'step 5, microbatch 2, forward'"""
    operation: str | None
    """the last collective, send or receive"""
    waiting: bool
    """whether it is waiting in that operation"""
    still_seconds: float
    """since the main thread last moved"""
    where: str
    """the line of Python that the main thread was at, such as 'reader.py:44 in next_batch'; may be empty"""
    finished: bool = False
    """whether it has left the run successfully"""

    def name(self) -> str:
        return f"rank {self.rank} (host {self.host}, pid {self.pid})"

    def doing(self) -> str:
        """Where the rank was, with the operation that it waited in or had begun last."""
        if self.waiting:
            return f"{self.place}, waiting in {self.operation}"
        line = f" ({self.where})" if self.where else ""
        return f"{self.place}{line}, last operation {self.operation or 'none'}"


@dataclass(frozen=True)
class Loss:
    """The result of `find_loss`."""

    line: str
    """for people"""
    silent: tuple[Record, ...] = ()
    """ranks that do not answer, as they were last seen"""


def find_loss(
    own: Record, failure: str, before: Mapping[int, Record], after: Mapping[int, Record], *, size: int, now: float
) -> Loss:
    """What rank `own` reports after `failure`, from two readings of the records of the run's `size` ranks.

    `now` is on this rank's clock; the time since a rank on another host last answered is right if the clocks agree.
    """
    own_part = f"rank {own.rank} at {own.place}: {failure}"
    others = [after[rank] for rank in sorted(after) if rank != own.rank and not after[rank].finished]
    unseen = [rank for rank in range(size) if rank not in after and rank != own.rank]
    silent = tuple(record for record in others if record.rank in before and before[record.rank].beat == record.beat)
    if silent:
        first, more = silent[0], len(silent) + len(unseen) - 1
        also = f" (nor {more} more of the {size} ranks)" if more else ""
        return Loss(
            f"{first.name()} has not answered for {max(0.0, now - first.time):.0f} s{also}; last seen in "
            f"{first.doing()}; {own_part}",
            silent,
        )
    if unseen:
        more = len(unseen) - 1
        also = f" (nor {more} more of the {size} ranks)" if more else ""
        return Loss(f"rank {unseen[0]} has not answered since the run began{also}; {own_part}")
    working = [record for record in others if not record.waiting]
    if working:
        stuck = max(working, key=lambda record: record.still_seconds)
        if stuck.still_seconds < STUCK_SECONDS:
            return Loss(f"{own_part}; all other ranks answer and are running")
        return Loss(f"{stuck.name()} has been stuck for {stuck.still_seconds:.0f} s in {stuck.doing()}; {own_part}")
    if others:
        last = min(others, key=_progress)
        return Loss(f"all ranks wait for each other; furthest behind is {last.name()} in {last.doing()}; {own_part}")
    return Loss(own_part)


def _progress(record: Record) -> tuple[int, int, int]:
    return (record.step or 0, -1 if record.microbatch is None else record.microbatch, record.moves)
