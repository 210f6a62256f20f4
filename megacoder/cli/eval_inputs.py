"""What an evaluation's scores come from, told by content: a name stays the same when a file is edited or a run goes on.

Files of text are told by their SHA-256, checkpoints by their step and that of their manifest, which holds checksums of
all they are made of. A Hugging Face folder's weights are not read whole, which would take as long as loading them:
their size, beginning (with the header) and end stand for them, and training changes all of a file.
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
    """Of a file of text; ConfigError where there is none, as where a pipe can be read but once."""
    if not path.is_file():
        raise ConfigError(f"{option} {path}: not a file, so that --out cannot tell whether it changes; save it to one")
    with path.open("rb") as file:
        return f"sha256 {hashlib.file_digest(file, 'sha256').hexdigest()[:16]}"


def model_content(folder: Path) -> str:
    """Of a checkpoint, or else a Hugging Face folder; FormatError where it is neither."""
    from megacoder.checkpoint.huggingface import read_config  # imports torch, which scoring a file needs not
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
