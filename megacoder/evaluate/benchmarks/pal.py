"""Program-aided math (arXiv:2211.10435): the model writes `solution()`, whose value is compared with the answer.

Seven sets, told apart by their fields: GSM8K, MATH, GSM-Hard, SVAMP, ASDiv, MAWPS, TabMWP. The worked examples are the
published prompt file, given with --shots. As in the published harness, an answer is a closed Python block that defines
`solution()`, run as it is. The value is computed in the sandbox and compared there (`math_answers`).
"""

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from megacoder.core.errors import ConfigError, DataError
from megacoder.evaluate.benchmarks import math_answers
from megacoder.evaluate.benchmarks.base import ProgramBenchmark, Task

__all__ = ["Pal", "question_and_answer", "set_of"]

_OPENING, _DEFINITION, _CLOSING = "```python\n", "def solution():\n", "```"
_JUDGE = """
_value = solution()
_judge = {{"__name__": "judge"}}
exec({rules!r}, _judge)
_answer = _judge["normalized"](_value)
print(_answer)
assert _value is not None and _judge["same_answer"]({truth!r}, _answer), (_answer, {truth!r})
"""


class Pal(ProgramBenchmark):
    name = "pal"
    fields: ClassVar = {}  # the sets differ: see `question_and_answer`
    max_new_tokens = 512
    max_prompt_tokens = 2048
    stops = ("Question", "----------------")
    seconds = 5.0
    preload = ("math", "numpy", "re", "sympy")

    def tasks(self, rows: Sequence[dict[str, Any]]) -> Iterable[Task]:
        shots = ""
        if self.settings.shots is not None:
            try:
                shots = self.settings.shots.read_text(encoding="utf-8") + "\n\n"
            except OSError as error:
                raise ConfigError(f"--shots {self.settings.shots}: {error.strerror}") from None
        elif not self.settings.instruct:
            raise ConfigError("pal needs --shots FILE, the worked examples in front of every question")
        for number, row in enumerate(rows):
            question, answer = question_and_answer(row, number)
            task_id = str(row.get("idx", row.get("task_id", number)))
            group = str(row.get("type", "")) if "problem" in row else ""
            yield Task(id=task_id, prompt=f"{shots}Question: {question}\n", group=group, row={**row, "_truth": answer})

    def source(self, task: Task, completion: str) -> str:
        rules = Path(math_answers.__file__).read_text(encoding="utf-8")
        return _solution(completion) + _JUDGE.format(rules=rules, truth=task.row["_truth"])


def _solution(completion: str) -> str:
    """The first closed Python block that defines `solution()`; empty without one."""
    begin = completion.find(_OPENING)
    defined = completion.find(_DEFINITION, begin)
    end = completion.find(_CLOSING, defined)
    return completion[begin + len(_OPENING) : end] if begin >= 0 and defined >= 0 and end >= 0 else ""


def question_and_answer(row: dict[str, Any], number: int) -> tuple[str, str]:
    """Question and normalized answer of a row of any of the sets.

    DataError for a row that fits none of them, or has an empty answer.
    """
    _, question, answer = _parts(row, number)
    if not str(answer).strip():
        raise DataError(f"row {number}: an empty answer, with which nothing can be compared: {str(row)[:60]}")
    answer = math_answers.normalized(answer)
    return question.strip(), math_answers.normalized(answer) if "problem" in row else answer  # MATH's twice, as there


def set_of(row: Mapping[str, Any]) -> str:
    """Which of the seven sets a row is of; empty for another with a question and an answer."""
    return _parts(row, 0)[0]


def _parts(row: Mapping[str, Any], number: int) -> tuple[str, str, object]:
    """(set, question, answer as it is written)."""
    match row:
        case {"question": str(question), "answer": str(answer)} if "####" in answer:
            return "gsm8k", question, answer.rsplit("####", 1)[1]
        case {"problem": str(question), "solution": str(solution)}:
            return "math", question, _boxed(solution)
        case {"input": str(question), "target": target}:
            return "gsm-hard" if "code" in row else "mawps", question, target
        case {"Body": str(body), "Question": str(question), "Answer": answer}:
            body = body.strip()
            return "svamp", f"{body if body.endswith('.') else body + '.'} {question.strip()}", answer
        case {"body": str(body), "question": str(question), "answer": str(answer)}:
            return "asdiv", f"{body.strip()} {question.strip()}", re.sub(r"\(.*?\)", "", answer)
        case {"question": str(question), "answer": answer, "table": str()}:
            try:
                value = _table_answer(str(answer), str(row.get("ans_type", "")))
            except (ValueError, ZeroDivisionError):
                raise DataError(f"row {number}: answer {answer!r} is not a number, as ans_type says") from None
            return "tabmwp", _table_question(question, row), value
        case {"question": str(question), "answer": answer}:
            return "", question, answer
    raise DataError(f"row {number}: no question and answer of a known set in its fields {sorted(row)}")


def _table_question(question: str, row: Mapping[str, Any]) -> str:
    """A question of TabMWP, with its table and, where it has them, the table's title and the choices."""
    title = f'regarding "{row["table_title"]}" ' if row.get("table_title") else ""
    choices = f" Please select from the following options: {row['choices']}" if row.get("choices") else ""
    return f"Read the following table {title}and answer a question:\n{row['table']}\n{question}{choices}"


def _table_answer(answer: str, kind: str) -> object:
    """The value of a number that TabMWP spells as a fraction, in percent or with commas; other answers as they are."""
    if kind not in ("integer_number", "decimal_number"):
        return answer
    if "/" in answer:
        above, _, below = answer.partition("/")
        return int(above) / int(below)
    if "," in answer:
        return float(answer.replace(",", ""))
    return float(answer.removesuffix("%")) / 100 if answer.endswith("%") else float(answer)


def _boxed(solution: str) -> str:
    """What the last `\\boxed` of a solution holds, less a colon in front and a full stop behind; all without one."""
    _, found, rest = solution.rpartition("boxed")
    if not found:
        return solution
    text = rest.split("$")[0].strip()
    if rest.startswith("{"):
        depths = itertools.accumulate({"{": 1, "}": -1}.get(character, 0) for character in rest)
        end = next((place for place, depth in enumerate(depths) if depth == 0), len(rest))
        text = rest[1:end]
    return text.split("\n")[0].removeprefix(":").removesuffix(".").removesuffix("/")
