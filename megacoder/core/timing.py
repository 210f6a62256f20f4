"""Marks in a device's time: the clock of this process on a CPU, events in the stream on a GPU.

A GPU works asynchronously, so the host's clock would time only how long launches take. An event is put into the stream
like any kernel, and read when all is over: marking costs microseconds and waits for nothing.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any, Protocol

import torch

__all__ = ["CudaTimer", "HostTimer", "Timer", "median_seconds", "timer_for"]


class Timer(Protocol):
    """Makes marks, and measures the time between two of them."""

    def mark(self) -> Any:
        """The moment at which all work issued so far is done."""

    def seconds(self, first: Any, last: Any) -> float:
        """The time between two marks; call `finish` before."""

    def finish(self) -> None:
        """Waits until all marks have been reached."""


class HostTimer:
    """For devices whose work is done when the call returns."""

    def mark(self) -> float:
        return time.perf_counter()

    def seconds(self, first: float, last: float) -> float:
        return last - first

    def finish(self) -> None:
        pass


class CudaTimer:
    """Events in the current stream."""

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, first: torch.cuda.Event, last: torch.cuda.Event) -> float:
        return first.elapsed_time(last) / 1e3

    def finish(self) -> None:
        torch.cuda.synchronize()


def timer_for(device: torch.device) -> Timer:
    """The timer that is right for work on `device`."""
    return CudaTimer() if device.type == "cuda" else HostTimer()


def median_seconds(
    call: Callable[[], object],
    device: torch.device,
    *,
    prepare: Callable[[], object] | None = None,
    budget_seconds: float = 0.25,
) -> float:
    """The time that `call` takes: the median of at least three runs, and of up to 50 while the budget lasts.

    One run before warms up. `prepare`, which is not timed, runs before each: it restores what `call` overwrites.
    """
    timer = timer_for(device)

    def run() -> tuple[Any, Any]:
        if prepare is not None:
            prepare()
        first = timer.mark()
        call()
        return first, timer.mark()

    run()  # loads kernels and allocates memory
    timer.finish()
    end = time.perf_counter() + budget_seconds
    marks = [run() for _ in range(3)]
    while len(marks) < 50 and time.perf_counter() < end:
        marks.append(run())
    timer.finish()
    return statistics.median(timer.seconds(*pair) for pair in marks)
