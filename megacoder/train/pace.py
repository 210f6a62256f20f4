"""Finds ranks that compute more slowly than others, as one on a throttled GPU, and those that wait for data: in a step
all wait for the slowest.

Of every `MEASURED_EVERY`-th step each rank takes the time from its beginning to its last backward, less what it has
waited for others. On a GPU both are marks in the stream, which cost microseconds and wait for nothing: they are read
after the loss has been, when the stream has passed them. How long it has waited for its batch is the host's time. Each
rank's seconds travel with the loss of the step after, so that no collective is added. Only some steps are measured
since tensor parallelism has thousands of collectives.

A rank is compared with those that hold the same pipeline stages: others have other work.
"""

import math
import statistics
import time
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, Protocol

from megacoder.core.timing import Timer, timer_for
from megacoder.parallel.mesh import Mesh
from megacoder.parallel.world import gather_json

__all__ = [
    "DATA_SECONDS", "MEASURED_EVERY", "NO_PACE", "SLOWEST_RANK", "SLOWEST_RATIO", "ComputeClock", "Pace", "StepPace",
]  # fmt: skip

MEASURED_EVERY = 10
"""Steps from one that is measured to the next."""
SLOW, IN_A_ROW = 1.2, 3
"""A rank whose time is so many times its peers' median, in so many measured steps in a row, is named."""
SLOWEST_RANK, SLOWEST_RATIO = "slowest_rank", "slowest_rank_ratio"
"""In a line of metrics after a measured step: the rank with the largest ratio to its peers' median, and that ratio."""
DATA_SECONDS = "data_seconds"
"""In such a line, too: how long the rank that waited longest for its batch did so."""
WAITING = 0.05
"""A share of the step; if ranks wait longer for data in `IN_A_ROW` measured steps, a line says so."""


class StepPace(Protocol):
    """What a step calls as it goes on."""

    def begin(self, step: int) -> None:
        """The step begins."""

    def got_data(self) -> None:
        """This rank has its batch."""

    def computed(self) -> None:
        """Its last backward is done, as far as this rank is concerned."""

    def report(self) -> list[float]:
        """To be summed over ranks with the loss: every rank's seconds of the step before, if that was measured."""

    def read(self) -> None:
        """The device has passed what `computed` marked."""


class _NoPace:
    def begin(self, step: int) -> None:
        pass

    def got_data(self) -> None:
        pass

    def computed(self) -> None:
        pass

    def report(self) -> list[float]:
        return []

    def read(self) -> None:
        pass


NO_PACE: StepPace = _NoPace()
"""Measures no step."""


class ComputeClock:
    """A listener of the journal: the time of one rank, less what it spends in collectives, sends and receives."""

    def __init__(self, timer: Timer) -> None:
        self._timer = timer
        self._marks: list[Any] = []

    def begin(self) -> None:
        self._marks = [self._timer.mark()]

    def end(self) -> None:
        self._marks.append(self._timer.mark())

    def at(self, activity: str) -> None:
        """See `megacoder.parallel.journal.Listener`."""

    def entered(self, operation: str) -> None:
        self._marks.append(self._timer.mark())

    def left(self) -> None:
        self._marks.append(self._timer.mark())

    def seconds(self) -> float:
        """Between `begin` and `end`; the device must have passed both."""
        pairs = zip(self._marks[::2], self._marks[1::2], strict=True)
        return sum(self._timer.seconds(first, last) for first, last in pairs)


class Pace:
    """What ranks need for a step, compared; every rank makes one and makes the same calls."""

    def __init__(self, mesh: Mesh) -> None:
        self.every = MEASURED_EVERY
        self._journal, self._rank = mesh.world.journal, mesh.world.rank
        self._clock = ComputeClock(timer_for(mesh.world.device))
        stages = gather_json(mesh.place.pp, mesh.world)
        self._peers = [[rank for rank, pp in enumerate(stages) if pp == mine] for mine in stages]
        self._has_peers = len(stages) > len(set(stages))
        self._is_measured = False
        self._began = self._waited = 0.0
        self._seconds: list[float] = []
        """of this rank in the step before, if that was measured: waiting for data, and where it has peers computing"""
        self._step_seconds = math.nan
        """of the last step that was measured, as a whole"""
        self._waiting = 0
        """measured steps in a row in which a rank waited for data"""
        self._slow: dict[int, int] = defaultdict(int)
        """by rank: measured steps in a row in which it was slow"""

    def begin(self, step: int) -> None:
        """Called in step `step`, as are `got_data`, `computed`, `report` and `read`, each when `StepPace` says."""
        self._is_measured = step % self.every == 0
        if self._is_measured:
            self._began = time.perf_counter()
        if self._is_measured and self._has_peers:
            self._journal.listener = self._clock
            self._clock.begin()

    def got_data(self) -> None:
        if self._is_measured:
            self._waited = time.perf_counter() - self._began

    def computed(self) -> None:
        if self._is_measured and self._has_peers:
            self._clock.end()
            self._journal.listener = None

    def report(self) -> list[float]:
        return [one if rank == self._rank else 0.0 for one in self._seconds for rank in range(len(self._peers))]

    def read(self) -> None:
        self._seconds = []
        if self._is_measured:
            self._seconds = [self._waited, *([self._clock.seconds()] if self._has_peers else [])]

    def compare(self, seconds: Sequence[float]) -> tuple[dict[str, float], list[str]]:
        """(for the log, lines for people) from the sums of all `report`s; nothing of steps that were not measured.

        Called when a step is over.
        """
        log: dict[str, float] = {}
        lines: list[str] = []
        if seconds:
            size = len(self._peers)
            for part in (self._compare_waiting(seconds[:size]), self._compare_ranks(seconds[size:])):
                log |= part[0]
                lines += part[1]
        if self._is_measured:
            self._step_seconds = time.perf_counter() - self._began
        return log, lines

    def _compare_waiting(self, seconds: Sequence[float]) -> tuple[dict[str, float], list[str]]:
        longest = max(seconds)
        share = longest / self._step_seconds
        self._waiting = self._waiting + 1 if share > WAITING else 0
        lines = []
        if self._waiting == IN_A_ROW:
            rank = f"rank {seconds.index(longest)} waits" if len(seconds) > 1 else "training waits"
            lines.append(
                f"{rank} for data for {share:.0%} of the step ({longest:.2g} s), in {IN_A_ROW} measured steps in a "
                "row; raise data_workers, the threads that prepare batches, if there are cores for them"
            )
        return {DATA_SECONDS: longest}, lines

    def _compare_ranks(self, seconds: Sequence[float]) -> tuple[dict[str, float], list[str]]:
        if not seconds:
            return {}, []
        ratios = [
            own / max(1e-9, statistics.median_low([seconds[peer] for peer in peers]))
            for own, peers in zip(seconds, self._peers, strict=True)
        ]
        lines = []
        for rank, ratio in enumerate(ratios):
            self._slow[rank] = self._slow[rank] + 1 if ratio > SLOW else 0
            if self._slow[rank] == IN_A_ROW:
                lines.append(
                    f"rank {rank} is slow, in {IN_A_ROW} measured steps in a row: it computes for {ratio:.2f} times as "
                    "long as the median of ranks with the same work, and all wait for it; its device may be throttled, "
                    "its host busy, or its data slow to read"
                )
        slowest = max(range(len(ratios)), key=ratios.__getitem__)
        return {SLOWEST_RANK: slowest, SLOWEST_RATIO: ratios[slowest]}, lines
