"""A corpus of real sources for `bench_data.py`: what is installed on this machine, each text once, in a mixed order.

The folder then holds `documents-N.jsonl` (eight shards of equal size, rows {"content": text}), `documents.parquet` with
the same rows in the same order, `tokenizer/` trained on a sample of them, `tokens.bin` and `tokens.idx`, what
`megacoder preprocess` makes of the Parquet file, and `corpus.json`.
"""

import json
import sysconfig
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from megacoder.core.console import say
from megacoder.core.errors import DataError
from megacoder.core.files import write_json
from megacoder.data.preprocess import PreprocessConfig, preprocess
from megacoder.data.tokenizer import Tokenizer
from megacoder.data.tokenizer_training import train_tokenizer

__all__ = ["Corpus", "prepared"]

SUFFIXES = {
    ".py", ".pyi", ".pyx", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".cuh", ".js", ".ts", ".pl", ".sh", ".java", ".go",
    ".rs", ".html", ".css", ".yaml", ".md", ".rst",
}  # fmt: skip
SOURCES = (Path("/usr/include"), Path("/usr/lib"), Path("/usr/share"), Path("/usr/local"))
"""Folders beside this interpreter's packages"""
SHARDS = 8
MAX_FILE_BYTES = 1 << 20
VOCAB_SIZE, SAMPLE_BYTES = 32_000, 30_000_000
"""Of the tokenizer: DeepSeek-Coder's regular tokens, and what it is trained on"""


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """What is in the folder."""

    folder: Path
    num_documents: int
    text_bytes: int
    """in UTF-8"""
    tokenizer_digest: str

    @property
    def jsonl(self) -> list[Path]:
        return [self.folder / f"documents-{index}.jsonl" for index in range(SHARDS)]

    @property
    def parquet(self) -> Path:
        return self.folder / "documents.parquet"

    @property
    def tokenizer(self) -> Path:
        return self.folder / "tokenizer"

    @property
    def tokens(self) -> Path:
        """Prefix of the encoded corpus."""
        return self.folder / "tokens"

    def texts(self) -> list[str]:
        """All documents in order."""
        return pq.read_table(self.parquet)["content"].to_pylist()

    def described(self) -> dict[str, str | int]:
        """For the record of a measurement."""
        return {
            "corpus_documents": self.num_documents, "corpus_bytes": self.text_bytes,
            "tokenizer": self.tokenizer_digest[:12],
        }  # fmt: skip


def prepared(folder: Path, *, megabytes: int) -> Corpus:
    """The corpus in `folder`, made first if it is not there; DataError if the machine holds too little text."""
    about = folder / "corpus.json"
    if about.exists():
        corpus = Corpus(folder=folder, **json.loads(about.read_text()))
        if corpus.text_bytes < megabytes * 1_000_000:
            raise DataError(f"{folder}: {corpus.text_bytes:,} bytes, less than --megabytes {megabytes}; remove it")
        _encode(corpus)
        return corpus
    folder.mkdir(parents=True, exist_ok=True)
    say(f"{folder}: gathering {megabytes} MB of sources")
    texts = _gather(megabytes * 1_000_000)
    size = sum(len(text.encode()) for text in texts)
    if size < megabytes * 1_000_000:
        raise DataError(f"only {size / 1e6:.0f} MB of sources on this machine; ask for fewer --megabytes")
    _write(folder, texts)
    tokenizer = _train(texts)
    tokenizer.save(folder / "tokenizer")
    corpus = Corpus(folder=folder, num_documents=len(texts), text_bytes=size, tokenizer_digest=tokenizer.digest)
    write_json(about, {key: value for key, value in asdict(corpus).items() if key != "folder"})
    _encode(corpus)
    return corpus


def _gather(limit: int) -> list[str]:
    """Distinct texts in the order of their hashes, up to `limit` bytes."""
    found: dict[bytes, Path] = {}
    for path in _files():
        content = path.read_bytes()
        try:
            content.decode()
        except UnicodeDecodeError:
            continue
        if content:
            found.setdefault(blake2b(content, digest_size=16).digest(), path)
    texts, size = [], 0
    for key in sorted(found):
        if size >= limit:
            break
        content = found[key].read_bytes()
        size += len(content)
        texts.append(content.decode())
    return texts


def _files() -> Iterator[Path]:
    for root in (Path(sysconfig.get_paths()["purelib"]), *SOURCES):
        for path in sorted(root.rglob("*")):
            if path.suffix in SUFFIXES and path.is_file() and path.stat().st_size <= MAX_FILE_BYTES:
                yield path


def _write(folder: Path, texts: list[str]) -> None:
    bounds = [len(texts) * index // SHARDS for index in range(SHARDS + 1)]
    for index in range(SHARDS):
        with (folder / f"documents-{index}.jsonl").open("w", encoding="utf-8") as lines:
            for text in texts[bounds[index] : bounds[index + 1]]:
                lines.write(json.dumps({"content": text}, ensure_ascii=False) + "\n")
    pq.write_table(pa.table({"content": texts}), folder / "documents.parquet", row_group_size=1000, compression="zstd")


def _encode(corpus: Corpus) -> None:
    """Minutes without a fast encoder, nothing where it has been done."""
    preprocess(PreprocessConfig(input=(corpus.parquet,), tokenizer=corpus.tokenizer, output=corpus.tokens))


def _train(texts: list[str]) -> Tokenizer:
    sample, size = [], 0
    for text in texts:
        if size >= SAMPLE_BYTES:
            break
        sample.append(text)
        size += len(text)
    return train_tokenizer(sample, vocab_size=VOCAB_SIZE)
