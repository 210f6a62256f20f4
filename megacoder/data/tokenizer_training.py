"""A sample of the corpus -> a tokenizer folder.

Merges are learned from counts, for which a few hundred megabytes are enough: the sample, not the corpus, bounds memory
(about four times the sample) and time.

Beside the tokenizer, `training.json` says what it was made from, so that whether the folder may be written is known
before anything is read.
"""

import heapq
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

from megacoder.core.config import check_at_least
from megacoder.core.console import progress, say
from megacoder.core.errors import ConfigError, DataError, FormatError
from megacoder.core.files import why_not_writable, write_json
from megacoder.data.documents import DocumentReader, find_inputs
from megacoder.data.tokenizer import MIN_VOCAB_SIZE, Tokenizer, train_tokenizer

__all__ = ["TrainTokenizerConfig", "sample_texts", "train_from_files"]


_ORIGIN = "training.json"


@dataclass(frozen=True, kw_only=True)
class TrainTokenizerConfig:
    """Trains a byte-level BPE with DeepSeek-Coder's splits and control tokens."""

    input: tuple[Path, ...]
    """Parquet or JSONL files (also .gz, .zst), or folders of them"""
    output: Path
    """tokenizer folder to write"""
    vocab_size: int = 32_000
    """regular tokens; the nine control tokens come on top"""
    text_key: str = "content"
    """column or JSON key of the text"""
    sample_mb: int = 400
    """megabytes of text to learn from"""

    def __post_init__(self) -> None:
        check_at_least(self, 1, "sample_mb")
        if self.vocab_size < MIN_VOCAB_SIZE:
            raise ConfigError(
                f"vocab_size = {self.vocab_size}: must be at least {MIN_VOCAB_SIZE}, one token for each byte"
            )


def train_from_files(config: TrainTokenizerConfig) -> Tokenizer:
    """Trains on a sample of the input and writes the folder, or finds it already written.

    ConfigError, before anything is read, where the folder holds a tokenizer made otherwise.
    """
    inputs = find_inputs(config.input)
    origin = _origin(config, inputs)
    if (finished := _finished(config.output, origin)) is not None:
        say(f"{config.output}: up to date, {finished.vocab_size:,} ids, digest {finished.digest[:12]}")
        return finished
    texts = sample_texts(inputs, text_key=config.text_key, max_bytes=config.sample_mb * 1_000_000)
    if not texts:
        raise DataError(f"no documents in {', '.join(map(str, config.input))}")
    size = sum(len(text.encode()) for text in texts)
    say(f"tokenizer: learning from {len(texts):,} texts, {size / 1e6:.1f} MB")
    tokenizer = train_tokenizer(texts, vocab_size=config.vocab_size)
    if tokenizer.num_regular_tokens < config.vocab_size:
        say(f"tokenizer: the sample yields only {tokenizer.num_regular_tokens:,} tokens")
    write_json(config.output / _ORIGIN, origin | {"digest": tokenizer.digest})
    tokenizer.save(config.output)
    say(f"{config.output}: {tokenizer.vocab_size:,} ids, digest {tokenizer.digest[:12]}")
    return tokenizer


def _origin(config: TrainTokenizerConfig, inputs: Sequence[Path]) -> dict[str, Any]:
    """What decides the tokenizer, as plain values."""
    states = [(path, path.stat()) for path in inputs]
    return {
        "vocab_size": config.vocab_size,
        "text_key": config.text_key,
        "sample_mb": config.sample_mb,
        "inputs": [f"{path.absolute()} {state.st_size} {state.st_mtime_ns}" for path, state in states],
    }


def _finished(folder: Path, origin: dict[str, Any]) -> Tokenizer | None:
    """The tokenizer in `folder` if it was made from `origin`, None if there is none; ConfigError for another."""
    file, advice = folder / "tokenizer.json", "choose another --output, or remove it"
    if not file.exists():
        if reason := why_not_writable(file):
            raise ConfigError(f"--output {str(folder)!r}: {reason}")
        return None
    try:
        there = Tokenizer.load(file)
        said = json.loads((folder / _ORIGIN).read_text(encoding="utf-8"))
    except FormatError as error:
        raise ConfigError(f"{error}; {advice}") from None
    except (OSError, ValueError):
        said = None
    if not isinstance(said, dict) or said.get("digest") != there.digest:
        raise ConfigError(f"{file} holds another tokenizer ({there.vocab_size:,} ids); {advice}")
    for name, value in origin.items():
        if said.get(name) != value:
            raise ConfigError(f"{file} holds another tokenizer, made with different options ({name}); {advice}")
    return there


def sample_texts(paths: Sequence[Path], *, text_key: str, max_bytes: int) -> list[str]:
    """The files' distinct texts in the order of their hashes, as many as fit `max_bytes` and at least one.

    A uniform sample of texts in one pass and bounded memory, which depends on neither the order of the rows nor how
    they are spread over files.
    """
    kept: list[tuple[int, str]] = []  # a heap of (-hash, text): the largest hash is first, and the first to go
    hashes: set[int] = set()
    total, limit = 0, 1 << 128  # bytes kept, and the bound below which a hash may still be kept
    sizes = [path.stat().st_size for path in paths]
    with progress("tokenizer: reading", sum(sizes)) as bar:
        for path, size, before in zip(paths, sizes, itertools.accumulate(sizes, initial=0), strict=False):
            reader = DocumentReader(path, text_key=text_key)
            for text in itertools.chain.from_iterable(reader):
                bar.update(before + reader.fraction * size)
                content = text.encode()
                number = int.from_bytes(blake2b(content, digest_size=16).digest())
                if number >= limit or number in hashes:
                    continue
                heapq.heappush(kept, (-number, text))
                hashes.add(number)
                total += len(content)
                while total > max_bytes and len(kept) > 1:
                    negative, dropped = heapq.heappop(kept)
                    limit = -negative
                    hashes.remove(limit)
                    total -= len(dropped.encode())
            bar.update(before + size)
    return [text for _, text in sorted(kept, reverse=True)]
