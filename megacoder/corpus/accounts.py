"""The corpus accounts: every file seen is either kept or dropped for one reason, counted in files and in bytes.

Each shard keeps its own accounts and the corpus's are their sum, so a shard that is redone is never counted twice.
Bytes are bytes on disk; only `written` includes the path comments and final line ends that are added.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megacoder.core.errors import ConfigError, CorpusError, DataError, FormatError
from megacoder.core.files import write_json
from megacoder.corpus.documents import Dropped

__all__ = [
    "Accounts",
    "CorpusReport",
    "Count",
    "RepositoryCount",
    "corpus_json",
    "heldout_repositories",
    "load_report",
    "save_report",
]

REPORT_NAME = "corpus.json"


@dataclass(kw_only=True)
class Count:
    """A number of files and their bytes on disk."""

    files: int = 0
    bytes: int = 0

    @property
    def megabytes(self) -> str:
        """The bytes as text, in MB."""
        return f"{self.bytes / 1e6:,.2f} MB"

    def add(self, size: int, files: int = 1) -> None:
        """Counts `files` more files of `size` bytes together."""
        self.files += files
        self.bytes += size


@dataclass(kw_only=True)
class RepositoryCount:
    """One repository's share of the accounts."""

    seen: Count = field(default_factory=Count)
    kept: Count = field(default_factory=Count)
    samples: int = 0
    heldout: Count = field(default_factory=Count)
    """of the kept files, those held out"""
    license: str | None = None
    """an SPDX expression; None where no file was kept, or no license is known"""


@dataclass(kw_only=True)
class Accounts:
    """What became of the files of some shards."""

    dropped: dict[str, dict[str, Count]] = field(default_factory=dict)
    """stage -> reason -> files"""
    languages: dict[str, Count] = field(default_factory=dict)
    """kept files by language"""
    repositories: dict[str, RepositoryCount] = field(default_factory=dict)
    """by name"""
    multi_file_samples: int = 0
    separated_files: int = 0
    """files that are a sample each although files of their repository depend on them or they on these: their group
    exceeds the size limit of a sample"""
    written: int = 0
    """bytes of the contents written, path comments included"""

    def drop(self, item: Dropped) -> None:
        """Counts a dropped file."""
        self.dropped.setdefault(item.stage, {}).setdefault(item.reason, Count()).add(item.size)
        self.repository(item.repo).seen.add(item.size)

    def keep(self, repo: str, language: str, size: int, *, heldout: bool) -> None:
        """Counts a written file."""
        self.languages.setdefault(language, Count()).add(size)
        repository = self.repository(repo)
        repository.seen.add(size)
        repository.kept.add(size)
        if heldout:
            repository.heldout.add(size)

    def repository(self, name: str) -> RepositoryCount:
        """The repository's count, created if missing."""
        return self.repositories.setdefault(name, RepositoryCount())

    def merge(self, other: "Accounts") -> None:
        """Adds another shard's accounts; shards hold whole repositories, so no repository is in both."""
        for stage, reasons in other.dropped.items():
            for reason, count in reasons.items():
                self.dropped.setdefault(stage, {}).setdefault(reason, Count()).add(count.bytes, count.files)
        for language, count in other.languages.items():
            self.languages.setdefault(language, Count()).add(count.bytes, count.files)
        self.repositories.update(other.repositories)
        self.multi_file_samples += other.multi_file_samples
        self.separated_files += other.separated_files
        self.written += other.written

    @property
    def seen(self) -> Count:
        """All files seen."""
        return _sum(repository.seen for repository in self.repositories.values())

    @property
    def kept(self) -> Count:
        """All files written."""
        return _sum(repository.kept for repository in self.repositories.values())

    @property
    def heldout(self) -> Count:
        """Of the kept files, those held out."""
        return _sum(repository.heldout for repository in self.repositories.values())

    @property
    def num_samples(self) -> int:
        """Training and held-out samples together."""
        return sum(repository.samples for repository in self.repositories.values())

    def rows(self, split_unit: str) -> list[tuple[str, Count]]:
        """The account of every file, for a table: seen, what each stage dropped and why, kept, held out."""
        rows = [("seen", self.seen)]
        for stage, reasons in self.dropped.items():
            ordered = sorted(reasons.items(), key=lambda item: -item[1].files)
            rows += [(f"- {stage}: {reason}", count) for reason, count in ordered]
        return [*rows, ("= kept", self.kept), (f"  of it held out, by {split_unit}", self.heldout)]

    def to_plain(self) -> dict[str, Any]:
        """As nested plain values for JSON, totals included; `from_plain` reads it back."""
        return {
            "seen": asdict(self.seen),
            "kept": asdict(self.kept),
            "heldout": asdict(self.heldout),
            "samples": self.num_samples,
            "multi_file_samples": self.multi_file_samples,
            "separated_files": self.separated_files,
            "written_bytes": self.written,
            "dropped": {stage: _counts_to_plain(reasons) for stage, reasons in self.dropped.items() if reasons},
            "languages": _counts_to_plain(self.languages),
            "repositories": {name: asdict(row) for name, row in sorted(self.repositories.items())},
        }

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> "Accounts":
        """The accounts that `to_plain` wrote; KeyError or TypeError for anything else."""
        return cls(
            dropped={stage: _counts_from_plain(reasons) for stage, reasons in plain["dropped"].items()},
            languages=_counts_from_plain(plain["languages"]),
            repositories={
                name: RepositoryCount(
                    seen=Count(**row["seen"]),
                    kept=Count(**row["kept"]),
                    heldout=Count(**row["heldout"]),
                    samples=row["samples"],
                    license=row["license"],
                )
                for name, row in plain["repositories"].items()
            },
            multi_file_samples=plain["multi_file_samples"],
            separated_files=plain.get("separated_files", 0),
            written=plain["written_bytes"],
        )


@dataclass(frozen=True, kw_only=True)
class CorpusReport:
    """The content of `corpus.json`."""

    key: str
    """identifies inputs and configuration; equal keys mean equal output"""
    config: dict[str, Any]
    """the part of the configuration that decides the output"""
    split_unit: str
    """what was held out: 'repository'; 'file' where there was only one repository; 'none'"""
    accounts: Accounts
    files: dict[str, int]
    """the Parquet files written, relative to the corpus folder -> rows"""


def save_report(report: CorpusReport, out: Path) -> None:
    """Writes `out/corpus.json`, atomically; its presence says that the corpus is complete."""
    write_json(out / REPORT_NAME, corpus_json(report))


def corpus_json(report: CorpusReport) -> dict[str, Any]:
    """The content of `corpus.json`, as plain values."""
    own = {"key": report.key, "config": report.config, "split_unit": report.split_unit, "files": report.files}
    return own | report.accounts.to_plain()


def heldout_repositories(out: Path) -> frozenset[str]:
    """Those of the corpus in `out`; ConfigError where it holds out files of them, or is not there."""
    try:
        report = load_report(out)
    except DataError as error:
        raise ConfigError(f"heldout.like = {str(out)!r}: {error}") from None
    if report.split_unit == "file":
        raise ConfigError(f"heldout.like = {str(out)!r}: it holds out files, not repositories, since it has only one")
    return frozenset(name for name, row in report.accounts.repositories.items() if row.heldout.files)


def load_report(out: Path) -> CorpusReport:
    """Reads `out/corpus.json`; CorpusError if there is none, FormatError if it is not a corpus report."""
    path = out / REPORT_NAME
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
        own = {name: plain[name] for name in ("key", "config", "split_unit", "files")}
        return CorpusReport(accounts=Accounts.from_plain(plain), **own)
    except (FileNotFoundError, NotADirectoryError):
        raise CorpusError(f"{str(out)!r} holds no finished corpus: there is no {REPORT_NAME}") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise FormatError(f"{path}: not a corpus report: {error!r}") from None


def _sum(counts: Iterator[Count]) -> Count:
    total = Count()
    for count in counts:
        total.add(count.bytes, count.files)
    return total


def _counts_to_plain(counts: dict[str, Count]) -> dict[str, dict[str, int]]:
    return {name: asdict(count) for name, count in sorted(counts.items(), key=lambda item: (-item[1].bytes, item[0]))}


def _counts_from_plain(plain: dict[str, dict[str, int]]) -> dict[str, Count]:
    return {name: Count(**count) for name, count in plain.items()}
