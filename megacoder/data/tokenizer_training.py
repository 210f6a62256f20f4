"""A sample of the corpus -> a tokenizer folder.

Merges are learned from counts, for which a few hundred megabytes are enough: the sample, not the corpus, bounds memory
(about four times the sample) and time.
"""

import heapq
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

from megacoder.core.console import say
from megacoder.core.errors import ConfigError, DataError
from megacoder.data.documents import DocumentReader, find_inputs
from megacoder.data.tokenizer import Tokenizer, train_tokenizer

__all__ = ["TrainTokenizerConfig", "sample_texts", "train_from_files"]


@dataclass(frozen=True, kw_only=True)
class TrainTokenizerConfig:
    """Trains a byte-level BPE with DeepSeek-Coder's splits and control tokens."""

    input: tuple[Path, ...]
    """Parquet, JSONL or .jsonl.zst files, or folders of them"""
    output: Path
    """tokenizer folder to write"""
    vocab_size: int = 32_000
    """regular tokens; the nine control tokens come on top"""
    text_key: str = "content"
    """column or JSON key of the text"""
    sample_mb: int = 400
    """megabytes of text to learn from"""

    def __post_init__(self) -> None:
        if self.sample_mb < 1:
            raise ConfigError(f"sample_mb = {self.sample_mb}: at least 1")


def train_from_files(config: TrainTokenizerConfig) -> Tokenizer:
    """Trains on a sample of the input and writes the folder; the same input gives the same tokenizer.

    ConfigError where the folder holds a different one, which is known only after training.
    """
    texts = sample_texts(find_inputs(config.input), text_key=config.text_key, max_bytes=config.sample_mb * 1_000_000)
    if not texts:
        raise DataError(f"no documents in {', '.join(map(str, config.input))}")
    size = sum(len(text.encode()) for text in texts)
    say(f"tokenizer: learning from {len(texts):,} texts, {size / 1e6:.1f} MB")
    tokenizer = train_tokenizer(texts, vocab_size=config.vocab_size)
    if tokenizer.num_regular_tokens < config.vocab_size:
        say(f"tokenizer: the sample yields only {tokenizer.num_regular_tokens:,} tokens")
    tokenizer.save(config.output)
    say(f"{config.output}: {tokenizer.vocab_size:,} ids, digest {tokenizer.digest[:12]}")
    return tokenizer


def sample_texts(paths: Sequence[Path], *, text_key: str, max_bytes: int) -> list[str]:
    """The files' distinct texts in the order of their hashes, as many as fit `max_bytes` and at least one.

    A uniform sample of texts in one pass and bounded memory, which depends on neither the order of the rows nor how
    they are spread over files.
    """
    kept: list[tuple[int, str]] = []  # a heap of (-hash, text): the largest hash is first, and the first to go
    hashes: set[int] = set()
    total, limit = 0, 1 << 128  # bytes kept, and the bound below which a hash may still be kept
    for path in paths:
        for text in itertools.chain.from_iterable(DocumentReader(path, text_key=text_key)):
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
    return [text for _, text in sorted(kept, reverse=True)]
