"""HumanEval (arXiv:2107.03374) and its multilingual sets: complete a function from its signature and docstring.

Base models get the stripped prompt and no example; Python answers end at the next top-level statement, others at the
row's stop tokens. Chat models are asked for the complete function in a code block; it is put back under the prompt's
own lines, without any main. Python tests that define `check` and leave its call to the harness, as those of OpenAI's
own file do, get that call.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from megacoder.core.errors import ConfigError
from megacoder.evaluate.benchmarks.base import PYTHON_IMPORTS, ProgramBenchmark, Task, code_block
from megacoder.evaluate.benchmarks.python_tests import asserts, leaves_uncalled

__all__ = ["HumanEval"]

_REQUEST = (
    "Please continue to complete the function. You are not allowed to modify the given code and do the completion "
    "only. Please return all completed function in a codeblock. Here is the given code to do completion:\n"
    "```{language}\n{prompt}\n```"
)
_FENCES = {"cpp": "cpp", "cs": "csharp", "java": "java", "js": "javascript", "php": "php", "sh": "bash",
           "ts": "typescript", "python": "python"}  # fmt: skip
_MAINS = {"cpp": "int main()", "java": "public static void main", "cs": "static void Main", "rust": "fn main()",
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
_CLOSED = "}"
"""How a test text begins that closes the function itself."""


class HumanEval(ProgramBenchmark):
    name = "humaneval"
    fields: ClassVar = {"task_id": str, "prompt": str, "test": str}
    max_new_tokens = 500
    max_prompt_tokens = 4096

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
        if leaves_uncalled("check", row["test"]) and not _entry_point(row):
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
    return f"{test}\ncheck({_entry_point(row)})" if leaves_uncalled("check", test) else test


def _entry_point(row: Mapping[str, Any]) -> str:
    """The name of the function to write; empty where the row does not say."""
    return str(row.get("entry_point") or "").strip()


def _rebuilt(prompt: str, answer: str, language: str, *, closed_by_tests: bool) -> str:
    """The prompt's lines before the function, then the answer's own function, ending as the tests expect."""
    block = code_block(answer, _FENCES.get(language, language))
    block = answer if block is None else block
    main = _MAINS.get(language)
    if main and main in block:
        block = block[: block.index(main)]
    signature = _signature(prompt, language)
    name = re.search(r"(\w+)\s*(?:\(|\{|=)", signature)
    at = block.find(name.group(1)) if name else -1
    if at < 0:
        return prompt + "\n" + block
    start = block.rfind("\n", 0, at) + 1
    body = block[start:]
    if closed_by_tests and "}" in body:
        indent = re.match(r"\s*", body)
        end = body.rfind("\n" + (indent.group() if indent else "") + "}")
        body = body[:end] if end >= 0 else body[: body.rindex("}")]
    before = prompt[: prompt.rstrip().rfind(signature)]
    imports = block[:start] if language == "python" else ""
    return before + imports + body


def _signature(prompt: str, language: str) -> str:
    """The line that opens the function to be completed."""
    lines = prompt.strip().splitlines()
    if language == "python":
        return next((line for line in reversed(lines) if line.startswith("def ")), lines[-1])
    return lines[-1]
