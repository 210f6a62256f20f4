"""MBPP (arXiv:2108.07732): a sentence and three tests; write the function.

Base models see three solved examples, the data file's tasks 2, 3 and 4, and are asked tasks 11 to 510; of a file
without those examples, all tasks are asked, with the examples that there are. Programs run with the row's own set-up
code, which the published harness leaves out (so its reference for task 367 fails there); as there, those of chat models
lack the imports that base models' have.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

from megacoder.evaluate.benchmarks.base import PYTHON_IMPORTS, ProgramBenchmark, Settings, Task, code_block
from megacoder.evaluate.benchmarks.python_tests import asserts

__all__ = ["Mbpp"]

_SHOTS = (2, 3, 4)
_TESTS = range(11, 511)
_ASK = (
    "You are an expert Python programmer, and here is your task: {text} Your code should pass these tests:\n\n{tests}\n"
    "[BEGIN]"
)
_CHAT_ASK = ">>> Problem:\n{text}\n>>> Test Cases:\n{tests}\n"
_CHAT_CODE = "\n>>> Code:\n```python\n{code}\n```"
_CHAT_OPENING = (
    "Please refer the given examples and generate a python function for my problem.\nExamples are listed as follows:\n"
)


class Mbpp(ProgramBenchmark):
    name = "mbpp"
    fields: ClassVar = {"text": str, "code": str, "task_id": int, "test_list": list}
    max_new_tokens = 500
    max_prompt_tokens = 4096
    stops = ("[DONE]",)

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        if settings.instruct:
            self.max_new_tokens = 512

    def stops_of(self, task: Task) -> tuple[str, ...]:
        return () if self.settings.instruct else self.stops

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
        if self.settings.instruct:
            block = code_block(completion, "python")
            lines = [completion if block is None else block]
        else:
            lines = [PYTHON_IMPORTS, completion.strip()]
        setup = str(task.row.get("test_setup_code") or "")
        return "\n".join([*lines, setup, *task.row["test_list"]]).replace("\r\n", "\n")

    def _completion(self, shots: list[dict[str, Any]], row: dict[str, Any]) -> str:
        return "".join([f"{_asked(_ASK, shot)}\n{_code(shot)}\n[DONE]\n" for shot in shots] + [_asked(_ASK, row)])

    def _chat(self, shots: list[dict[str, Any]], row: dict[str, Any]) -> str:
        examples = [
            f"- Example {number}:\n" + _asked(_CHAT_ASK, shot) + _CHAT_CODE.format(code=_code(shot))
            for number, shot in enumerate(shots, start=1)
        ]
        opening = _CHAT_OPENING + "\n\n".join(examples) + "\n\nHere is my problem:\n" if examples else ""
        return opening + _asked(_CHAT_ASK, row)


def _asked(form: str, row: dict[str, Any]) -> str:
    text = row["text"].strip() if form is _CHAT_ASK else row["text"]
    return form.format(text=text, tests="\n".join(row["test_list"]))


def _code(row: dict[str, Any]) -> str:
    return str(row["code"]).replace("\r", "").replace("\t", "    ")
