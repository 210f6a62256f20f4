"""The second pass over a shard: order the files of each repository, write its samples and the record of its drops."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from megacoder.corpus.accounts import Accounts
from megacoder.corpus.config import CorpusConfig
from megacoder.corpus.dependencies import linked_files, repository_dependencies
from megacoder.corpus.documents import Dropped
from megacoder.corpus.drops import read_drops
from megacoder.corpus.samples import plan_samples, render, rendered_bytes
from megacoder.corpus.shards import PARTS, TextReader, finished, parquet_writer, redoing
from megacoder.data.parquet import read_table

__all__ = ["WriteTask", "write_shard"]


@dataclass(frozen=True, kw_only=True)
class WriteTask:
    """One shard's second pass."""

    key: str
    """hash of the first pass's key and of what the steps decided"""
    scanned: Path
    """the first pass's result"""
    size: int
    """bytes of the documents"""
    name: str
    """name of the Parquet files written, one in each of `PARTS` at most"""
    drops: tuple[Path, ...]
    """files of what the steps dropped from `scanned`"""
    heldout: frozenset[str]
    """names of the repositories held out, or paths where `by_file`"""
    by_file: bool
    config: CorpusConfig

    @property
    def marker(self) -> Path:
        """What is marked as finished when the task is."""
        return self.scanned.with_name(f"written-{self.name}")


def write_shard(task: WriteTask) -> tuple[Accounts, dict[str, int]]:
    """Writes the shard's part of the corpus, unless done with the same key; returns its accounts, and files -> rows."""
    if done := finished(task.marker, task.key):
        return Accounts.from_plain(done["accounts"]), done["files"]
    accounts, rows = Accounts(), dict.fromkeys(PARTS, 0)
    with redoing(task.marker, task.key) as result:
        with ExitStack() as stack:
            writers: dict[str, Callable[[tuple[Any, ...], int], None]] = {}

            def add(part: str, row: tuple[Any, ...], size: int) -> None:
                if part not in writers:
                    path = task.config.out / part / f"{task.name}.parquet"
                    writers[part] = stack.enter_context(parquet_writer(path, PARTS[part]))
                writers[part](row, size)
                rows[part] += 1

            texts = stack.enter_context(closing(TextReader(task.scanned)))
            for repo in _repositories(task):
                _write_repository(repo, texts, task, accounts, add)
        files = {f"{part}/{task.name}.parquet": count for part, count in rows.items() if count}
        result.update(accounts=accounts.to_plain(), files=files)
    return accounts, files


@dataclass(frozen=True, kw_only=True)
class _Repository:
    name: str
    languages: dict[str, str]
    """every path with a known language"""
    documents: list[tuple[int, str, int]]
    """(row, path, bytes on disk), in path order"""
    license: str | None
    dropped: list[Dropped]


def _repositories(task: WriteTask) -> list[_Repository]:
    columns = ["repo", "license", "path", "language", "size", "stage", "reason", "detail"]
    table = read_table(task.scanned, columns)
    late = {row: drop for row, *drop in read_drops(task.drops)}
    found = []
    for name, grouped in groupby(
        enumerate(zip(*(table[column].to_pylist() for column in columns), strict=True)), key=lambda row: row[1][0]
    ):
        rows = list(grouped)
        license_ = next((row[1] for _, row in rows if row[1] is not None), None)
        repo = _Repository(name=name, languages={}, documents=[], license=license_, dropped=[])
        for row, (_, _, path, language, size, *drop) in rows:
            if language is not None:
                repo.languages[path] = language
            stage, reason, detail = late.get(row, drop)
            if stage is None:
                repo.documents.append((row, path, size))
            else:
                known = {"repo": name, "path": path, "language": language, "size": size}
                repo.dropped.append(Dropped(**known, stage=stage, reason=reason, detail=detail))
        found.append(repo)
    return found


def _write_repository(
    repo: _Repository,
    texts: TextReader,
    task: WriteTask,
    accounts: Accounts,
    add: Callable[[str, tuple[Any, ...], int], None],
) -> None:
    for item in repo.dropped:
        accounts.drop(item)
        add("dropped", (item.repo, item.path, item.language, item.size, item.stage, item.reason, item.detail), 0)
    num_samples = 0
    for part in ("train", "heldout"):
        held = part == "heldout"
        documents = [
            item for item in repo.documents if ((item[1] if task.by_file else repo.name) in task.heldout) == held
        ]
        samples, linked = _plan(repo, documents, texts, task.config)
        for sample in samples:
            accounts.multi_file_samples += len(sample) > 1
            accounts.separated_files += len(sample) == 1 and sample[0] in linked
            for row, path, size in (documents[node] for node in sample):
                language = repo.languages[path]
                text, style = texts[row], task.config.samples.comments
                content, num_bytes = render(path, text, language, style), rendered_bytes(path, text, language, style)
                add(
                    part,
                    (f"{repo.name}/{num_samples:05d}", repo.name, path, language, repo.license, content),
                    num_bytes,
                )
                accounts.keep(repo.name, language, size, heldout=held)
                accounts.written += num_bytes
            num_samples += 1
    accounts.repository(repo.name).samples = num_samples
    accounts.repository(repo.name).license = repo.license


def _plan(
    repo: _Repository, documents: list[tuple[int, str, int]], texts: TextReader, config: CorpusConfig
) -> tuple[list[list[int]], set[int]]:
    """The samples, and which files an edge leads from or to."""
    sizes: list[int] = []

    def files() -> Iterator[tuple[str, str]]:  # one reading of the texts serves both sizes and dependencies
        for row, path, _ in documents:
            text = texts[row]
            sizes.append(rendered_bytes(path, text, repo.languages[path], config.samples.comments))
            yield path, text

    depends_on = repository_dependencies(repo.languages, files())
    paths = [path for _, path, _ in documents]
    samples = plan_samples(paths, sizes, depends_on, config.samples, key=f"{config.seed}:{repo.name}")
    return samples, linked_files(depends_on)
