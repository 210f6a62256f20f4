"""Single-line infilling (SantaCoder's set, arXiv:2301.03988): the missing line must be the same, per language.

Rows have `prompt`, `suffix` and `canonical_solution`; white space around the line does not count.
"""

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

from megacoder.evaluate.benchmarks.base import Task, TextBenchmark
from megacoder.evaluate.similarity import edit_similarity

__all__ = ["Infilling"]


class Infilling(TextBenchmark):
    name = "infill"
    fields: ClassVar = {"prompt": str, "suffix": str, "canonical_solution": str}
    max_new_tokens = 64
    stops = ("\n",)

    def tasks(self, rows: Sequence[dict[str, Any]]) -> Iterable[Task]:
        for number, row in enumerate(rows):
            yield Task(
                id=str(row.get("task_id", number)), prompt=row["prompt"], suffix=row["suffix"],
                group=str(row.get("language", "")), row=row,
            )  # fmt: skip

    def scores(self, task: Task, completion: str) -> dict[str, float]:
        answer, truth = completion.strip(), task.row["canonical_solution"].strip()
        return {"exact_match": float(answer == truth), "edit_similarity": edit_similarity(answer, truth)}
