"""CrossCodeEval (arXiv:2310.11248): the next statement, whose names are defined in other files.

Prompt and answer have at most 2,048 tokens, 50 of them the answer. With retrieval, the data's own pieces of other files
come before the prompt as comments: whole ones, best first, at most 512 tokens of them.

Scores are those of the published `eval_metric.py`. Of a Python answer the first statement counts, up to the first line
break before which prompt and answer parse; in Java, TypeScript and C# all up to the first semicolon or brace. Comments,
blank lines and white space around lines do not count for an exact match. Edit similarity is difflib's ratio in whole
percent: fuzzywuzzy's, as its published requirements install it.
"""

import re
from collections.abc import Iterable, Sequence
from difflib import SequenceMatcher
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, ClassVar

from megacoder.core.errors import ConfigError
from megacoder.evaluate.benchmarks.base import Settings, Task, TextBenchmark
from megacoder.evaluate.sandbox.languages import short_name

if TYPE_CHECKING:
    import tree_sitter

__all__ = ["CrossCode", "first_statement"]

_SUFFIXES = {".py": "python", ".java": "java", ".ts": "ts", ".tsx": "ts", ".cs": "cs"}
_COMMENTS = {"python": "#", "java": "//", "ts": "//", "cs": "//"}
"""What begins a comment, for the languages that the benchmark has."""


class CrossCode(TextBenchmark):
    name = "crosscode"
    fields: ClassVar = {"prompt": str, "groundtruth": str}
    max_new_tokens = 50
    max_prompt_tokens = 1998

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self.language = short_name(settings.language)
        if self.language not in _COMMENTS:
            raise ConfigError(f"--language {settings.language}: crosscode has {', '.join(_COMMENTS)}")

    def tasks(self, rows: Sequence[dict[str, Any]]) -> Iterable[Task]:
        for number, row in enumerate(rows):
            about = row["metadata"] if isinstance(row.get("metadata"), dict) else {}
            title, pieces = self._context(row.get("crossfile_context")) if self.settings.retrieval else ("", ())
            suffix = PurePath(str(about.get("file"))).suffix
            yield Task(
                id=str(row.get("task_id", about.get("task_id", number))), prompt=row["prompt"], context=pieces,
                context_title=title, row={"language": _SUFFIXES.get(suffix, suffix), **row},
            )  # fmt: skip

    def scores(self, task: Task, completion: str) -> dict[str, float]:
        answer = _without_comments(first_statement(task.prompt, completion, self.language))
        truth = _without_comments(task.row["groundtruth"])
        return {"exact_match": float(_lines(answer) == _lines(truth)), "edit_similarity": _ratio(answer, truth)}

    def _context(self, found: object) -> tuple[str, tuple[str, ...]]:
        """Title and pieces of a row's `crossfile_context`; the lines of its text where it does not list pieces."""
        if not isinstance(found, dict):
            return "", tuple(str(found or "").splitlines(keepends=True))
        if not isinstance(found.get("list"), list):
            return "", tuple(str(found.get("text") or "").splitlines(keepends=True))
        mark = _COMMENTS[self.language]
        title = f"{mark} Here are some relevant code fragments from other files of the repo:\n\n"
        return title, tuple(_piece(mark, each["filename"], each["retrieved_chunk"]) for each in found["list"])


def first_statement(prompt: str, answer: str, language: str) -> str:
    """What counts of an answer to `prompt`."""
    if language == "python":
        ends = (place for place, character in enumerate(answer) if character == "\n" and place)
        end = next((place for place in ends if _parses(prompt + answer[:place])), None)
        return answer if end is None else answer[:end].rstrip()
    found = re.search("[;{}]", answer)
    return answer[: found.end()] if found and found.start() else answer  # at the very start it ends nothing, as there


def _parses(code: str) -> bool:
    """Whether tree-sitter's Python grammar finds no error; what it only misses is none."""
    import tree_sitter_language_pack  # late: most evaluations need no grammar

    nodes = [tree_sitter_language_pack.get_parser("python").parse(code.encode()).root_node]
    while nodes:
        node: tree_sitter.Node = nodes.pop()
        if node.type == "ERROR":
            return False
        if node.has_error:
            nodes += node.children
    return True


def _piece(mark: str, path: str, code: str) -> str:
    lines = [f"{mark} {line}" for line in code.split("\n") if line]
    return "\n".join([f"{mark} the below code fragment is found in {path}", *lines]) + "\n\n"


def _without_comments(code: str) -> str:
    """`code` up to the first # or // of every line, whatever the language, as in the published script."""
    return re.sub("(#|//).*", "", code)


def _lines(code: str) -> list[str]:
    return [line.strip() for line in code.split("\n") if line.strip()]


def _ratio(answer: str, truth: str) -> float:
    answer, truth = answer.strip(), truth.strip()
    return round(100 * SequenceMatcher(None, answer, truth).ratio()) / 100
