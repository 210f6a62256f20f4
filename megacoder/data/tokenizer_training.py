"""A sample of the corpus -> a tokenizer folder.

Merges are learned from counts, for which a few hundred megabytes are enough: the sample, not the corpus, bounds memory
(about four times the sample) and time.

Beside the tokenizer, `training.json` says what it was made from, so that whether the folder may be written is known
before anything is read.
"""

import heapq
import itertools
import json
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors, trainers

from megacoder.core.config import check_at_least
from megacoder.core.console import progress, say
from megacoder.core.errors import ConfigError, DataError, FormatError
from megacoder.core.files import why_not_writable, write_json
from megacoder.core.processes import interruptible
from megacoder.data.control_tokens import SPECIAL_TOKENS
from megacoder.data.documents import DocumentReader, find_inputs
from megacoder.data.tokenizer import MIN_VOCAB_SIZE, Tokenizer

__all__ = ["TrainTokenizerConfig", "sample_texts", "train_from_files", "train_tokenizer"]

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


def train_tokenizer(texts: Iterable[str], *, vocab_size: int) -> Tokenizer:
    """Trains `vocab_size` regular tokens on `texts` and appends the control tokens; deterministic.

    Fewer tokens come out where the texts hold no more pairs to merge. Raises ConfigError if `vocab_size` cannot hold
    the 256 bytes.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise ConfigError(f"vocab_size {vocab_size}: must be at least {MIN_VOCAB_SIZE}, one token for each byte")
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = _pre_tokenizer()
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=_on_terminal()
    )
    _learn(backend, texts, trainer)
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL_TOKENS.values()])
    bos = SPECIAL_TOKENS["bos"]
    backend.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, backend.token_to_id(bos))]
    )
    return Tokenizer(backend.to_str())


def _learn(backend: tokenizers.Tokenizer, texts: Iterable[str], trainer: trainers.BpeTrainer) -> None:
    """Trains `backend`; an interrupt is answered at once, and a line says now and then that it goes on.

    The trainer's threads take Python's lock only to fetch texts, which an interrupt ends: a thread that asks for the
    lock while Python shuts down would be ended in the midst of foreign code.
    """
    interrupted, fetched = threading.Event(), threading.Event()

    def fetch() -> Iterator[str]:
        try:
            for text in texts:
                if interrupted.is_set():
                    raise InterruptedError
                yield text
        finally:
            fetched.set()

    def tell(seconds: float) -> None:
        if not _on_terminal():  # there, the trainer draws its own progress
            say(f"tokenizer: learning, {seconds:.0f} s")

    size = len(texts) if isinstance(texts, Sequence) else None
    try:
        interruptible(lambda: backend.train_from_iterator(fetch(), trainer, length=size), tell=tell)
    except KeyboardInterrupt:
        interrupted.set()
        fetched.wait(1.0)
        if _on_terminal():
            say("")  # the trainer leaves its line open
        raise


def _on_terminal() -> bool:
    return sys.stderr is not None and sys.stderr.isatty()


def _pre_tokenizer() -> pre_tokenizers.PreTokenizer:
    isolated = [r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-\ud7ff]+"]
    return pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in isolated),
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
