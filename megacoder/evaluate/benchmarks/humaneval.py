"""HumanEval (arXiv:2107.03374) and its multilingual sets: complete a function from its signature and docstring.

Base models get the stripped prompt and no example; Python answers end at the next top-level statement, others at the
row's stop tokens. Chat models are asked for the complete function in a code block. As in the published harness, it is
put back under the prompt's own lines, without main and without what the answer has above it. Python tests that define
`check` and leave its call to the harness, as those of OpenAI's own file do, get that call.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from megacoder.core.errors import ConfigError
from megacoder.evaluate.benchmarks.base import PYTHON_IMPORTS, ProgramBenchmark, Settings, Task, code_block
from megacoder.evaluate.benchmarks.python_tests import asserts, leaves_check_uncalled

__all__ = ["HumanEval"]

_REQUEST = (
    "Please continue to complete the function. You are not allowed to modify the given code and do the completion "
    "only. Please return all completed function in a codeblock. Here is the given code to do completion:\n"
    "```{language}\n{prompt}\n```"
)
_FENCES = {"cpp": "cpp", "cs": "csharp", "java": "java", "js": "javascript", "php": "php", "sh": "bash",
           "ts": "typescript", "python": "python"}  # fmt: skip
_MAINS = {"cpp": "int main()", "java": "public static void main", "cs": "public static void Main", "rust": "fn main()",
          "go": "func main()"}  # fmt: skip
_HEADERS = {
    "python": PYTHON_IMPORTS,
    "cpp": "".join(
        f"#include<{name}>\n" for name in
        ("stdlib.h", "algorithm", "math.h", "stdio.h", "vector", "string", "climits", "cstring", "iostream", "cassert")
    ),
    "cs": "".join(
        f"using System{name};\n" for name in
        ("", ".Numerics", ".Diagnostics", ".Collections.Generic", ".Linq", ".Text", ".Security.Cryptography")
    ),
}  # fmt: skip
_TOP_LEVEL = ("\ndef", "\nclass", "\nif", "\n#", "\nprint")
_TS_TOP_LEVEL = ("\nexport", "\nimport", "\nexport default", "\nimport default", "\nconsole.log")
_INDENTS = {"python": 4, "java": 4}
"""Blanks in front of the brace that closes a function which the answer names otherwise."""
_CLOSED = "}"
"""How a test text begins that closes the function itself."""


class HumanEval(ProgramBenchmark):
    name = "humaneval"
    fields: ClassVar = {"task_id": str, "prompt": str, "test": str}
    max_new_tokens = 500
    max_prompt_tokens = 4096

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        if settings.instruct:
            self.max_new_tokens, self.seconds = 1024, 3.0

    def load(self, path: Path) -> list[Task]:
        """As for every benchmark; ConfigError where the tests need a library that is not installed here."""
        tasks = super().load(path)
        toolchain = self.toolchain()
        if missing := toolchain.missing_libraries("".join(task.row["prompt"] + task.row["test"] for task in tasks)):
            raise ConfigError(f"{toolchain.language.name}: {path} needs {', '.join(missing)}, not installed here")
        return tasks

    def fault(self, row: Mapping[str, Any]) -> str | None:
        of_row = row.get("language", "python")  # the row itself says, before `tasks` does
        if self._language != "python" or of_row not in ("python", "py"):
            return None
        if leaves_check_uncalled(row["test"]) and not _entry_point(row):
            return f"its test does not call check, and no field 'entry_point' says for what; it has {sorted(row)}"
        if not asserts(_python_test(row)):
            return f"its test asserts nothing, so any answer would pass: {row['test']!r:.60}"
        return None

    @property
    def _language(self) -> str:
        return self.toolchain().language.name

    def tasks(self, rows: Sequence[dict[str, Any]]) -> Iterable[Task]:
        language = self._language
        for row in rows:
            prompt = row["prompt"].strip()
            if self.settings.instruct:
                prompt = _REQUEST.format(language=_FENCES.get(language, language), prompt=prompt)
            test = _python_test(row) if language == "python" else row["test"]
            yield Task(id=row["task_id"], prompt=prompt, row={**row, "test": test})

    def stops_of(self, task: Task) -> tuple[str, ...]:
        if self.settings.instruct:
            return ()
        if self._language == "python":
            return _TOP_LEVEL
        stops = tuple(map(str, task.row.get("stop_tokens") or ()))
        return stops + _TS_TOP_LEVEL if self._language == "ts" else stops

    def source(self, task: Task, completion: str) -> str:
        language, prompt = self._language, task.row["prompt"]
        header, test = _HEADERS.get(language, ""), task.row["test"]
        if self.settings.instruct:
            closed = test.lstrip().startswith(_CLOSED)
            return header + _rebuilt(prompt, completion, language, closed_by_tests=closed) + "\n" + test
        return header + prompt + "\n" + completion + "\n" + test


def _python_test(row: Mapping[str, Any]) -> str:
    """The row's test with the call of `check` that it may leave to the harness."""
    test = str(row["test"])
    return f"{test}\ncheck({_entry_point(row)})" if leaves_check_uncalled(test) else test


def _entry_point(row: Mapping[str, Any]) -> str:
    """The name of the function to write; empty where the row does not say."""
    return str(row.get("entry_point") or "").strip()


def _rebuilt(prompt: str, answer: str, language: str, *, closed_by_tests: bool) -> str:
    """The prompt's lines before the function, then the answer's own from its name on, ending as the tests expect."""
    block = code_block(answer, _FENCES.get(language, language))
    lines = [line for line in prompt.strip().splitlines() if line.strip()]
    place = _place_of_function(lines, language)
    if block is None or place is None:
        return f"{prompt}\n{answer}"
    if main := _MAINS.get(language):
        block = block.split(main)[0]
    opening = lines[place].split("(" if language == "python" else "{")[0].strip()
    start = block.lower().find(opening.lower())
    above = block[: max(start, 0)]
    indent = " " * (len(above) - len(above.rstrip(" ")) if start >= 0 else _INDENTS.get(language, 0))
    end = block.rfind(f"\n{indent}}}")
    body = block[len(above) : end if end >= 0 else len(block)]
    closing = "" if closed_by_tests or language == "python" else f"\n{indent}}}"
    return "\n".join(lines[:place]) + f"\n{body}{closing}\n"


def _place_of_function(lines: list[str], language: str) -> int | None:
    """Which of a prompt's lines opens the function to be completed."""
    if language != "python":
        return len(lines) - 1
    return max((place for place, line in enumerate(lines) if line.startswith("def ")), default=None)
