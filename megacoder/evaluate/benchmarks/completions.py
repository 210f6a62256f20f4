"""Where completions come from without a model in this process: a file of finished ones, or a server (`endpoint`).

A source answers requests in any order. `local` has those that run a model here; this module does not import torch, so
that scoring a file starts at once.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from megacoder.core.errors import DataError
from megacoder.evaluate.benchmarks.base import Task, read_rows
from megacoder.evaluate.sampling import Sampling

__all__ = ["CompletionSource", "Decoding", "FileSource", "Request"]


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """How answers are drawn."""

    sampling: Sampling = field(default_factory=Sampling)
    max_new_tokens: int = 512
    chat: bool = False
    spm: bool = False
    """infilling: the suffix comes first"""


@dataclass(frozen=True, kw_only=True)
class Request:
    """A request for one answer."""

    task: Task
    sample: int
    stops: tuple[str, ...]
    max_prompt_tokens: int | None = None


class CompletionSource(Protocol):
    """Answers requests."""

    def complete(self, requests: Sequence[Request]) -> Iterator[tuple[Request, str]]:
        """(request, text) as they come, once each."""


class FileSource:
    """A JSONL file of `task_id` and `completion`, several lines per task for several samples."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._texts: dict[str, list[str]] = defaultdict(list)
        for row in read_rows(path, {"completion": str}):
            if "task_id" not in row:
                raise DataError(f"{path}: a line without task_id: {str(row)[:60]}")
            self._texts[str(row["task_id"])].append(row["completion"])

    def check(self, tasks: Sequence[Task]) -> int:
        """How many samples each task has; DataError where tasks differ in that, are missing or unknown."""
        known = {task.id for task in tasks}
        unknown = next((task_id for task_id in self._texts if task_id not in known), None)
        if unknown is not None:
            raise DataError(f"{self.path}: task_id {unknown!r} is not in the data")
        counts = {task.id: len(self._texts.get(task.id, ())) for task in tasks}
        most = max(counts.values())
        if most == 0:
            raise DataError(f"{self.path}: no completions in it")
        short = next((task_id for task_id, count in counts.items() if count < most), None)
        if short is not None:
            raise DataError(f"{self.path}: {counts[short]} completions of task {short!r}, but {most} of others")
        return most

    def complete(self, requests: Sequence[Request]) -> Iterator[tuple[Request, str]]:
        for request in requests:
            yield request, self._texts[request.task.id][request.sample]
