"""Benchmark files as test strings: JSONL (plain, .gz, .zst), JSON with a list, or Parquet; every field that holds text.

A test is named by its file and the name or id in its row, else by its place in the file.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from megacoder.core.errors import ConfigError, FormatError
from megacoder.core.text import is_unicode
from megacoder.data.jsonl import EMPTY_LINE, JsonRows, decompressed
from megacoder.data.parquet import read_table

__all__ = ["TestString", "fingerprint", "read_tests"]

_NAMES = ("task_id", "id", "question_id", "unique_id", "name")


@dataclass(frozen=True, kw_only=True)
class TestString:
    """One text of a benchmark's test."""

    __test__ = False  # pytest would collect a class of this name

    test: str
    """the file, and the test in it"""
    text: str


def read_tests(benchmarks: Sequence[Path], fields: Sequence[str]) -> list[TestString]:
    """The strings of all tests, those nested in lists and tables included; only from `fields` if any are given."""
    found: list[TestString] = []
    for path in benchmarks:
        some = False
        for place, row in enumerate(_rows(path)):
            if not isinstance(row, dict):
                raise FormatError(f"{path}: test {place} is {str(row)[:40]!r}, not a row of named fields")
            name = next((str(row[key]) for key in _NAMES if row.get(key) is not None), str(place))
            for key, value in row.items():
                if key not in _NAMES and (not fields or key in fields):
                    texts = list(_texts(value))
                    some |= bool(texts)
                    if not all(map(is_unicode, texts)):
                        raise FormatError(f"{path}: test {name}: {key!r} holds half a surrogate pair, not Unicode")
                    found += (TestString(test=f"{path.name} {name}", text=text) for text in texts)
        if not some:
            raise ConfigError(f"{path}: no test has text" + (f" in {', '.join(fields)}" if fields else ""))
    return found


def fingerprint(path: Path) -> str:
    """Identifies a benchmark's content; ConfigError if there is no such file."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:32]
    except OSError as error:
        raise ConfigError(f"benchmark {str(path)!r}: {error.strerror}") from None


def _rows(path: Path) -> Iterator[Any]:
    try:
        path.stat()
        name = path.name.lower()
        if name.endswith(".parquet"):
            yield from read_table(path).to_pylist()
        elif name.removesuffix(".gz").removesuffix(".zst").endswith(".json"):
            with path.open("rb") as raw, decompressed(path, raw) as file:
                whole = json.load(file)
            yield from whole if isinstance(whole, list) else [whole]
        else:
            for number, _, row in JsonRows(path):
                if row != EMPTY_LINE:
                    if isinstance(row, str):
                        raise ValueError(f"line {number}: {row}")
                    yield row
    except FileNotFoundError as error:
        raise ConfigError(f"benchmark {str(path)!r}: {error.strerror}") from None
    except (OSError, ValueError, RecursionError, pa.ArrowException) as error:
        raise FormatError(f"{path}: neither JSONL, JSON nor Parquet: {error}") from None


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _texts(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _texts(inner)
