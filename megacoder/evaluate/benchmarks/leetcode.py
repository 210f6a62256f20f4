"""LeetCode Contest (arXiv:2401.14196, 4.1): problems of July 2023 to January 2024, 100 tests each, by difficulty.

Chat models get the statement with the code to complete (`prompt_sft`); base models continue `prompt`, which ends in
that code. An answer that has its own `class Solution` is run without the prompt.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

from megacoder.evaluate.benchmarks.base import PYTHON_IMPORTS, ProgramBenchmark, Task, code_block
from megacoder.evaluate.benchmarks.python_tests import asserts

__all__ = ["LeetCode"]


class LeetCode(ProgramBenchmark):
    name = "leetcode"
    fields: ClassVar = {"task_id": str, "prompt": str, "prompt_sft": str, "test": str, "meta": dict}
    max_new_tokens = 1024
    max_prompt_tokens = 3072
    stops = ("\ndef", "\nclass", "\nif", "\n#", "\nprint", "\n```", "\nmy_solution")

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
        block = code_block(completion, "python")
        code = completion if block is None else block
        if "class Solution" not in code:
            code = task.row["prompt"] + code
        return PYTHON_IMPORTS + code + "\n" + task.row["test"]
