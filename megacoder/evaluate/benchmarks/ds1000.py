"""DS-1000 (arXiv:2211.11501), completion mode: data-science snippets over seven libraries, run in each row's context.

Rows are those of the published JSONL (`prompt`, `code_context`, `metadata` with the library). The libraries are those
installed in this interpreter's environment. Base models' answers are cut as in the published harness: at the tag that
closes the solution or at a closing fence, whatever follows it.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

from megacoder.evaluate.benchmarks.base import ProgramBenchmark, Task, code_block
from megacoder.evaluate.benchmarks.python_tests import asserts

__all__ = ["DS1000"]


class DS1000(ProgramBenchmark):
    name = "ds1000"
    fields: ClassVar = {"prompt": str, "code_context": str, "metadata": dict}
    max_new_tokens = 512
    max_prompt_tokens = 2048
    stops = ("</code>", "# SOLUTION END", "\nEND SOLUTION")
    seconds = 60.0
    preload = ("numpy", "pandas", "scipy", "matplotlib")
    memory_mb = 8192

    def fault(self, row: Mapping[str, Any]) -> str | None:
        if asserts(f"{row['code_context']}\ntest_execution(code)"):
            return None
        return "its code_context has no test_execution that asserts anything, so any answer would pass"

    def tasks(self, rows: Sequence[dict[str, Any]]) -> Iterable[Task]:
        for number, row in enumerate(rows):
            about = row["metadata"]
            task_id = str(about.get("problem_id", number))
            yield Task(id=task_id, prompt=row["prompt"], group=str(about.get("library", "")), row=row)

    def source(self, task: Task, completion: str) -> str:
        block = code_block(completion, "python") if self.settings.instruct else None
        code = _solution(completion if block is None else block)
        context = task.row["code_context"]
        lines = [context, f"code = {code!r}", "test_execution(code)"]
        return "\n".join([*lines, "test_string(code)"] if "test_string(" in context else lines) + "\n"


def _solution(text: str) -> str:
    code = text.split("</code>")[0].replace("```python", "").split("```")[0]
    return code.split("\nEND SOLUTION")[0].replace("<code>", "")
