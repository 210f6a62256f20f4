"""Conversations on disk: rows of JSONL or Parquet -> an indexed dataset whose sequences are asked and trained in turn.

The format needs no extension: a document is a conversation, its sequences 0, 2, 4, ... are asked, 1, 3, 5, ... are
trained. So the lengths of sequences tell which tokens are trained, on disk as in memory, and every tool that reads
`.bin/.idx` reads these too.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from megacoder.core.config import to_dict
from megacoder.core.errors import ConfigError, DataError, FormatError
from megacoder.core.files import making_dir, write_json
from megacoder.data.chat_format import ChatFormat, FormatConfig, rows_to_messages
from megacoder.data.documents import find_inputs
from megacoder.data.indexed import IndexedDatasetWriter, token_dtype
from megacoder.data.parquet import open_parquet
from megacoder.data.tokenizer import Tokenizer

__all__ = ["ConversationConfig", "Prepared", "prepare_conversations"]


_COLUMNS = ("messages", "instruction", "input", "output")


@dataclass(frozen=True, kw_only=True)
class ConversationConfig:
    """What instruction tuning reads."""

    train: tuple[Path, ...] = ()
    """JSONL or Parquet files, or folders of them, with `messages`, or `instruction` and `output`"""
    valid: tuple[Path, ...] = ()
    """the same for the held-out loss"""
    malformed: Literal["error", "skip"] = "error"
    """when a row is not a conversation, refuse to start (error), or skip and count it (skip)"""
    format: FormatConfig = field(default_factory=FormatConfig)
    """how conversations are written"""


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """What became of the inputs."""

    conversations: int
    tokens: int
    trained_tokens: int
    skipped: int
    """malformed rows"""
    first_skipped: str = ""
    """what was wrong with the first of them"""


def prepare_conversations(
    inputs: Sequence[Path], prefix: Path, tokenizer: Tokenizer, config: ConversationConfig
) -> Prepared:
    """Writes `prefix`.bin/.idx unless it is there, made from the same inputs in the same way.

    DataError naming file and line for a malformed row, or, where these are skipped, if there are no other rows; nothing
    is left on disk then.
    """
    files = find_inputs(inputs)
    made_of = _fingerprint(files, tokenizer, config)
    record = prefix.with_name(prefix.name + ".sft.json")
    if record.exists():
        there = json.loads(record.read_text(encoding="utf-8"))
        if there["made_of"] == made_of:
            return Prepared(**there["prepared"])
    record.unlink(missing_ok=True)  # from here on the dataset may be half-written
    with making_dir(prefix.parent):
        prepared = _write(files, prefix, ChatFormat(config.format, tokenizer), skip=config.malformed == "skip")
    write_json(record, {"made_of": made_of, "prepared": to_dict(prepared)})
    return prepared


def _write(files: Sequence[Path], prefix: Path, chat: ChatFormat, *, skip: bool) -> Prepared:
    count = tokens = trained = skipped = 0
    first = ""
    dtype = token_dtype(chat.tokenizer.vocab_size)
    with IndexedDatasetWriter(prefix, dtype=dtype) as writer:
        for where, row in (entry for file in files for entry in _rows(file)):
            try:
                if isinstance(row, str):
                    raise DataError(f"{where}: {row}")
                segments = chat.segments(rows_to_messages(row, where=where))
            except DataError as error:
                if not skip:
                    raise DataError(f'{error}; malformed = "skip" skips such rows') from None
                skipped, first = skipped + 1, first or str(error)
                continue
            writer.add_document([np.array(segment.ids, dtype=dtype) for segment in segments])
            count += 1
            tokens += sum(len(segment.ids) for segment in segments)
            trained += sum(len(segment.ids) for segment in segments if segment.trained)
        if not count:
            raise DataError(f"{files[0]}: no conversation in it" + (f"; the first error: {first}" if first else ""))
    return Prepared(conversations=count, tokens=tokens, trained_tokens=trained, skipped=skipped, first_skipped=first)


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any] | str]]:
    """(place, the row or what is wrong with the line)."""
    if path.suffix == ".parquet":
        yield from _parquet_rows(path)
        return
    with path.open("rb") as raw:
        lines: Any = raw
        if path.suffix == ".zst":
            lines = (line for line in pa.CompressedInputStream(pa.PythonFile(raw), "zstd").read().split(b"\n"))
        for number, line in enumerate(lines, start=1):
            yield f"{path}:{number}", _parse(line)


def _parse(line: bytes) -> dict[str, Any] | str:
    if not line.strip():
        return "an empty line"
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        return "not UTF-8"
    except json.JSONDecodeError as error:
        return f"malformed JSON: {error.msg.removesuffix(' at')} at character {error.pos + 1}"
    except ValueError as error:  # such as a number of thousands of digits
        return f"malformed JSON: {error}"
    except RecursionError:
        return "malformed JSON: nested too deeply"
    return row if isinstance(row, dict) else f"expected a JSON object, not {type(row).__name__}"


def _parquet_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        with open_parquet(path) as file:
            wanted = [
                name for name in ("messages", "instruction", "input", "output") if name in file.schema_arrow.names
            ]
            if not wanted:
                known = ", ".join(map(repr, file.schema_arrow.names))
                raise DataError(f"{path}: no column 'messages', nor 'instruction' and 'output'; there are {known}")
            number = 0
            for batch in file.iter_batches(256, columns=wanted):
                for row in batch.to_pylist():
                    yield f"{path}: row {number}", row
                    number += 1
    except (pa.ArrowInvalid, OSError) as error:
        raise FormatError(f"{path}: not readable as Parquet: {error}") from None


def _fingerprint(files: Sequence[Path], tokenizer: Tokenizer, config: ConversationConfig) -> str:
    if not files:
        raise ConfigError("no input")
    parts = [[str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    plain = {
        "files": parts, "tokenizer": tokenizer.digest, "format": to_dict(config.format.resolved),
        "malformed": config.malformed,
    }  # fmt: skip
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()
