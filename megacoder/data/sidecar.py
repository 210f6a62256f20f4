"""`PREFIX.json` beside `PREFIX.bin` and `PREFIX.idx`: what the dataset was made from, and with which tokenizer.

Megatron's format says nothing about the tokenizer, and ids of another one train a model on noise without any error.
"""

import json
import os
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

from megacoder.core.config import from_dict, to_dict
from megacoder.core.errors import ConfigError, FormatError
from megacoder.core.files import write_json
from megacoder.data.indexed import IndexedDataset, bin_path, idx_path
from megacoder.data.tokenizer import Tokenizer

__all__ = ["Sidecar", "checksum", "fingerprint", "open_dataset"]

_SAMPLES, _PAGE = 16, 4096
"""Of each file, for `fingerprint`."""


@dataclass(frozen=True, kw_only=True)
class Sidecar:
    """The content of `PREFIX.json`."""

    documents: int
    """documents, each ended by EOS but those without ids"""
    sequences: int
    """files of the documents with ids"""
    tokens: int
    """ids, EOS included"""
    bytes: int
    """size of the text in UTF-8"""
    tokenizer: str
    """the tokenizer's digest"""
    text_key: str
    """column or key of the text"""
    document_key: str | None = None
    """column or key that rows of one document share"""
    inputs: tuple[str, ...]
    """path, size and modification time of each input file, in order"""
    controls: tuple[str, ...] = ()
    """the tokenizer's `by_spelling`, which text did not become; one written before they were known has none"""
    checksum: str | None = None
    """`checksum` of the pair; None in a description written before there was one"""

    @staticmethod
    def path(prefix: Path) -> Path:
        return Path(f"{prefix}.json")

    @classmethod
    def read(cls, prefix: Path) -> "Sidecar | None":
        """The sidecar of a dataset, or None where it has none, as when another program wrote it."""
        path = cls.path(prefix)
        if not path.exists():
            return None
        try:
            return from_dict(cls, json.loads(path.read_text(encoding="utf-8")), where=str(path))
        except (ValueError, ConfigError) as error:
            raise FormatError(f"{path}: not a dataset's description: {error}") from None

    def write(self, prefix: Path) -> None:
        write_json(self.path(prefix), to_dict(self))


def checksum(prefix: Path) -> str:
    """BLAKE2b over `.bin` and then `.idx`, a gigabyte a second; the format itself has none."""
    digest = blake2b(digest_size=16)
    for path in (bin_path(prefix), idx_path(prefix)):
        with path.open("rb") as file:
            while chunk := file.read(1 << 22):
                digest.update(chunk)
    return digest.hexdigest()


def fingerprint(prefix: Path) -> str:
    """A digest of both files' sizes and of pages spread over them: all of a small dataset, milliseconds of a large one.

    Another dataset has another fingerprint, even of as many documents and tokens; a few changed tokens of a large one
    may not show.
    """
    digest = blake2b(digest_size=8)
    for path in (bin_path(prefix), idx_path(prefix)):
        with path.open("rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            digest.update(size.to_bytes(8, "little"))
            places = [number * size // _SAMPLES // _PAGE * _PAGE for number in range(_SAMPLES)]
            for place in places:  # the disk fetches them together
                os.posix_fadvise(file.fileno(), place, _PAGE, os.POSIX_FADV_WILLNEED)
            for place in places:
                digest.update(os.pread(file.fileno(), _PAGE, place))
    return digest.hexdigest()


def open_dataset(prefix: Path, tokenizer: Tokenizer) -> IndexedDataset:
    """Opens a dataset for use with `tokenizer`; ConfigError where it was made with another one."""
    sidecar = Sidecar.read(prefix)
    if sidecar is not None and sidecar.tokenizer != tokenizer.digest:
        raise ConfigError(
            f"{prefix}: made with the tokenizer {sidecar.tokenizer[:12]}, not with this one ({tokenizer.digest[:12]}); "
            "preprocess again, or give the tokenizer that it was made with"
        )
    return IndexedDataset(prefix)
