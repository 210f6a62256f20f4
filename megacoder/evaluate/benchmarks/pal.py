"""Program-aided math (arXiv:2211.10435): the model writes `solution()`, whose value is compared with the answer.

Seven sets, told apart by their fields: GSM8K, MATH, GSM-Hard, SVAMP, ASDiv, MAWPS, TabMWP. The worked examples are the
published prompt file, given with --shots. Numbers are equal within 1e-4 of their size, also as percentages either way;
other answers are compared as text, or as expressions where sympy is installed. The value is computed and compared in
the sandbox.
"""

import re
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

from megacoder.core.errors import ConfigError, DataError
from megacoder.evaluate.benchmarks.base import ProgramBenchmark, Task, code_block

__all__ = ["Pal", "question_and_answer"]

_JUDGE = """

def _same(value, truth):
    try:
        number, wanted = float(value), float(str(truth).replace(",", ""))
        near = lambda x: abs(number - x) <= 1e-4 * max(abs(number), abs(x))
        return any(map(near, (wanted / 100, wanted, wanted * 100)))
    except (TypeError, ValueError):
        pass
    strip = lambda text: "".join(str(text).split()).strip("$.").lower()
    if strip(value) == strip(truth):
        return True
    try:
        import sympy
        plain = re.sub(r"\\\\[dt]?frac{([^{}]+)}{([^{}]+)}", r"((\\1)/(\\2))", str(truth))
        plain = re.sub(r"\\\\sqrt{([^{}]+)}", r"sqrt(\\1)", plain).replace("\\\\pi", "pi").replace("^", "**")
        difference = complex(sympy.N(sympy.sympify(value) - sympy.sympify(plain)))
        return abs(difference) <= 1e-3 * max(1.0, abs(complex(sympy.N(sympy.sympify(plain)))))
    except Exception:
        return False

_value = solution()
print(_value)
assert _value is not None and _same(_value, _truth), (_value, _truth)
"""


class Pal(ProgramBenchmark):
    name = "pal"
    fields: ClassVar = {}  # the sets differ: see `question_and_answer`
    max_new_tokens = 512
    max_prompt_tokens = 2048
    stops = ("Question", "----------------")
    seconds = 5.0
    preload = ("math", "re")

    def tasks(self, rows: Sequence[dict[str, Any]]) -> Iterable[Task]:
        shots = ""
        if self.settings.shots is not None:
            try:
                shots = self.settings.shots.read_text(encoding="utf-8").rstrip() + "\n\n"
            except OSError as error:
                raise ConfigError(f"--shots {self.settings.shots}: {error.strerror}") from None
        elif not self.settings.instruct:
            raise ConfigError("pal needs --shots FILE, the worked examples in front of every question")
        for number, row in enumerate(rows):
            question, answer = question_and_answer(row, number)
            if not answer.strip():
                raise DataError(f"row {number}: an empty answer, with which nothing can be compared: {str(row)[:60]}")
            task_id = str(row.get("idx", row.get("task_id", number)))
            group = str(row.get("type", "")) if "problem" in row else ""
            yield Task(id=task_id, prompt=f"{shots}Question: {question}\n", group=group, row={**row, "_truth": answer})

    def source(self, task: Task, completion: str) -> str:
        block = code_block(completion, "python")
        code = completion if block is None else block
        return f"import math, re\nfrom math import *\n_truth = {task.row['_truth']!r}\n{code}\n{_JUDGE}"


def question_and_answer(row: dict[str, Any], number: int) -> tuple[str, str]:
    """Question and answer of a row of any of the sets; DataError for a row that fits none of them."""
    match row:
        case {"question": str(question), "answer": str(answer)} if "####" in answer:
            return question, answer.rsplit("####", 1)[1].strip()
        case {"problem": str(question), "solution": str(solution)}:
            return question, _boxed(solution)
        case {"input": str(question), "target": target}:
            return question, str(target)
        case {"Body": str(body), "Question": str(question), "Answer": answer}:
            return f"{body.rstrip('.')}. {question}", str(answer)
        case {"body": str(body), "question": str(question), "answer": str(answer)}:
            return f"{body} {question}", re.sub(r"\s*\(.*?\)\s*$", "", answer)
        case {"question": str(question), "answer": answer, "table": str(table)}:
            return f"{table}\n{question}", str(answer)
        case {"question": str(question), "answer": answer}:
            return question, str(answer)
    raise DataError(f"row {number}: no question and answer of a known set in its fields {sorted(row)}")


def _boxed(solution: str) -> str:
    """The content of the last \\boxed{...}; all of `solution` without one."""
    start = solution.rfind("\\boxed{")
    if start < 0:
        return solution.strip()
    depth, begin = 1, start + len("\\boxed{")
    for place in range(begin, len(solution)):
        depth += {"{": 1, "}": -1}.get(solution[place], 0)
        if depth == 0:
            return solution[begin:place]
    return solution[begin:]
