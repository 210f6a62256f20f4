"""Which repositories go into which shard: consecutive ones in name order, up to a size.

The cut depends on the inputs and `shard_bytes` alone. The order of repositories does not depend on `shard_bytes`, so
the documents do not either, only how they are spread over files.
"""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from megacoder.core.errors import ConfigError
from megacoder.corpus.config import CorpusConfig
from megacoder.corpus.folder import WORK
from megacoder.corpus.inputs import Inputs
from megacoder.corpus.scan import ScanTask
from megacoder.corpus.sources import Inventory, Source
from megacoder.corpus.steps import RunTasks, hash_of
from megacoder.corpus.tables import Gathered, GatherTask, gather_table, row_groups

__all__ = ["gather_tables", "plan_scans", "table_states"]


def table_states(tables: Sequence[Path]) -> list[list[Any]]:
    """What identifies the tables as they are now: name, size, time."""
    return [[str(table), table.stat().st_size, table.stat().st_mtime_ns] for table in tables]


def gather_tables(inputs: Inputs, config: CorpusConfig, run: RunTasks) -> list[Gathered]:
    """Sorts every table by repository."""
    tasks = [
        GatherTask(
            key=hash_of([config.identity(), state]),
            table=table,
            size=state[1],
            target=config.out / WORK / f"gathered-{index:05d}",
            columns=config.columns,
            selection=config.selection,
        )
        for index, (table, state) in enumerate(zip(inputs.tables, table_states(inputs.tables), strict=True))
    ]
    return run(gather_table, tasks, "gathering") if tasks else []


def plan_scans(
    sources: Sequence[tuple[Source, Inventory]], gathered: Sequence[Gathered], key: str, config: CorpusConfig
) -> list[ScanTask]:
    """The scan task of every shard; `key` identifies all inputs. ConfigError if two repositories share a name."""
    rows: dict[str, int] = {}
    for table in gathered:
        for repo, size in table.sizes.items():
            rows[repo] = rows.get(repo, 0) + size
    named: list[tuple[str, int, tuple[Source, Inventory] | None]] = sorted(
        [
            *((source.name, found.size, (source, found)) for source, found in sources),
            *((repo, size, None) for repo, size in rows.items()),
        ],
        key=lambda item: item[0],
    )
    for before, after in pairwise(named):
        if before[0] == after[0]:
            places = " and ".join(str(item[2][0].identity()[1]) if item[2] else "a table" for item in (before, after))
            raise ConfigError(f"two repositories are called {after[0]!r}: {places}; rename one")
    shards: list[list[tuple[str, int, tuple[Source, Inventory] | None]]] = []
    room = 0
    for item in named:
        if not shards or item[1] > room:
            shards.append([])
            room = config.shard_bytes
        shards[-1].append(item)
        room -= item[1]
    return [_scan(index, shard, gathered, key, config) for index, shard in enumerate(shards)]


def _scan(
    index: int,
    shard: list[tuple[str, int, tuple[Source, Inventory] | None]],
    gathered: Sequence[Gathered],
    key: str,
    config: CorpusConfig,
) -> ScanTask:
    from_tables = [name for name, _, source in shard if source is None]
    sources = [source for _, _, source in shard if source is not None]
    runs = [run for table in gathered for run in table.runs]
    pieces = [(run.file, row_groups(run, from_tables[0], from_tables[-1])) for run in runs] if from_tables else []
    told = [[source.identity(), found.fingerprint] for source, found in sources]
    return ScanTask(
        key=hash_of([config.identity(), told, from_tables, key if from_tables else None]),
        sources=tuple(source for source, _ in sources),
        rows=tuple((file, groups) for file, groups in pieces if groups),
        row_repositories=tuple(from_tables),
        size=sum(size for _, size, _ in shard),
        target=config.out / WORK / f"scanned-{index:05d}.parquet",
        config=config,
    )
