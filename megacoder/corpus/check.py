"""Document stages as a step: those that are worth their time only on files that dedup has left.

They judge a document and may not change it: its text is written as the scan left it.
"""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np

from megacoder.corpus.config import CorpusConfig
from megacoder.corpus.documents import Document, Dropped, Stage, run_stages
from megacoder.corpus.shards import TextReader, finished, redoing
from megacoder.corpus.steps import Drop, RunTasks, Shard

__all__ = ["DocumentPass", "check_shard"]


@dataclass(frozen=True, kw_only=True)
class _CheckTask:
    shard: Shard
    stages: tuple[Stage, ...]

    @property
    def size(self) -> int:
        return self.shard.size

    @property
    def marker(self) -> Path:
        """What the finished task is remembered by."""
        names = "-".join(stage.name for stage in self.stages)
        return self.shard.scanned.with_name(f"checked-{names}-{self.shard.name}")


class DocumentPass:
    """Runs document stages over what is kept; a `Step`."""

    def __init__(self, stages: Sequence[Stage]) -> None:
        self._stages = tuple(stages)
        self.names = tuple(stage.name for stage in self._stages)

    def __call__(self, shards: Sequence[Shard], config: CorpusConfig, run: RunTasks) -> list[list[Drop]]:
        """What the stages drop from each shard."""
        return run(check_shard, [_CheckTask(shard=shard, stages=self._stages) for shard in shards], "checking")


def check_shard(task: _CheckTask) -> list[Drop]:
    """What the stages drop from one shard, remembered for a later call with the same shard."""
    found = finished(task.marker, task.shard.key)
    if found is None:
        with redoing(task.marker, task.shard.key) as found:
            found["drops"] = _check(task)
    return [
        Drop(stage=stage, reason=reason, rows=np.array(rows, np.int64), details=tuple(details))
        for stage, reason, rows, details in found["drops"]
    ]


def _check(task: _CheckTask) -> list[tuple[str, str, list[int], list[str]]]:
    table = task.shard.columns(["repo", "path", "language", "size"])
    rows = task.shard.kept.tolist()
    with closing(TextReader(task.shard.scanned, "text")) as texts:
        documents = (Document(text=texts[row], **fields) for row, fields in zip(rows, table.to_pylist(), strict=True))
        items = zip(rows, run_stages(documents, task.stages), strict=True)
        dropped = [(item.stage, item.reason, row, item.detail) for row, item in items if isinstance(item, Dropped)]
    dropped.sort(key=lambda drop: drop[:3])
    return [
        (stage, reason, [row for _, _, row, _ in group], [detail or "" for _, _, _, detail in group])
        for (stage, reason), group in ((key, list(drops)) for key, drops in groupby(dropped, key=lambda drop: drop[:2]))
    ]
