"""Identifies the inputs of an evaluation by content: names stay the same when a file is edited or a run trains on.

Text files are identified by their SHA-256, checkpoints by their step and the SHA-256 of their manifest, which holds
checksums of all their files. A Hugging Face folder's weights are not read completely, which would take as long as
loading them: their size, beginning (with the header) and end stand for them, since training changes all of a file.
"""

import hashlib
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

from megacoder.core.errors import ConfigError

__all__ = ["answers_of", "file_content", "model_content", "settings_of", "texts_content"]

_TEXTS = (".json", ".jinja", ".txt", ".model")
"""What configurations and tokenizers are in."""
_WEIGHTS = (".safetensors", ".bin")
_ENDS = 1 << 16
"""Bytes at either end of a file of weights."""
_FREE = ("workers", "unsafe", "out", "json", "batch_size", "endpoint", "tp", "follow", "follow_as")
"""Options that change no score of the model but by rounding, so that an evaluation may go on with different ones."""


def settings_of(name: str, args: Any, contents: Mapping[str, str], *, protocol: int) -> dict[str, Any]:
    """What scores depend on: options as they were given, the protocol, and `contents` of inputs by their option.

    `args` is a command's dataclass of options, with groups of them, among which `loading` names the tokenizer.
    """
    options: dict[str, Any] = {}
    for option, value in asdict(args).items():
        options |= value if isinstance(value, dict) else {option: value}
    fixed = {
        option: " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
        for option, value in options.items()
        if option not in _FREE
    }
    contents = dict(contents)
    if (folder := args.loading.tokenizer) is not None:
        contents["tokenizer"] = file_content(folder / "tokenizer.json", option="--tokenizer")
    return {"benchmark": name, "protocol": protocol, **fixed, "contents": contents}


def texts_content(texts: Iterable[str]) -> str:
    """Identifies texts that were read from files, in their order."""
    digest = hashlib.sha256()
    for text in texts:
        encoded = text.encode()
        digest.update(f"{len(encoded)}\0".encode() + encoded)
    return f"sha256 {digest.hexdigest()[:16]}"


def file_content(path: Path, *, option: str) -> str:
    """Identifies a text file; ConfigError if it is not a file, such as a pipe, which can be read only once."""
    if not path.is_file():
        if not path.exists():
            raise ConfigError(f"{option} {path}: there is no such file")
        raise ConfigError(f"{option} {path}: not a file, so nothing can tell later whether it changed; save it to one")
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


def answers_of(checkpoint: Path) -> str:
    """Name for the answers of a followed run's checkpoint: a run that goes back saves other ones of the same step."""
    return model_content(checkpoint).replace(", sha256 ", "-")


def _weights_mark(file: BinaryIO) -> bytes:
    status = os.fstat(file.fileno())
    beginning = file.read(_ENDS)
    file.seek(max(0, status.st_size - _ENDS))
    return f"{status.st_size}\0".encode() + beginning + file.read(_ENDS)
