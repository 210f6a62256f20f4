"""What the records of dropped files tell beyond the counts: clusters of near copies, and contamination.

Read back from a finished corpus, batch by batch; memory holds a name for each copy and each hit.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset as ds

from megacoder.core.errors import CorpusError, FormatError
from megacoder.corpus.accounts import CorpusReport, Count
from megacoder.corpus.decontamination import Decontamination, read_hits
from megacoder.corpus.near_dedup import NearDedup, read_copy
from megacoder.data.parquet import open_dataset

__all__ = ["Cluster", "Contaminated", "Copy", "Findings", "read_findings", "read_part"]


@dataclass(frozen=True, kw_only=True)
class Copy:
    """A repository or a file that was dropped as a near copy."""

    name: str
    similarity: float
    """estimated, to the kept one"""
    count: Count = field(default_factory=Count)


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Near copies of one repository or file."""

    level: str
    """what was compared: `repository` or `file`"""
    keeper: str
    copies: tuple[Copy, ...]
    """by name"""

    def to_plain(self) -> dict[str, Any]:
        """For JSON."""
        copies = [
            {"name": copy.name, "similarity": copy.similarity, "files": copy.count.files, "bytes": copy.count.bytes}
            for copy in self.copies
        ]
        return {"level": self.level, "keeper": self.keeper, "copies": copies}


@dataclass(frozen=True, kw_only=True)
class Contaminated:
    """A file that was dropped because it holds pieces of tests."""

    repo: str
    path: str
    reason: str
    hits: tuple[tuple[str, str], ...]
    """(test, words that it shares with the file); the first 20"""

    def to_plain(self) -> dict[str, Any]:
        """For JSON."""
        hits = [{"test": test, "words": words} for test, words in self.hits]
        return {"repository": self.repo, "path": self.path, "reason": self.reason, "hits": hits}


@dataclass(frozen=True, kw_only=True)
class Findings:
    """All findings of a corpus."""

    clusters: tuple[Cluster, ...]
    """the largest first"""
    contaminated: tuple[Contaminated, ...]
    """in corpus order"""


def read_findings(out: Path, report: CorpusReport) -> Findings:
    """The near copies and the contamination that the corpus in `out` records; FormatError for a damaged file."""
    found: dict[tuple[str, str], dict[str, Copy]] = {}
    contaminated = []
    columns = ["repo", "path", "size", "stage", "reason", "detail"]
    (near,), screened = NearDedup.names, Decontamination.name
    for row in read_part(out, report, "dropped", columns, where=("stage", [near, screened])):
        repo, path, reason = row["repo"], row["path"], row["reason"]
        if row["stage"] == screened:
            hits = tuple(read_hits(row["detail"]))
            contaminated.append(Contaminated(repo=repo, path=path, reason=reason, hits=hits))
            continue
        level = reason.rpartition(" ")[2]
        name = repo if level == "repository" else f"{repo}/{path}"
        keeper, similarity = read_copy(row["detail"])
        copies = found.setdefault((level, keeper), {})
        copies.setdefault(name, Copy(name=name, similarity=similarity)).count.add(row["size"])
    clusters = [
        Cluster(level=level, keeper=keeper, copies=tuple(copies[name] for name in sorted(copies)))
        for (level, keeper), copies in found.items()
    ]
    clusters.sort(key=lambda cluster: (-len(cluster.copies), cluster.level, cluster.keeper))
    return Findings(clusters=tuple(clusters), contaminated=tuple(contaminated))


def read_part(
    out: Path, report: CorpusReport, part: str, columns: Sequence[str], *, where: tuple[str, Collection[str]]
) -> Iterator[dict[str, Any]]:
    """The rows of `train`, `heldout` or `dropped` whose column has one of the values, in order, a batch at a time."""
    column, values = where
    for name in report.files:
        if not name.startswith(f"{part}/"):
            continue
        try:
            file = open_dataset(out / name)
            for batch in file.to_batches(columns=list(columns), filter=ds.field(column).isin(list(values))):
                yield from batch.to_pylist()
        except FileNotFoundError:
            raise CorpusError(f"{out / name} is missing; run the same `corpus build` again") from None
        except (OSError, pa.ArrowException) as error:
            raise FormatError(f"{out / name}: not a part of a corpus: {str(error).splitlines()[0]}") from None
