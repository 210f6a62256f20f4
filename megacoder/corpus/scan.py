"""The first pass over a shard: read its repositories, run the document stages, leave what the global steps need."""

from dataclasses import dataclass
from pathlib import Path

from megacoder.corpus.config import CorpusConfig
from megacoder.corpus.dedup import digest
from megacoder.corpus.documents import Dropped, run_stages
from megacoder.corpus.shards import SCAN_SCHEMA, finished, parquet_writer, redoing
from megacoder.corpus.sources import Repository, read_repository
from megacoder.corpus.stages import scan_stages

__all__ = ["ScanTask", "scan_shard"]


@dataclass(frozen=True, kw_only=True)
class ScanTask:
    """One shard's first pass."""

    key: str
    """hash of the configuration and of the files' names, sizes and times"""
    repositories: tuple[Repository, ...]
    """in name order"""
    size: int
    """bytes to read"""
    target: Path
    """Parquet file in `SCAN_SCHEMA`: repositories in name order, within each the documents in path order"""
    config: CorpusConfig


def scan_shard(task: ScanTask) -> None:
    """Writes `task.target`, unless an earlier run finished it with the same key."""
    if finished(task.target, task.key) is not None:
        return
    config, stages = task.config, scan_stages(task.config)
    with redoing(task.target, task.key), parquet_writer(task.target, SCAN_SCHEMA) as add:
        for repository in task.repositories:
            items = read_repository(
                repository,
                languages=config.selected_languages,
                max_file_bytes=config.max_file_bytes,
                max_repo_bytes=config.max_repo_bytes,
                exclude=config.out,
                seed=config.seed,
            )
            for item in run_stages(items, stages):
                row = (item.repo, item.path, item.language, item.size)
                if isinstance(item, Dropped):
                    add((*row, item.stage, item.reason, item.detail, None, None), 0)
                else:
                    add((*row, None, None, None, digest(item.text), item.text), item.size)
