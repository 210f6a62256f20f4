"""Steps whose data a run leaves out, as after a spike of the loss (PaLM's remedy, arXiv:2204.02311, section 5.1).

A range A:B leaves out what steps A to B would be served, so that step A gets what step B + 1 would have got. Each range
counts steps as they are under the ranges before it: the next spike is named by the numbers in the run's log.
"""

import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from megacoder.core.errors import ConfigError
from megacoder.data.stream import Batch, ResumableBatches

__all__ = ["SkippingStream", "Steps", "data_step", "parse_steps"]

Steps = tuple[int, int]
"""First and last."""


def parse_steps(name: str, text: str) -> Steps:
    """(A, B) of A:B, (A, A) of A; ConfigError that names the setting."""
    match = re.fullmatch(r"(\d+)(?::(\d+))?", text)
    first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not 1 <= first <= last:
        raise ConfigError(f"{name} {text!r}: expected A:B with 1 <= A <= B, such as 1:10")
    return first, last


def data_step(step: int, left_out: Sequence[Steps]) -> int:
    """The step that would be served the data of `step` if nothing were `left_out`; rises with it."""
    for first, last in reversed(left_out):
        step += last - first + 1 if step >= first else 0
    return step


class SkippingStream:
    """A stream without the batches that are `left_out`. Its state is the stream's, which says what was served, too."""

    def __init__(self, stream: ResumableBatches, left_out: Sequence[Steps], *, global_batch_size: int) -> None:
        self._stream, self._left_out, self._global_batch_size = stream, left_out, global_batch_size
        self._step, self._first_window = 0, 0

    @property
    def windows(self) -> int:
        return self._stream.windows

    def next_batch(self, *, threads: ThreadPoolExecutor | None = None, num_threads: int = 1) -> Batch:
        self._step += 1
        for _ in range(self._drawn + 1, data_step(self._step, self._left_out)):
            self._stream.next_batch(threads=threads, num_threads=num_threads)
        return self._stream.next_batch(threads=threads, num_threads=num_threads)

    def state_dict(self) -> dict[str, Any]:
        return self._stream.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._stream.load_state_dict(state)
        self._first_window = state.get("first_window", 0)  # the run may go on in another's data
        self._step = drawn = self._drawn
        while data_step(self._step, self._left_out) > drawn:
            self._step -= 1

    @property
    def _drawn(self) -> int:
        """Batches of this run, those left out included."""
        return (self.windows - self._first_window) // self._global_batch_size
