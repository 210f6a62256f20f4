"""Documents -> `.bin/.idx`, on all cores, resumable after a kill, byte-identical for any number of workers.

One process reads and writes, in the order of the input; workers encode pieces of about half a megabyte. Each input
file becomes a part, a small dataset in a folder beside the output, complete once its `.idx` exists; a run that was
killed resumes with the first file without one. The output is written in that folder along with the parts (those of an
earlier run are copied into it), so that at the end it only has to be renamed.
"""

import contextlib
import shutil
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np

from megacoder.core.console import counted, progress, say
from megacoder.core.errors import ConfigError, DataError
from megacoder.core.files import exclusive, remove_stale_temporaries
from megacoder.core.processes import num_cores
from megacoder.data.documents import DocumentReader, find_inputs
from megacoder.data.encoders import EncoderName, fast_encoder
from megacoder.data.encoding import Piece, encode_in_order
from megacoder.data.indexed import IndexedDataset, IndexedDatasetWriter, idx_path, rename_dataset, token_dtype
from megacoder.data.sidecar import Sidecar, checksum
from megacoder.data.tokenizer import Tokenizer, say_if_changed

__all__ = ["PreprocessConfig", "preprocess"]

_PARTS_VERSION = 3
"""Increase it when the same input is encoded to other ids: older parts are then not reused."""
_PIECE_CHARACTERS = 1 << 19
_MOST_WORKERS = 1024
_TOKENS_AT_ONCE = 1 << 16  # whose lengths a core's cache holds


@dataclass(frozen=True, kw_only=True)
class PreprocessConfig:
    """Turns documents into the indexed binaries that training reads."""

    input: tuple[Path, ...]
    """Parquet or JSONL files (also .gz, .zst), or folders of them"""
    tokenizer: Path
    """tokenizer folder"""
    output: Path
    """prefix of the .bin, .idx and .json files to write"""
    text_key: str = "content"
    """column or JSON key of the text"""
    document_key: str | None = None
    """column or JSON key that is equal in consecutive rows of one document; without it each row is a document"""
    workers: int | None = None
    """number of encoding processes or threads; if unset, one per core"""
    encoder: EncoderName = "auto"
    """tokenizers (the reference), fastokens (six times as fast; the extra `fast`), or auto: fastokens if installed"""

    def __post_init__(self) -> None:
        if self.output.name in ("", ".."):
            raise ConfigError(f"output = {str(self.output)!r}: expected a prefix of file names, such as data/train")
        if self.workers is not None and not 1 <= self.workers <= _MOST_WORKERS:
            raise ConfigError(f"workers = {self.workers}: must be 1 to {_MOST_WORKERS}; leave it out for one per core")


def preprocess(config: PreprocessConfig) -> Sidecar:
    """Writes the dataset, or finds it already written; returns its description.

    Raises ConfigError if `output` holds a different dataset, DataError for input that cannot be used.
    """
    if config.output.is_dir():
        example = config.output / "train"
        raise ConfigError(
            f"--output {str(config.output)!r} is a folder; name a prefix of file names, such as {example}"
        )
    tokenizer = Tokenizer.load(config.tokenizer)
    say_if_changed(tokenizer, config.tokenizer)
    inputs = find_inputs(config.input)
    described = tuple(_describe(path) for path in inputs)
    finished = _finished(config, tokenizer, described)
    if finished is not None:
        shutil.rmtree(_parts_folder(config), ignore_errors=True)  # of a run that was killed as it ended
        say(f"{config.output}: up to date, {finished.documents:,} documents, {finished.tokens:,} tokens")
        return finished
    folder = _parts_folder(config)
    try:
        with exclusive(folder, what="preprocess"):
            remove_stale_temporaries(folder)
            sidecar, empty = _write(config, tokenizer, dict(zip(described, inputs, strict=True)), described)
        shutil.rmtree(folder)
    except OSError as error:
        where = error.filename or config.output
        raise DataError(
            f"{where}: {error.strerror or error}; finished files are kept, run the same command to resume"
        ) from None
    finally:
        with contextlib.suppress(OSError):  # of no use without parts
            folder.rmdir()
    which = f", {empty:,} of them empty" if empty else ""
    say(
        f"{config.output}: {counted(sidecar.documents, 'document', 'documents')}{which}; {sidecar.tokens:,} tokens, "
        f"{sidecar.bytes:,} bytes of text"
    )
    return sidecar


def _parts_folder(config: PreprocessConfig) -> Path:
    return config.output.with_name(config.output.name + ".parts")


def _describe(path: Path) -> str:
    state = path.stat()
    return f"{path} {state.st_size} {state.st_mtime_ns}"


def _part_name(config: PreprocessConfig, tokenizer: Tokenizer, description: str) -> str:
    """Names everything that decides a part's content, so that only a part of the same run is ever reused."""
    ids = tokenizer.digest, tokenizer.by_spelling
    key = repr((_PARTS_VERSION, description, ids, config.text_key, config.document_key))
    return sha256(key.encode()).hexdigest()[:32]


def _finished(config: PreprocessConfig, tokenizer: Tokenizer, described: tuple[str, ...]) -> Sidecar | None:
    """The description of a finished run of this configuration; ConfigError if the output is something else."""
    sidecar = Sidecar.read(config.output)
    if sidecar is None:
        if idx_path(config.output).exists() and not _parts_folder(config).exists():
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
                f"{Sidecar.path(config.output)}: made with different options ({name}); remove it, or choose another "
                "--output"
            )
    if earlier := {*tokenizer.by_spelling} - {*sidecar.controls}:
        raise ConfigError(
            f"{Sidecar.path(config.output)}: made when a text that spells {min(earlier)!r} became that control token; "
            "remove it, or choose another --output"
        )
    return sidecar if idx_path(config.output).exists() else None


def _write(
    config: PreprocessConfig, tokenizer: Tokenizer, inputs: dict[str, Path], described: tuple[str, ...]
) -> tuple[Sidecar, int]:
    """Makes the missing parts, and the output from all parts; `inputs` are the files as `described`.

    Returns the description, and the number of documents without ids.
    """
    folder, dtype = _parts_folder(config), token_dtype(tokenizer.vocab_size)
    workers = config.workers or num_cores()
    with ThreadPoolExecutor(1) as thread:  # its check takes as long as the digest and the parts' checks
        checking = thread.submit(fast_encoder, config.encoder, tokenizer, threads=workers)
        parts = {name: folder / _part_name(config, tokenizer, name) for name in inputs}
        todo = {name: inputs[name] for name, part in parts.items() if not _is_complete(part)}
        sizes = {name: path.stat().st_size for name, path in inputs.items()}
        completed = float(sum(size for name, size in sizes.items() if name not in todo))
        fast = checking.result()
    characters = _PIECE_CHARACTERS * (min(workers, num_cores()) if fast else 1)
    pieces = _pieces(config, list(todo.values()), characters=characters)
    found_bytes, encoded_bytes, start = 0, 0, time.monotonic()  # of parts made before, and of this run
    empty = 0
    with (
        progress("preprocess", sum(sizes.values())) as bar,
        encode_in_order(pieces, tokenizer, folder=config.tokenizer, workers=workers, fast=fast) as results,
        IndexedDatasetWriter(folder / "output", dtype=dtype) as output,
    ):
        for name in described:
            if todo.pop(name, None) is None:
                part = IndexedDataset(parts[name])
                output.append(part)
                found_bytes += _text_bytes(part, tokenizer)
                empty += int((np.diff(part.document_offsets) == 0).sum())
                continue
            with IndexedDatasetWriter(parts[name], dtype=dtype) as writer:
                for piece, encoded in results:
                    for dataset in (writer, output):
                        dataset.add_documents(encoded.tokens, encoded.lengths, encoded.sequences)
                    encoded_bytes += encoded.text_bytes
                    empty += encoded.sequences.count(0)
                    speed = encoded_bytes / 1e6 / max(time.monotonic() - start, 1e-3)
                    bar.update(completed + piece.read, f"{speed:.1f} MB/s")
                    if piece.ends_file:
                        break
            completed += sizes[name]
    if output.num_tokens == 0:
        shutil.rmtree(folder)
        raise DataError(f"no {'text' if empty else 'documents'} in {', '.join(map(str, config.input))}")
    rename_dataset(output.prefix, config.output)
    sidecar = Sidecar(
        documents=output.num_documents, sequences=output.num_sequences, tokens=output.num_tokens,
        bytes=found_bytes + encoded_bytes, tokenizer=tokenizer.digest, text_key=config.text_key,
        document_key=config.document_key, inputs=described, controls=tokenizer.by_spelling,
        checksum=checksum(config.output),
    )  # fmt: skip
    sidecar.write(config.output)
    return sidecar, empty


def _is_complete(part: Path) -> bool:
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


def _text_bytes(dataset: IndexedDataset, tokenizer: Tokenizer) -> int:
    """Bytes in UTF-8 of the text that `dataset` was made from."""
    lengths = np.array([len(token) for token in tokenizer.token_bytes], dtype=np.int32)
    lengths[tokenizer.eos_id] = 0
    starts = range(0, dataset.num_tokens, _TOKENS_AT_ONCE)
    return sum(int(lengths[dataset.tokens[at : at + _TOKENS_AT_ONCE]].sum()) for at in starts)
