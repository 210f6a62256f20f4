"""Where the time of a step goes: listeners of a rank's journal, one with a clock, one that adds ranges to a trace.

The journal is told which activity begins, and when a communication begins and ends (see `megacoder.parallel.journal`).
The clock needs nothing else from the step: each note is a mark in time, and the time between two marks belongs to the
phase that the first of them began. Phases therefore add up to the step, whatever it does; what no phase claims is
`other`.

On a GPU marks are events in the stream. Communication is then the time for which the stream waited, not the time for
which data travelled: what a matrix product hides costs nothing, here as in the step.
"""

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from torch.profiler import record_function

from megacoder.core.timing import Timer
from megacoder.parallel.journal import DATA, UPDATE
from megacoder.parallel.pipeline import ACTIVITIES

__all__ = ["COMMUNICATION", "OTHER", "PHASES", "PhaseClock", "StepTimes", "TraceRanges"]

COMMUNICATION, OTHER = "communication", "other"
PHASES = ("data", "forward", "backward", "weight gradients", COMMUNICATION, "optimizer", OTHER)
"""In the order of a report; weight gradients only where a schedule runs them on their own."""
PHASE_OF = {
    DATA: "data",
    ACTIVITIES["F"]: "forward",
    ACTIVITIES["B"]: "backward",
    ACTIVITIES["I"]: "backward",
    ACTIVITIES["W"]: "weight gradients",
    UPDATE: "optimizer",
}


@dataclass(frozen=True, kw_only=True)
class StepTimes:
    """Where the time of one step went."""

    seconds: float
    """of the whole step"""
    phases: dict[str, float]
    """of PHASES; they add up to `seconds`"""
    operations: dict[str, float]
    """the parts of communication, by the name of the collective or transfer"""


class PhaseClock:
    """Times the steps of one rank; hand it to the journal, and call `begin_step` before each and `end` after all."""

    def __init__(self, timer: Timer) -> None:
        self._timer = timer
        self._steps: list[list[tuple[Any, str, str | None]]] = []
        self._phase = OTHER

    def begin_step(self) -> None:
        """Starts another step, to which whatever is measured from here on belongs."""
        self._steps.append([])
        self.at(OTHER)

    def end(self) -> None:
        """The last step is over."""
        self._last = self._timer.mark()

    def at(self, activity: str) -> None:
        """See `megacoder.parallel.journal.Listener`."""
        self._phase = PHASE_OF.get(activity, OTHER)
        self._mark(self._phase)

    def entered(self, operation: str) -> None:
        self._mark(COMMUNICATION, operation)

    def left(self) -> None:
        self._mark(self._phase)

    def steps(self) -> list[StepTimes]:
        """Of each step; waits for the device."""
        self._timer.finish()
        ends = [*(step[0][0] for step in self._steps[1:]), self._last]
        return [self._times(step, end) for step, end in zip(self._steps, ends, strict=True)]

    def _mark(self, phase: str, operation: str | None = None) -> None:
        self._steps[-1].append((self._timer.mark(), phase, operation))

    def _times(self, step: list[tuple[Any, str, str | None]], end: Any) -> StepTimes:
        phases: dict[str, float] = defaultdict(float)
        operations: dict[str, float] = defaultdict(float)
        marks = [*(mark for mark, _, _ in step[1:]), end]
        for (first, phase, operation), last in zip(step, marks, strict=True):
            seconds = self._timer.seconds(first, last)
            phases[phase] += seconds
            if operation is not None:
                operations[operation] += seconds
        whole = self._timer.seconds(step[0][0], end)
        named = sum(seconds for phase, seconds in phases.items() if phase != OTHER)
        phases[OTHER] = whole - named  # absorbs the rounding of thousands of marks
        return StepTimes(seconds=whole, phases=dict(phases), operations=dict(operations))


class TraceRanges:
    """Puts phases, and collectives within them, as named ranges into the trace that torch's profiler records."""

    def __init__(self) -> None:
        self._open: list[record_function] = []

    def at(self, activity: str) -> None:
        """See `megacoder.parallel.journal.Listener`."""
        self.end()
        self._begin(PHASE_OF.get(activity, activity))

    def entered(self, operation: str) -> None:
        self._begin(f"{COMMUNICATION}: {operation}")

    def left(self) -> None:
        self._open.pop().__exit__(None, None, None)

    def end(self) -> None:
        """Closes what is open."""
        while self._open:
            self.left()

    def _begin(self, name: str) -> None:
        self._open.append(record_function(name))
        self._open[-1].__enter__()
