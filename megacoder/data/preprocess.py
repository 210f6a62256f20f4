"""Documents -> `.bin/.idx`, on all cores, resumable after a kill, byte-identical for any number of workers.

One process reads and writes, in the order of the input; workers encode pieces of about half a megabyte. Each input
file becomes a part, a small dataset beside the output that is whole once its `.idx` exists; a run that was killed goes
on with the first file without one. At the end the parts are joined, described and removed.
"""

import contextlib
import shutil
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np

from megacoder.core.console import progress, say
from megacoder.core.errors import ConfigError, DataError
from megacoder.core.files import remove_stale_temporaries
from megacoder.core.processes import num_cores
from megacoder.data.documents import DocumentReader, find_inputs
from megacoder.data.encoders import EncoderName, fast_encoder
from megacoder.data.encoding import Piece, encode_in_order
from megacoder.data.indexed import IndexedDataset, IndexedDatasetWriter, idx_path, token_dtype
from megacoder.data.sidecar import Sidecar, checksum
from megacoder.data.tokenizer import Tokenizer

__all__ = ["PreprocessConfig", "preprocess"]

_PIECE_CHARACTERS = 1 << 19
_MOST_WORKERS = 1024
_TOKENS_AT_ONCE = 1 << 16  # whose lengths a core's cache holds


@dataclass(frozen=True, kw_only=True)
class PreprocessConfig:
    """Turns documents into the indexed binaries that training reads."""

    input: tuple[Path, ...]
    """Parquet, JSONL or .jsonl.zst files, or folders of them"""
    tokenizer: Path
    """tokenizer folder"""
    output: Path
    """prefix of the .bin, .idx and .json files to write"""
    text_key: str = "content"
    """column or JSON key of the text"""
    document_key: str | None = None
    """column or JSON key that is equal in consecutive rows of one document; without it each row is a document"""
    workers: int | None = None
    """processes or threads that encode, one per core if not given"""
    encoder: EncoderName = "auto"
    """tokenizers, the reference; fastokens, as fast as several of it (the extra `fast`); or that one if it is there"""

    def __post_init__(self) -> None:
        if self.output.name in ("", ".."):
            raise ConfigError(f"output = {str(self.output)!r}: expected a prefix of names of files, as data/train")
        if self.workers is not None and not 1 <= self.workers <= _MOST_WORKERS:
            raise ConfigError(f"workers = {self.workers}: 1 to {_MOST_WORKERS}, or none for one per core")


def preprocess(config: PreprocessConfig) -> Sidecar:
    """Writes the dataset, or finds it already written; returns its description.

    Raises ConfigError if `output` holds a dataset made otherwise, DataError for input that cannot be used.
    """
    tokenizer = Tokenizer.load(config.tokenizer)
    inputs = find_inputs(config.input)
    described = tuple(_describe(path) for path in inputs)
    finished = _finished(config, tokenizer, described)
    if finished is not None:
        say(f"{config.output}: up to date, {finished.documents:,} documents, {finished.tokens:,} tokens")
        return finished
    folder = config.output.with_name(config.output.name + ".parts")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        remove_stale_temporaries(folder)
        parts = [folder / _part_name(config, tokenizer, description) for description in described]
        _write_parts(config, tokenizer, dict(zip(parts, inputs, strict=True)))
        sidecar = _join(config, tokenizer, parts, described)
        shutil.rmtree(folder)
    except OSError as error:
        where = error.filename or config.output
        raise DataError(
            f"{where}: {error.strerror or error}; finished files are kept, the same command goes on"
        ) from None
    finally:
        with contextlib.suppress(OSError):  # of no use without parts
            folder.rmdir()
    say(f"{config.output}: {sidecar.documents:,} documents, {sidecar.tokens:,} tokens, {sidecar.bytes:,} bytes of text")
    return sidecar


def _describe(path: Path) -> str:
    state = path.stat()
    return f"{path} {state.st_size} {state.st_mtime_ns}"


def _part_name(config: PreprocessConfig, tokenizer: Tokenizer, description: str) -> str:
    """Names everything that decides a part's content, so that only a part of the same run is ever taken up."""
    key = repr((description, tokenizer.digest, config.text_key, config.document_key))
    return sha256(key.encode()).hexdigest()[:32]


def _finished(config: PreprocessConfig, tokenizer: Tokenizer, described: tuple[str, ...]) -> Sidecar | None:
    """The description of a finished run of this configuration; ConfigError if the output is something else."""
    sidecar = Sidecar.read(config.output)
    if sidecar is None:
        if idx_path(config.output).exists() and not config.output.with_name(config.output.name + ".parts").exists():
            raise ConfigError(f"{idx_path(config.output)}: made by another program; choose another --output")
        return None
    wanted = {
        "tokenizer": tokenizer.digest,
        "text_key": config.text_key,
        "document_key": config.document_key,
        "inputs": described,
    }
    for name, value in wanted.items():
        if getattr(sidecar, name) != value:
            raise ConfigError(
                f"{Sidecar.path(config.output)}: made with another {name}; remove it, or choose another --output"
            )
    return sidecar if idx_path(config.output).exists() else None


def _write_parts(config: PreprocessConfig, tokenizer: Tokenizer, inputs: dict[Path, Path]) -> None:
    """Makes the parts that are not there yet; `inputs` are the input files by part."""
    todo = {part: path for part, path in inputs.items() if not _is_whole(part)}
    sizes = {part: path.stat().st_size for part, path in inputs.items()}
    completed = float(sum(size for part, size in sizes.items() if part not in todo))
    workers = config.workers or num_cores()
    fast = fast_encoder(config.encoder, tokenizer, threads=workers)
    pieces = _pieces(config, todo.values(), characters=_PIECE_CHARACTERS * (workers if fast else 1))
    text_bytes, start = 0, time.monotonic()
    with (
        progress("preprocess", sum(sizes.values())) as bar,
        encode_in_order(pieces, tokenizer, folder=config.tokenizer, workers=workers, fast=fast) as results,
    ):
        for part in todo:
            with IndexedDatasetWriter(part, dtype=token_dtype(tokenizer.vocab_size)) as writer:
                for piece, encoded in results:
                    writer.add_documents(encoded.tokens, encoded.lengths, encoded.sequences)
                    text_bytes += encoded.text_bytes
                    speed = text_bytes / 1e6 / max(time.monotonic() - start, 1e-3)
                    bar.update(completed + piece.read, f"{speed:.1f} MB/s")
                    if piece.ends_file:
                        break
            completed += sizes[part]


def _is_whole(part: Path) -> bool:
    try:
        IndexedDataset(part)
    except DataError:
        return False
    return True


def _pieces(config: PreprocessConfig, inputs: Iterable[Path], *, characters: int) -> Iterator[Piece]:
    """The documents of all inputs in order, about `characters` a piece; the last piece of each file may have none."""
    for path in inputs:
        reader = DocumentReader(path, text_key=config.text_key, document_key=config.document_key)
        size, documents, gathered = path.stat().st_size, list[list[str]](), 0
        for document in reader:
            documents.append(document)
            gathered += sum(map(len, document))
            if gathered >= characters:
                yield Piece(path=path, documents=documents, read=reader.fraction * size, ends_file=False)
                documents, gathered = [], 0
        yield Piece(path=path, documents=documents, read=size, ends_file=True)


def _join(config: PreprocessConfig, tokenizer: Tokenizer, parts: list[Path], described: tuple[str, ...]) -> Sidecar:
    """Appends all parts into the output and describes it; the description is written last."""
    lengths = np.array([len(token) for token in tokenizer.token_bytes], dtype=np.int32)
    lengths[tokenizer.eos_id] = 0
    text_bytes = 0
    with IndexedDatasetWriter(config.output, dtype=token_dtype(tokenizer.vocab_size)) as writer:
        for part in map(IndexedDataset, parts):
            writer.append(part)
            for at in range(0, part.num_tokens, _TOKENS_AT_ONCE):
                text_bytes += int(lengths[part.tokens[at : at + _TOKENS_AT_ONCE]].sum())
        if writer.num_documents == 0:
            raise DataError(f"no documents in {', '.join(map(str, config.input))}")
    sidecar = Sidecar(
        documents=writer.num_documents,
        sequences=writer.num_sequences,
        tokens=writer.num_tokens,
        bytes=text_bytes,
        tokenizer=tokenizer.digest,
        text_key=config.text_key,
        document_key=config.document_key,
        inputs=described,
        checksum=checksum(config.output),
    )
    sidecar.write(config.output)
    return sidecar
