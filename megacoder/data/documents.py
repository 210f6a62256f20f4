"""Rows of Parquet and JSONL files as documents: lists of texts, one for each file of a sample.

Consecutive rows with the same document key are the files of one document; without a key, or where it is null, each row
is a document.
Every fault of the input is reported in one line that says where it is.
"""

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from reprlib import repr as shown  # of a value of any size, as that of an input can be
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from megacoder.core.config import did_you_mean
from megacoder.core.errors import ConfigError, DataError, FormatError
from megacoder.core.text import is_unicode
from megacoder.data.jsonl import EMPTY_LINE, JsonRows
from megacoder.data.parquet import open_parquet

__all__ = ["SUFFIXES", "DocumentReader", "find_inputs"]

SUFFIXES = (".parquet", ".jsonl", ".jsonl.zst", ".jsonl.gz")
"""Names of input files end with one of these."""

_ROWS_AT_ONCE = 256
_BYTES_AT_ONCE = 1 << 24  # on average
_KEYS_COMPARED, _KEYS_SHOWN = 1000, 20  # of the keys of a row, in a message


def find_inputs(paths: Iterable[Path], *, suffixes: tuple[str, ...] = SUFFIXES) -> list[Path]:
    """The input files in `paths`, folders searched and sorted by name; DataError if a path has none."""
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = sorted(file for file in path.rglob("*") if file.name.endswith(suffixes) and file.is_file())
            if not inside:
                raise DataError(f"{path}: no {', '.join(suffixes)} files in this folder")
            found += inside
        elif not path.exists():
            raise DataError(f"{path}: no such file or folder")
        elif not path.name.endswith(suffixes):
            raise DataError(f"{path}: expected a name that ends with {', '.join(suffixes)}, or a folder of such files")
        else:
            found.append(path)
    if not found:
        raise ConfigError("no input; give --input one or more files or folders")
    return found


class DocumentReader:
    """Iterates over the documents of one file; `fraction` says how much of the file has been read."""

    def __init__(self, path: Path, *, text_key: str, document_key: str | None = None) -> None:
        self.path, self.text_key, self.document_key = path, text_key, document_key
        self.fraction = 0.0

    def __iter__(self) -> Iterator[list[str]]:
        """Texts of the files of each document. Raises DataError or FormatError that names the file and the row."""
        rows = self._parquet_rows() if self.path.suffix == ".parquet" else self._json_rows()
        document: list[str] = []
        open_key: Any = None
        try:
            for place, (text, key) in rows:
                self._check_text(place, text)
                if document and (key is None or key != open_key):
                    yield document
                    document = []
                document.append(text)
                open_key = key
        except OSError as error:  # pyarrow's errors about damaged files are OSErrors or ValueErrors
            raise FormatError(f"{self.path}: not readable: {error.strerror or _one_line(error)}") from None
        if document:
            yield document
        self.fraction = 1.0

    def _check_text(self, place: str, text: Any) -> None:
        if not isinstance(text, str):
            raise DataError(f"{place}: {self.text_key!r} is {shown(text)}, expected text")
        if not is_unicode(text):
            raise DataError(f"{place}: {self.text_key!r} holds half a surrogate pair, not valid Unicode")

    def _parquet_rows(self) -> Iterator[tuple[str, tuple[Any, Any]]]:
        done = 0
        try:
            with open_parquet(self.path, page_checksums=True) as file:
                columns = [self.text_key, *([self.document_key] if self.document_key is not None else [])]
                for column in columns:
                    self._check_key(str(self.path), "column", column, file.schema_arrow.names)
                for batch in file.iter_batches(_rows_at_once(file.metadata), columns=columns):
                    texts = batch.column(self.text_key).to_pylist()
                    keys = batch.column(self.document_key).to_pylist() if self.document_key else [None] * len(texts)
                    for row, pair in enumerate(zip(texts, keys, strict=True), start=done):
                        yield f"{self.path}: row {row}", pair
                    done += len(texts)
                    self.fraction = done / file.metadata.num_rows
        except UnicodeDecodeError as error:
            raise DataError(f"{self.path}: a text from row {done} on is not UTF-8 ({error.reason})") from None
        except pa.ArrowException as error:
            raise FormatError(f"{self.path}: not readable as Parquet: {_one_line(error)}") from None

    def _json_rows(self) -> Iterator[tuple[str, tuple[Any, Any]]]:
        rows = JsonRows(self.path)
        for number, _, row in rows:
            self.fraction = rows.fraction
            if row == EMPTY_LINE:
                continue
            place = f"{self.path}:{number}"
            if isinstance(row, str):
                raise DataError(f"{place}: {row}")
            for key in (self.text_key, self.document_key):
                if key is not None:
                    self._check_key(place, "key", key, row)
            yield place, (row[self.text_key], self.document_key and row[self.document_key])

    def _check_key(self, place: str, kind: str, key: str, known: Iterable[str]) -> None:
        if key not in known:
            names = list(itertools.islice(known, _KEYS_COMPARED))
            there = ", ".join([*map(shown, names[:_KEYS_SHOWN]), *["..."][: len(names) > _KEYS_SHOWN]])
            hint = did_you_mean(key, names, otherwise=f"; there are {there or 'none'}")
            raise DataError(f"{place}: no {kind} {key!r}{hint}")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _rows_at_once(about: pq.FileMetaData) -> int:
    size = sum(about.row_group(index).total_byte_size for index in range(about.num_row_groups))
    return max(1, min(_ROWS_AT_ONCE, _BYTES_AT_ONCE * about.num_rows // max(size, 1)))
