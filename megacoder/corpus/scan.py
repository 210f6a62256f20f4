"""The first pass over a shard: read its repositories, run the scan stages, write what the steps need."""

import heapq
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megacoder.corpus.config import CorpusConfig
from megacoder.corpus.dedup import digest
from megacoder.corpus.documents import Document, Dropped, run_stages
from megacoder.corpus.shards import SCAN_SCHEMA, finished, parquet_writer, redoing
from megacoder.corpus.sources import Source
from megacoder.corpus.stages import scan_stages
from megacoder.corpus.tables import read_rows

__all__ = ["ScanTask", "scan_shard"]


@dataclass(frozen=True, kw_only=True)
class ScanTask:
    """One shard's first pass."""

    key: str
    """hash of the configuration and of the files' names, sizes and times"""
    sources: tuple[Source, ...]
    """repositories in folders and archives, in name order"""
    rows: tuple[tuple[Path, tuple[int, ...]], ...]
    """row groups of gathered tables that hold the other repositories"""
    row_repositories: tuple[str, ...]
    """names of those repositories, in order"""
    size: int
    """bytes to read"""
    target: Path
    """Parquet file in `SCAN_SCHEMA`: repositories in name order, within each the documents in path order"""
    config: CorpusConfig


def scan_shard(task: ScanTask) -> None:
    """Writes `task.target`, unless an earlier run finished it with the same key."""
    if finished(task.target, task.key) is not None:
        return
    stages = scan_stages(task.config)
    with redoing(task.target, task.key), parquet_writer(task.target, SCAN_SCHEMA, passing=True) as add:
        for items in _repositories(task):
            for item in run_stages(items, stages):
                row = (item.repo, item.path, item.language, item.size)
                if isinstance(item, Dropped):
                    add((*row, None, item.stage, item.reason, item.detail, None, None), 0)
                else:
                    add((*row, item.license, None, None, None, digest(item.text), item.text), item.size)


def _repositories(task: ScanTask) -> Iterator[Iterator[Document | Dropped]]:
    """The files of each repository, in name order; consume each one before advancing to the next."""
    selection = task.config.selection
    from_sources = ((source.name, source.read(selection)) for source in task.sources)
    from_rows = read_rows(task.rows, task.row_repositories, selection) if task.row_repositories else iter(())
    for _, items in heapq.merge(from_sources, from_rows, key=lambda named: named[0]):
        yield items
