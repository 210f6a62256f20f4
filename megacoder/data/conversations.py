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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from megacoder.core.config import to_dict
from megacoder.core.console import counted, say
from megacoder.core.errors import ConfigError, DataError
from megacoder.core.files import making_dir, write_json
from megacoder.data.chat_format import ChatFormat, FormatConfig, Segment
from megacoder.data.conversation_rows import ColumnsConfig, UnknownRole, read_conversation
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
    """What became of inputs. All counts but `read` and `skipped` count a conversation as often as `repeats` says."""

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
    counts, dtype = _Counts(config, seq_length), token_dtype(chat.tokenizer.vocab_size)
    with IndexedDatasetWriter(prefix, dtype=dtype) as writer:
        for path, times in files:
            counts.begin(path)
            for row in _rows(path, times, config.columns):
                try:
                    segments = _segments(row, chat, config)
                except DataError as error:
                    counts.skip(error)
                    continue
                for _ in range(counts.add(row, segments)):
                    writer.add_document([np.array(segment.ids, dtype=dtype) for segment in segments])
            counts.end()
        if not counts.conversations:
            raise DataError(f"{files[0][0]}: no conversation in it{counts.why_none(files[0][0])}")
    for line in counts.files_without:
        say(line)
    return counts.prepared()


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


class _Counts:
    """What becomes of rows, as the settings say; DataError where they allow none such."""

    def __init__(self, config: ConversationConfig, seq_length: int) -> None:
        self._config, self._seq_length = config, seq_length
        self._unusable, self._cut = _Lost(), _Lost()
        self._read = self.conversations = self._tokens = self._trained = self._skipped = 0
        self._first_skipped = ""
        self.files_without: list[str] = []
        """a line for each file that has rows, none of which is a conversation"""

    def begin(self, path: Path) -> None:
        """The rows of this file follow."""
        self._path, self._read_before, self._skipped_before, self._first_of_file = path, self._read, self._skipped, ""

    def skip(self, error: DataError) -> None:
        """A row is not a conversation."""
        if self._config.malformed == "error":
            advice = _columns_advice(self._path, self._config.columns)
            if advice is None and not isinstance(error, UnknownRole):
                advice = 'data.conversations.malformed = "skip" skips such rows'
            raise DataError(f"{error}; {advice}" if advice else str(error)) from None
        self._skipped += 1
        self._first_skipped = self._first_skipped or str(error)
        self._first_of_file = self._first_of_file or str(error)

    def add(self, row: "_Row", segments: Sequence[Segment]) -> int:
        """How often this conversation is written."""
        self._read += 1
        length = sum(len(segment.ids) for segment in segments)
        if not row.times or (length > self._seq_length and not self._fits_in_part(row, segments, length)):
            return 0
        self.conversations += row.times
        self._tokens += length * row.times
        self._trained += sum(len(segment.ids) for segment in segments if segment.trained) * row.times
        return row.times

    def _fits_in_part(self, row: "_Row", segments: Sequence[Segment], length: int) -> bool:
        """Whether a conversation of `length` tokens, more than a window's, is written all the same."""
        if self._config.too_long == "error":
            raise DataError(
                f"{row.where}: a conversation of {length} tokens, but data.stream.seq_length = {self._seq_length}; "
                'data.conversations.too_long = "cut" or "skip" allows such'
            )
        if self._config.too_long == "skip":
            self._unusable.add(row.where, length, row.times)
            return False
        if len(segments[0].ids) >= self._seq_length:  # written, and passed over by `ConversationStream`
            self._unusable.add(row.where, length, row.times)
        else:
            self._cut.add(row.where, length - self._seq_length, row.times)
        return True

    def end(self) -> None:
        """The file has no further rows."""
        if self._read == self._read_before and self._skipped > self._skipped_before:
            number = self._skipped - self._skipped_before
            rows = counted(number, "row", "rows")
            why = _columns_advice(self._path, self._config.columns) or f"the first error: {self._first_of_file}"
            self.files_without.append(f"{self._path}: no conversation in its {rows}; {why}")

    def why_none(self, path: Path) -> str:
        """Why no conversation is written, to go behind what says so of `path`, the first file."""
        told = f"; the first error: {self._first_skipped}" if self._first_skipped else ""
        if self._first_skipped and (naming := _columns_advice(path, self._config.columns)):
            told += f"; {naming}"
        if self._unusable.count:
            told += f"; {self._unusable.count} are longer than data.stream.seq_length = {self._seq_length}"
        elif self._read:
            told += f"; data.conversations.repeats leave out all {self._read}"
        return told

    def prepared(self) -> Prepared:
        unusable, cut = self._unusable, self._cut
        return Prepared(
            read=self._read, conversations=self.conversations, tokens=self._tokens, trained_tokens=self._trained,
            skipped=self._skipped, first_skipped=self._first_skipped,
            unusable=unusable.count, unusable_tokens=unusable.tokens, first_unusable=unusable.first,
            cut=cut.count, cut_tokens=cut.tokens, first_cut=cut.first,
        )  # fmt: skip


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
        raise DataError(f"{path}: has no {columns.described}; {_naming(dict.fromkeys(names))}")
    return wanted


def _columns_advice(path: Path, columns: ColumnsConfig) -> str | None:
    """How to name the columns of a file whose first rows all lack those that are looked for; else None."""
    rows = (row.content for row in _rows(path, 1.0, columns))
    first = [row for row in itertools.islice(rows, _ROWS_THAT_TELL) if isinstance(row, dict)]
    if not first or any(columns.used(row) for row in first):
        return None
    return _naming(first[0])


def _naming(row: Mapping[str, Any]) -> str:
    """The columns of a row, whose values may be unknown, and where to say what they are."""
    names = list(row)
    there = ", ".join(map(repr, names[:_MOST_COLUMNS])) + (", ..." if len(names) > _MOST_COLUMNS else "")
    turns = names[0] if len(names) == 1 else next((name for name in names if isinstance(row[name], list)), None)
    example = 'output = "response"' if turns is None else f'messages = "{turns}"'
    return f"its columns: {there or 'none'}; name them in [data.conversations.columns], as in {example}"


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
