"""MBPP (arXiv:2108.07732): a sentence and three tests; write the function.

Base models see three solved examples, the data file's tasks 2, 3 and 4, and are asked tasks 11 to 510; of a file
without those examples, all tasks are asked, with the examples that there are. Programs run with the row's own set-up
code, which the published harness leaves out (so its reference for task 367 fails there).
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

from megacoder.evaluate.benchmarks.base import PYTHON_IMPORTS, ProgramBenchmark, Task, code_block
from megacoder.evaluate.benchmarks.python_tests import asserts

__all__ = ["Mbpp"]

_SHOTS = (2, 3, 4)
_TESTS = range(11, 511)
_ASK = (
    "You are an expert Python programmer, and here is your task: {text} Your code should pass these tests:\n\n{tests}\n"
    "[BEGIN]\n"
)
_CHAT_SHOT = ">>> Problem:\n{text}\n>>> Test Cases:\n{tests}\n\n>>> Code:\n```python\n{code}\n```"


class Mbpp(ProgramBenchmark):
    name = "mbpp"
    fields: ClassVar = {"text": str, "code": str, "task_id": int, "test_list": list}
    max_new_tokens = 500
    max_prompt_tokens = 4096
    stops = ("[DONE]",)

    def fault(self, row: Mapping[str, Any]) -> str | None:
        shown = f"task {row['task_id']}: test_list = {row['test_list']!s:.60}"
        if not all(isinstance(test, str) for test in row["test_list"]):
            return f"{shown}: expected a list of texts"
        return None if asserts("\n".join(row["test_list"])) else f"{shown}: any answer would pass; expected assertions"

    def tasks(self, rows: Sequence[dict[str, Any]]) -> Iterable[Task]:
        by_id = {row["task_id"]: row for row in rows}
        shots = [by_id[number] for number in _SHOTS if number in by_id]
        asked = [row for row in rows if row["task_id"] in _TESTS] if len(shots) == len(_SHOTS) else list(rows)
        for row in asked:
            prompt = self._chat(shots, row) if self.settings.instruct else self._completion(shots, row)
            yield Task(id=str(row["task_id"]), prompt=prompt, row=row)

    def source(self, task: Task, completion: str) -> str:
        code = completion
        if self.settings.instruct:
            block = code_block(completion, "python")
            code = completion if block is None else block
        setup = str(task.row.get("test_setup_code") or "")
        return "\n".join([PYTHON_IMPORTS, code, setup, *task.row["test_list"]]).replace("\r\n", "\n")

    def _completion(self, shots: list[dict[str, Any]], row: dict[str, Any]) -> str:
        solved = [_asked(shot) + shot["code"].replace("\r", "").strip() + "\n[DONE]\n" for shot in shots]
        return "\n".join([*solved, _asked(row)]) if solved else _asked(row)

    def _chat(self, shots: list[dict[str, Any]], row: dict[str, Any]) -> str:
        examples = [
            f"- Example {number}:\n" + _CHAT_SHOT.format(
                text=shot["text"], tests="\n".join(shot["test_list"]), code=shot["code"].replace("\r", "").strip()
            ) for number, shot in enumerate(shots, start=1)
        ]  # fmt: skip
        asked = f">>> Problem:\n{row['text']}\n>>> Test Cases:\n" + "\n".join(row["test_list"])
        opening = "Please refer the given examples and generate a python function for my problem.\nExamples are listed "
        opening = opening + "as follows:\n" + "\n\n".join(examples) + "\n\nHere is my problem:\n" if examples else ""
        return opening + asked


def _asked(row: dict[str, Any]) -> str:
    return _ASK.format(text=row["text"], tests="\n".join(row["test_list"]))
