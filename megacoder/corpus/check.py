"""Document stages as a step: those too slow to run on more files than dedup leaves.

They judge a document and may not change it: the text is written as the scan stored it.
"""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np

from megacoder.corpus.config import CorpusConfig
from megacoder.corpus.documents import Document, Dropped, Stage, run_stages
from megacoder.corpus.drops import Drop, DropFile, write_drops_once
from megacoder.corpus.shards import TextReader
from megacoder.corpus.steps import RunTasks, Shard

__all__ = ["DocumentPass", "check_shard"]


@dataclass(frozen=True, kw_only=True)
class _CheckTask:
    shard: Shard
    stages: tuple[Stage, ...]

    @property
    def size(self) -> int:
        return self.shard.size

    @property
    def target(self) -> Path:
        """The file of drops."""
        return self.shard.beside(f"dropped-{'-'.join(stage.name for stage in self.stages)}")


class DocumentPass:
    """Runs document stages over the kept files; a `Step`."""

    def __init__(self, stages: Sequence[Stage]) -> None:
        self._stages = tuple(stages)
        self.names = tuple(stage.name for stage in self._stages)

    def __call__(self, shards: Sequence[Shard], config: CorpusConfig, run: RunTasks) -> list[DropFile | None]:
        """What the stages drop from each shard."""
        return run(check_shard, [_CheckTask(shard=shard, stages=self._stages) for shard in shards], "checking")


def check_shard(task: _CheckTask) -> DropFile | None:
    """What the stages drop from one shard; the result is kept for a later call with the same shard."""
    return write_drops_once(task.target, task.shard.key, lambda: _check(task))


def _check(task: _CheckTask) -> list[Drop]:
    kept = task.shard.kept()
    table, rows = task.shard.columns(["repo", "path", "language", "size"], kept), kept.tolist()
    with closing(TextReader(task.shard.scanned)) as texts:
        documents = (Document(text=texts[row], **fields) for row, fields in zip(rows, table.to_pylist(), strict=True))
        items = zip(rows, run_stages(documents, task.stages), strict=True)
        dropped = [(item.stage, item.reason, row, item.detail) for row, item in items if isinstance(item, Dropped)]
    dropped.sort(key=lambda drop: drop[:3])
    drops = []
    for (stage, reason), group in groupby(dropped, key=lambda drop: drop[:2]):
        _, _, places, details = zip(*group, strict=True)
        told = tuple(detail or "" for detail in details)
        drops.append(Drop(stage=stage, reason=reason, rows=np.array(places, np.int64), details=told))
    return drops
