"""CrossCodeEval (arXiv:2310.11248): the next statement, whose names are defined in other files.

With retrieval, at most 512 tokens of the data's own retrieved code come before the prompt; prompt and answer have at
most 2,048 tokens, 50 of them the answer. Of an answer the first statement counts: lines up to where brackets are
closed. White space around lines does not count. Edit similarity is the published one: twice the longest common
subsequence over the sum of both lengths.
"""

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

from megacoder.evaluate.benchmarks.base import Task, TextBenchmark
from megacoder.evaluate.similarity import common_ratio

__all__ = ["CrossCode", "first_statement"]


class CrossCode(TextBenchmark):
    name = "crosscode"
    fields: ClassVar = {"prompt": str, "groundtruth": str}
    max_new_tokens = 50
    max_prompt_tokens = 1998

    def tasks(self, rows: Sequence[dict[str, Any]]) -> Iterable[Task]:
        for number, row in enumerate(rows):
            about, context = row.get("metadata"), row.get("crossfile_context")
            task_id = str(row.get("task_id", about.get("task_id", number) if isinstance(about, dict) else number))
            text = str(context.get("text") or "") if isinstance(context, dict) else str(context or "")
            yield Task(id=task_id, prompt=row["prompt"], context=text if self.settings.retrieval else "", row=row)

    def scores(self, task: Task, completion: str) -> dict[str, float]:
        answer, truth = _plain(first_statement(completion)), _plain(task.row["groundtruth"])
        return {"exact_match": float(answer == truth), "edit_similarity": common_ratio(answer, truth)}


def first_statement(text: str) -> str:
    """The first lines of `text` until every open bracket is closed, without blank lines in front."""
    taken: list[str] = []
    depth = 0
    for line in text.split("\n"):
        if not taken and not line.strip():
            continue
        taken.append(line)
        depth += sum(line.count(c) for c in "([{") - sum(line.count(c) for c in ")]}")
        if depth <= 0:
            break
    return "\n".join(taken)


def _plain(text: str) -> str:
    return "\n".join(line.strip() for line in text.strip().splitlines())
