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

from megacoder.core.config import to_dict
from megacoder.core.errors import ConfigError, DataError
from megacoder.core.files import making_dir, write_json
from megacoder.data.chat_format import ChatFormat, FormatConfig, rows_to_messages
from megacoder.data.documents import find_inputs
from megacoder.data.indexed import IndexedDatasetWriter, token_dtype
from megacoder.data.jsonl import EMPTY_LINE, JsonRows
from megacoder.data.parquet import read_rows
from megacoder.data.tokenizer import Tokenizer

__all__ = ["ConversationConfig", "Prepared", "prepare_conversations"]


_COLUMNS = ("messages", "instruction", "input", "output")
_MOST_NAMED = 5


@dataclass(frozen=True, kw_only=True)
class ConversationConfig:
    """What instruction tuning reads."""

    train: tuple[Path, ...] = ()
    """JSONL or Parquet files, or folders of them, with `messages`, or `instruction` and `output`"""
    valid: tuple[Path, ...] = ()
    """the same for the held-out loss"""
    malformed: Literal["error", "skip"] = "error"
    """when a row is not a conversation, refuse to start (error), or skip and count it (skip)"""
    too_long: Literal["cut", "skip", "error"] = "cut"
    """when a conversation is longer than a window, cut it at the right as the published script does (cut), skip it
    (skip), or refuse to start (error); all are counted"""
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
    unusable: int = 0
    """conversations longer than a window that are not trained on: `too_long` says so, or no answer begins within it"""
    unusable_tokens: int = 0
    first_unusable: str = ""
    """where the first few of them are"""
    cut: int = 0
    """conversations of which a window holds the beginning"""
    cut_tokens: int = 0
    """what is cut off"""
    first_cut: str = ""
    """where the first few of them are"""


def prepare_conversations(
    inputs: Sequence[Path],
    prefix: Path,
    tokenizer: Tokenizer,
    config: ConversationConfig,
    *,
    seq_length: int,
) -> Prepared:
    """Writes `prefix`.bin/.idx unless it is there, made from the same inputs in the same way.

    `seq_length` is the size of the windows that they will be packed into. DataError naming
    file and line for a malformed row or a conversation that is too long, or, where these are skipped, if there are no
    other rows; nothing is left on disk then.
    """
    files = find_inputs(inputs)
    made_of = _fingerprint(files, tokenizer, config, seq_length)
    record = prefix.with_name(prefix.name + ".sft.json")
    if record.exists():
        there = json.loads(record.read_text(encoding="utf-8"))
        if there["made_of"] == made_of:
            return Prepared(**there["prepared"])
    record.unlink(missing_ok=True)  # from here on the dataset may be half-written
    with making_dir(prefix.parent):
        prepared = _write(files, prefix, ChatFormat(config.format, tokenizer), config, seq_length)
    write_json(record, {"made_of": made_of, "prepared": to_dict(prepared)})
    return prepared


def _write(
    files: Sequence[Path], prefix: Path, chat: ChatFormat, config: ConversationConfig, seq_length: int
) -> Prepared:
    unusable, cut = _Lost(), _Lost()
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
                if config.malformed == "error":
                    raise DataError(f'{error}; malformed = "skip" skips such rows') from None
                skipped, first = skipped + 1, first or str(error)
                continue
            length = sum(len(segment.ids) for segment in segments)
            if length > seq_length:
                if config.too_long == "error":
                    raise DataError(
                        f"{where}: a conversation of {length} tokens, but seq_length = {seq_length}; "
                        'too_long = "cut" or "skip" allows such'
                    )
                if config.too_long == "skip":
                    unusable.add(where, length)
                    continue
                if len(segments[0].ids) >= seq_length:  # written all the same; `ConversationStream` passes it over
                    unusable.add(where, length)
                else:
                    cut.add(where, length - seq_length)
            writer.add_document([np.array(segment.ids, dtype=dtype) for segment in segments])
            count += 1
            tokens += length
            trained += sum(len(segment.ids) for segment in segments if segment.trained)
        if not count:
            told = f"; the first error: {first}" if first else ""
            told += f"; {unusable.count} are longer than seq_length = {seq_length}" if unusable.count else ""
            raise DataError(f"{files[0]}: no conversation in it{told}")
    return Prepared(
        conversations=count, tokens=tokens, trained_tokens=trained, skipped=skipped, first_skipped=first,
        unusable=unusable.count, unusable_tokens=unusable.tokens, first_unusable=unusable.first,
        cut=cut.count, cut_tokens=cut.tokens, first_cut=cut.first,
    )  # fmt: skip


@dataclass
class _Lost:
    """What windows do not hold."""

    count: int = 0
    tokens: int = 0
    first: str = ""

    def add(self, where: str, tokens: int) -> None:
        if self.count < _MOST_NAMED:
            self.first += f"{', ' if self.first else ''}{where}"
        self.count += 1
        self.tokens += tokens


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any] | str]]:
    """(place, the row or what is wrong with it)."""
    if path.suffix == ".parquet":
        yield from ((f"{path}: row {number}", row) for number, row in enumerate(read_rows(path, _wanted)))
        return
    for number, _, row in JsonRows(path):
        if row != EMPTY_LINE:
            yield f"{path}:{number}", row


def _wanted(path: Path, columns: list[str]) -> list[str]:
    wanted = [name for name in _COLUMNS if name in columns]
    if not wanted:
        known = ", ".join(map(repr, columns))
        raise DataError(f"{path}: no column 'messages', nor 'instruction' and 'output'; there are {known}")
    return wanted


def _fingerprint(files: Sequence[Path], tokenizer: Tokenizer, config: ConversationConfig, seq_length: int) -> str:
    if not files:
        raise ConfigError("no input")
    parts = [[str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    plain = {
        "files": parts, "tokenizer": tokenizer.digest, "format": to_dict(config.format.resolved),
        "malformed": config.malformed, "too_long": config.too_long, "seq_length": seq_length,
    }  # fmt: skip
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()
