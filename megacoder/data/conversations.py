"""Conversations on disk: rows of JSONL or Parquet -> an indexed dataset whose sequences are asked and trained in turn.

The format needs no extension: a document is a conversation, its sequences 0, 2, 4, ... are asked, 1, 3, 5, ... are
trained. So the lengths of sequences tell which tokens are trained, on disk as in memory, and every tool that reads
`.bin/.idx` reads these too.

Where files have `repeats`, a conversation is written as often as an epoch serves it. Which ones are written once more
for a fraction is a function of their rows' numbers.
"""

import hashlib
import itertools
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from megacoder.core.config import to_dict
from megacoder.core.errors import ConfigError, DataError
from megacoder.core.files import making_dir, write_json
from megacoder.data.chat_format import ChatFormat, FormatConfig, Segment
from megacoder.data.conversation_rows import ColumnsConfig, read_conversation
from megacoder.data.documents import find_inputs
from megacoder.data.indexed import IndexedDatasetWriter, token_dtype
from megacoder.data.jsonl import EMPTY_LINE, JsonRows
from megacoder.data.parquet import read_rows
from megacoder.data.permutation import key_of
from megacoder.data.tokenizer import Tokenizer

__all__ = ["ConversationConfig", "Prepared", "prepare_conversations"]

_MOST_NAMED = 5
_MOST_COLUMNS = 12
_ROWS_THAT_TELL = 16  # at the beginning of a file, of what columns it has


@dataclass(frozen=True, kw_only=True)
class ConversationConfig:
    """What instruction tuning reads."""

    train: tuple[Path, ...] = ()
    """JSONL or Parquet files, or folders of them, with `messages`, or `instruction` and `output`"""
    repeats: tuple[float, ...] = ()
    """how often an epoch serves the conversations of each of `train`: 2.5 is twice, and half of them a third time; if
    unset, once"""
    valid: tuple[Path, ...] = ()
    """the same as `train` for the held-out loss"""
    columns: ColumnsConfig = field(default_factory=ColumnsConfig)
    """names of columns and roles"""
    train_on: Literal["all", "last"] = "all"
    """answers with loss: all of a conversation, or only its last one. A message with weight 0 has none either way"""
    malformed: Literal["error", "skip"] = "error"
    """when a row is not a conversation, refuse to start (error), or skip and count it (skip)"""
    too_long: Literal["cut", "skip", "error"] = "cut"
    """when a conversation is longer than a window, cut it at the right as the published script does (cut), skip it
    (skip), or refuse to start (error); all are counted"""
    format: FormatConfig = field(default_factory=FormatConfig)
    """how conversations are written"""

    def __post_init__(self) -> None:
        if self.repeats and len(self.repeats) != len(self.train):
            raise ConfigError(
                f"data.conversations.repeats = {list(self.repeats)}: give one for each of the {len(self.train)} of "
                "train, or none"
            )
        for times in self.repeats:
            if not 0 < times < math.inf:
                raise ConfigError(
                    f"data.conversations.repeats = {list(self.repeats)}: {times} is not a positive number; leave the "
                    "file out of train if it is not to be read"
                )


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """What became of the inputs. All counts but `read` and `skipped` are of what an epoch serves."""

    read: int
    """conversations of the inputs, each counted once"""
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
    repeats: Sequence[float] = (),
) -> Prepared:
    """Writes `prefix`.bin/.idx unless it is there, made from the same inputs in the same way.

    `seq_length` is the size of the windows that they will be packed into; `repeats` has a number for each of `inputs`,
    or none. DataError naming file and line for a malformed row or a conversation that is too long, or, where these are
    skipped, if there are no other rows; nothing is left on disk then.
    """
    files = [
        (file, times)
        for path, times in zip(inputs, repeats or itertools.repeat(1.0, len(inputs)), strict=True)
        for file in find_inputs([path])
    ]
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
    files: Sequence[tuple[Path, float]], prefix: Path, chat: ChatFormat, config: ConversationConfig, seq_length: int
) -> Prepared:
    unusable, cut = _Lost(), _Lost()
    read = count = tokens = trained = skipped = 0
    first, columns = "", config.columns
    dtype = token_dtype(chat.tokenizer.vocab_size)
    with IndexedDatasetWriter(prefix, dtype=dtype) as writer:
        for row in (row for file, times in files for row in _rows(file, times, columns)):
            where, times = row.where, row.times
            try:
                segments = _segments(row, chat, config)
            except DataError as error:
                if config.malformed == "error":
                    advice = _columns_advice(row.path, columns) or 'malformed = "skip" skips such rows'
                    raise DataError(f"{error}; {advice}") from None
                skipped, first = skipped + 1, first or str(error)
                continue
            read += 1
            if not times:
                continue
            length = sum(len(segment.ids) for segment in segments)
            if length > seq_length:
                if config.too_long == "error":
                    raise DataError(
                        f"{where}: a conversation of {length} tokens, but seq_length = {seq_length}; "
                        'too_long = "cut" or "skip" allows such'
                    )
                if config.too_long == "skip":
                    unusable.add(where, length, times)
                    continue
                if len(segments[0].ids) >= seq_length:  # written all the same; `ConversationStream` passes it over
                    unusable.add(where, length, times)
                else:
                    cut.add(where, length - seq_length, times)
            for _ in range(times):
                writer.add_document([np.array(segment.ids, dtype=dtype) for segment in segments])
            count += times
            tokens += length * times
            trained += sum(len(segment.ids) for segment in segments if segment.trained) * times
        if not count:
            path = files[0][0]
            told = f"; the first error: {first}" if first else ""
            told += f"; {naming}" if first and (naming := _columns_advice(path, columns)) else ""
            told += f"; {unusable.count} are longer than seq_length = {seq_length}" if unusable.count else ""
            told += f"; repeats leave out all {read}" if read and not unusable.count else ""
            raise DataError(f"{path}: no conversation in it{told}")
    return Prepared(
        read=read, conversations=count, tokens=tokens, trained_tokens=trained, skipped=skipped, first_skipped=first,
        unusable=unusable.count, unusable_tokens=unusable.tokens, first_unusable=unusable.first,
        cut=cut.count, cut_tokens=cut.tokens, first_cut=cut.first,
    )  # fmt: skip


def _segments(row: "_Row", chat: ChatFormat, config: ConversationConfig) -> list[Segment]:
    if isinstance(row.content, str):
        raise DataError(f"{row.where}: {row.content}")
    conversation = read_conversation(row.content, config.columns, where=row.where, train_on=config.train_on)
    return chat.segments(conversation.messages, trained=conversation.trained)


@dataclass
class _Lost:
    """What windows do not hold."""

    named: int = 0
    count: int = 0
    tokens: int = 0
    first: str = ""

    def add(self, where: str, tokens: int, times: int) -> None:
        if self.named < _MOST_NAMED:
            self.first += f"{', ' if self.first else ''}{where}"
            self.named += 1
        self.count += times
        self.tokens += tokens * times


@dataclass(frozen=True)
class _Row:
    path: Path
    where: str
    content: dict[str, Any] | str
    """or what is wrong with it"""
    times: int
    """how often an epoch serves it"""


def _rows(path: Path, times: float, columns: ColumnsConfig) -> Iterator[_Row]:
    if path.suffix == ".parquet":
        for number, row in enumerate(read_rows(path, lambda path, names: _wanted(path, names, columns))):
            yield _Row(path, f"{path}: row {number}", row, _times(times, number))
        return
    for number, _, row in JsonRows(path):
        if row != EMPTY_LINE:
            yield _Row(path, f"{path}:{number}", row, _times(times, number))


def _times(times: float, number: int) -> int:
    """How often an epoch serves row `number` of a file that it serves `times`, on average."""
    whole, part = int(times), times % 1.0
    return whole + bool(part and key_of(number) < part * 2.0**64)


def _wanted(path: Path, names: list[str], columns: ColumnsConfig) -> list[str]:
    wanted = columns.used(names)
    if not wanted:
        raise DataError(f"{path}: has no {columns.described}; {_naming(names)}")
    return wanted


def _columns_advice(path: Path, columns: ColumnsConfig) -> str | None:
    """How to name the columns of a file whose first rows all lack those that are looked for; else None."""
    rows = (row.content for row in _rows(path, 1.0, columns))
    first = [row for row in itertools.islice(rows, _ROWS_THAT_TELL) if isinstance(row, dict)]
    if not first or any(columns.used(row) for row in first):
        return None
    return _naming(list(first[0]))


def _naming(names: Sequence[str]) -> str:
    there = ", ".join(map(repr, names[:_MOST_COLUMNS])) + (", ..." if len(names) > _MOST_COLUMNS else "")
    return f'there are {there or "none"}; [data.conversations.columns] says which is which, as in output = "response"'


def _fingerprint(
    files: Sequence[tuple[Path, float]], tokenizer: Tokenizer, config: ConversationConfig, seq_length: int
) -> str:
    if not files:
        raise ConfigError("no input")
    parts = [[str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns, times] for file, times in files]
    plain = {
        "files": parts, "tokenizer": tokenizer.digest, "format": to_dict(config.format.resolved),
        "malformed": config.malformed, "too_long": config.too_long, "seq_length": seq_length,
        "columns": to_dict(config.columns), "train_on": config.train_on,
    }  # fmt: skip
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()
