"""Held-out text: source files as `megacoder corpus build` writes them, or any documents.

The corpus is Parquet, one row per file. A row's content begins with the comment that names its path; rows of a sample
are consecutive, and their contents concatenate to what a model is trained on as one document.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from megacoder.core.errors import DataError, FormatError
from megacoder.data.documents import DocumentReader, find_inputs
from megacoder.data.parquet import read_rows

__all__ = ["SourceFile", "read_source_files", "read_texts", "sample_texts"]


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceFile:
    """One row."""

    sample: str
    """files with the same sample are one training document"""
    repo: str
    path: str
    """within the repository"""
    language: str
    """a name of `megacoder.corpus.languages`"""
    content: str
    """path comment and text"""


_COLUMNS = list(SourceFile.__dataclass_fields__)


def read_source_files(paths: Sequence[Path]) -> Iterator[SourceFile]:
    """The files in `paths`, Parquet files or folders of them, in order.

    Raises DataError for no path or one with nothing in it, and FormatError for a file that is not such a Parquet file.
    """
    if not paths:
        raise DataError("no held-out data: name Parquet files, or folders of them, as `corpus build` writes them")
    for shard in find_inputs(paths, suffixes=(".parquet",)):
        for number, row in enumerate(read_rows(shard, _wanted)):
            if isinstance(row, str):
                raise DataError(f"{shard}: row {number}: {row}")
            if not all(isinstance(value, str) for value in row.values()):
                raise FormatError(f"{shard}: a row whose columns are not all text: {str(row)[:80]}")
            yield SourceFile(**row)


def sample_texts(files: Iterable[SourceFile]) -> list[str]:
    """The documents that `files` make up: the contents of each sample, concatenated."""
    return ["".join(file.content for file in group) for _, group in groupby(files, key=lambda file: file.sample)]


def read_texts(paths: Sequence[Path], *, text_key: str, document_key: str | None) -> list[str]:
    """The documents in Parquet, JSONL or .jsonl.zst files, or folders of them: the texts at `text_key`.

    Consecutive rows that are equal at `document_key` are one document; by default that is `sample` in Parquet, and in
    JSONL each row is one. Raises DataError or FormatError that names the file and row.
    """
    if not paths:
        raise DataError("no held-out data: name Parquet or JSONL files, or folders of them")
    texts = []
    for path in find_inputs(paths):
        key = document_key or ("sample" if path.suffix == ".parquet" else None)
        texts += ["".join(parts) for parts in DocumentReader(path, text_key=text_key, document_key=key)]
    return texts


def _wanted(shard: Path, columns: list[str]) -> list[str]:
    if missing := [name for name in _COLUMNS if name not in columns]:
        raise FormatError(f"{shard}: no column {missing[0]!r}; expected what `corpus build` writes")
    return _COLUMNS
