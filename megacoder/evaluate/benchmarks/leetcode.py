"""LeetCode Contest (arXiv:2401.14196, 4.1): problems of July 2023 to January 2024, 100 tests each, by difficulty.

Chat models get the statement with the code to complete (`prompt_sft`). Their answer is read as in the published
harness: its closed code block, or itself up to the next top-level statement, or after the code to complete where it
continues that. Base models, for which nothing is published, continue `prompt`, which ends in that code; an answer that
has its own `class Solution` is run without the prompt.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

from megacoder.evaluate.benchmarks.base import PYTHON_IMPORTS, ProgramBenchmark, Task, cut
from megacoder.evaluate.benchmarks.python_tests import asserts

__all__ = ["LeetCode"]

_TOP_LEVEL = ("\ndef", "\nclass", "\nif", "\n#", "\nprint")
_BODY = "\n        "
"""How an answer begins that continues the code to complete."""
_FENCE = "```python"


class LeetCode(ProgramBenchmark):
    name = "leetcode"
    fields: ClassVar = {"task_id": str, "prompt": str, "prompt_sft": str, "test": str, "meta": dict}
    max_new_tokens = 1024
    max_prompt_tokens = 3072
    stops = (*_TOP_LEVEL, "\n```", "\nmy_solution")

    def fault(self, row: Mapping[str, Any]) -> str | None:
        if asserts(row["test"]):
            return None
        return f"its test asserts nothing, so any answer would pass: {row['test']!r:.60}"

    def tasks(self, rows: Sequence[dict[str, Any]]) -> Iterable[Task]:
        for row in rows:
            prompt = row["prompt_sft"] if self.settings.instruct else row["prompt"]
            yield Task(id=row["task_id"], prompt=prompt, group=str(row["meta"].get("difficulty", "")), row=row)

    def stops_of(self, task: Task) -> tuple[str, ...]:
        return () if self.settings.instruct else self.stops

    def source(self, task: Task, completion: str) -> str:
        if self.settings.instruct:
            code = _chat_code(task.row["prompt_sft"], completion)
        else:
            code = completion if "class Solution" in completion else task.row["prompt"] + completion
        return f"{PYTHON_IMPORTS}from functools import *\n{code}\n{task.row['test']}"


def _chat_code(prompt: str, answer: str) -> str:
    if answer.startswith(_BODY):
        return f"{(_block(prompt) or '').strip()}\n{answer}"
    marked = answer.replace("[PYTHON]", _FENCE).replace("[/PYTHON]", "```")
    if _FENCE not in marked:
        return cut(marked, _TOP_LEVEL)
    block = _block(marked)
    return answer if block is None else block


def _block(text: str) -> str | None:
    """The first Python block that is closed at the start of a line."""
    _, opened, rest = text.partition(f"{_FENCE}\n")
    code, closed, _ = rest.partition("\n```")
    return code if opened and closed else None
