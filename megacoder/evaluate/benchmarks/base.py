"""What a benchmark is: rows of a file become tasks; a completion becomes a program to run, or is compared as text.

Everything that the published protocol fixes is here or in a benchmark's own module: prompt, cut, limit, judgment.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from megacoder.core.errors import DataError, FormatError
from megacoder.data.jsonl import EMPTY_LINE, JsonRows
from megacoder.evaluate.sandbox.languages import Toolchain, find_toolchain
from megacoder.evaluate.sandbox.program import Outcome, Program

__all__ = [
    "PYTHON_IMPORTS", "Benchmark", "ProgramBenchmark", "Settings", "Task", "TextBenchmark", "code_block", "cut",
    "read_rows",
]  # fmt: skip

PYTHON_IMPORTS = """\
import math
import re
import sys
import copy
import datetime
import itertools
import collections
import heapq
import functools
import hashlib
import numpy
import numpy as np
import string
from typing import *
from collections import *
"""
"""Put before every Python program, as in the published harness."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """One question."""

    id: str
    prompt: str
    """the text that the model continues; in chat, what the user says"""
    suffix: str | None = None
    """what follows the gap, where the task is to fill one in"""
    context: tuple[str, ...] = ()
    """pieces of other files, best first, in front of the prompt where there is room"""
    context_title: str = ""
    """in front of the pieces, if there are any"""
    group: str = ""
    """what a result is also counted under, besides the total: a difficulty, a library, a language"""
    row: Mapping[str, Any] = field(default_factory=dict)
    """the line of the data file"""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a user chooses."""

    language: str = "python"
    instruct: bool = False
    """ask through the chat template and use the answer's code block"""
    shots: Path | None = None
    """file of worked examples, where they are not in the data file"""
    retrieval: bool = False
    """give other files' code, where the data has it"""
    seconds: float | None = None
    """CPU time that a program gets, instead of the published limit"""


class Benchmark(ABC):
    """`tasks` of a data file; subclasses say how a completion is judged."""

    name: ClassVar[str]
    protocol: ClassVar[int] = 2
    """raised when what is asked or how it is judged changes, so that saved scores of different rules are not mixed"""
    fields: ClassVar[Mapping[str, type]]
    """what every row must have"""
    max_new_tokens: int = 512
    """with `seconds`, the published limits for base models; subclasses set those for chat"""
    max_prompt_tokens: ClassVar[int | None] = None
    stops: ClassVar[tuple[str, ...]] = ()
    """where a completion of a base model ends"""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    def load(self, path: Path) -> list[Task]:
        """The tasks of `path`; DataError for a row without the fields that the benchmark needs, or with a `fault`."""
        rows = read_rows(path, self.fields, fault=self.fault)
        tasks = list(self.tasks(rows))
        if not tasks:
            raise DataError(f"{path}: no tasks of {self.name} in it")
        seen: set[str] = set()
        for task in tasks:
            if task.id in seen:
                raise DataError(f"{path}: task {task.id!r} is in it twice")
            seen.add(task.id)
        return tasks

    def fault(self, row: Mapping[str, Any]) -> str | None:
        """Why a row that has all fields could not be scored, such as tests that any answer would pass; else None."""
        return None

    @abstractmethod
    def tasks(self, rows: Sequence[dict[str, Any]]) -> Iterable[Task]:
        """One task per row, for the rows that the protocol asks."""

    def stops_of(self, task: Task) -> tuple[str, ...]:
        """Strings at whose first occurrence a completion of this task is cut."""
        return self.stops


class ProgramBenchmark(Benchmark):
    """A benchmark whose completions are run."""

    seconds: float = 10.0
    preload: ClassVar[tuple[str, ...]] = (
        "collections", "copy", "datetime", "functools", "hashlib", "heapq", "itertools", "math", "numpy", "re",
        "string", "typing",
    )  # fmt: skip
    """modules that its Python programs import"""
    memory_mb: ClassVar[int] = 2048

    def toolchain(self) -> Toolchain:
        """What runs its programs; ConfigError where tools are not installed."""
        return self._toolchain

    @cached_property
    def _toolchain(self) -> Toolchain:
        return find_toolchain(self.settings.language)

    @abstractmethod
    def source(self, task: Task, completion: str) -> str:
        """The complete program, tests included."""

    def program(self, task: Task, completion: str, toolchain: Toolchain) -> Program:
        """What the sandbox runs."""
        seconds = self.settings.seconds or self.seconds
        return toolchain.program(self.source(task, completion), seconds=seconds, memory_mb=self.memory_mb)

    def passed(self, task: Task, outcome: Outcome) -> bool:
        """Whether a program with this outcome solves the task."""
        return outcome.passed


class TextBenchmark(Benchmark):
    """A benchmark whose completions are compared with the truth."""

    @abstractmethod
    def scores(self, task: Task, completion: str) -> dict[str, float]:
        """Each score from 0 to 1; `exact_match` is one of them."""


def read_rows(
    path: Path, fields: Mapping[str, type], *, fault: Callable[[Mapping[str, Any]], str | None] | None = None
) -> list[dict[str, Any]]:
    """The rows of a JSONL file, which may be compressed (.gz, .zst).

    FormatError names the first line that is no JSON object, where `fields` are missing or of another type, or in which
    `fault` finds something.
    """
    rows = []
    for number, _, row in JsonRows(path):
        if row == EMPTY_LINE:
            continue
        if isinstance(row, str):
            raise FormatError(f"{path}, line {number}: {row}")
        for name, kind in fields.items():
            if not isinstance(row.get(name), kind):
                have = "no" if name not in row else f"{row[name]!r:.40} as"
                raise FormatError(
                    f"{path}, line {number}: {have} field {name!r} ({kind.__name__}); it has {sorted(row)}"
                )
        if fault is not None and (found := fault(row)) is not None:
            raise FormatError(f"{path}, line {number}: {found}")
        rows.append(row)
    return rows


def cut(text: str, stops: Iterable[str]) -> str:
    """`text` up to the first of `stops`."""
    places = [place for stop in stops if (place := text.find(stop)) >= 0]
    return text[: min(places)] if places else text


def code_block(answer: str, language: str) -> str | None:
    """The first closed block fenced as ```language, in whatever case, as the published harnesses find it; else None."""
    found = re.search(f"```{re.escape(language)}\n(.*?)```", answer, re.DOTALL | re.IGNORECASE)
    return found[1] if found else None
