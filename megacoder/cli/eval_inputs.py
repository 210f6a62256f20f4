"""Identifies the inputs of an evaluation by content: names stay the same when a file is edited or a run trains on.

Text files are identified by their SHA-256, checkpoints by their step and the SHA-256 of their manifest, which holds
checksums of all their files. A Hugging Face folder's weights are not read completely, which would take as long as
loading them: their size, beginning (with the header) and end stand for them, since training changes all of a file.
"""

import hashlib
import os
from pathlib import Path
from typing import BinaryIO

from megacoder.core.errors import ConfigError

__all__ = ["file_content", "model_content"]

_TEXTS = (".json", ".jinja", ".txt", ".model")
"""What configurations and tokenizers are in."""
_WEIGHTS = (".safetensors", ".bin")
_ENDS = 1 << 16
"""Bytes at either end of a file of weights."""


def file_content(path: Path, *, option: str) -> str:
    """Identifies a text file; ConfigError if it is not a file, such as a pipe, which can be read only once."""
    if not path.is_file():
        raise ConfigError(f"{option} {path}: not a file, so --out cannot tell whether it changes; save it to one")
    with path.open("rb") as file:
        return f"sha256 {hashlib.file_digest(file, 'sha256').hexdigest()[:16]}"


def model_content(folder: Path) -> str:
    """Identifies a checkpoint, or else a Hugging Face folder; FormatError if it is neither."""
    from megacoder.checkpoint.huggingface import read_config  # imports torch, which scoring a file does not need
    from megacoder.checkpoint.manifest import MANIFEST

    if (folder / MANIFEST).is_file():
        return f"{folder.name}, {file_content(folder / MANIFEST, option='--model')}"
    read_config(folder)
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix in _TEXTS + _WEIGHTS and path.is_file():
            with path.open("rb") as file:
                digest.update(f"{path.name}\0".encode())
                digest.update(file.read() if path.suffix in _TEXTS else _weights_mark(file))
    return f"sha256 {digest.hexdigest()[:16]}"


def _weights_mark(file: BinaryIO) -> bytes:
    status = os.fstat(file.fileno())
    beginning = file.read(_ENDS)
    file.seek(max(0, status.st_size - _ENDS))
    return f"{status.st_size}\0".encode() + beginning + file.read(_ENDS)
