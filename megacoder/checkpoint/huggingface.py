"""Hugging Face model folders: config.json, safetensors in one file or in shards with an index, both ways.

This module knows names, shapes and files, not models: `megacoder.model.huggingface` says which tensors there are.
Weights stream: a writer holds one shard, a reader maps files into memory and hands out one tensor at a time, so that a
33B model passes through a small machine. A folder appears whole or not at all, and a reader checks every name and shape
against the files' headers before it reads the first weight.

Layout (huggingface.co/docs/safetensors; transformers 4 and 5 read it): `model.safetensors`, or
`model-00001-of-0000N.safetensors` beside `model.safetensors.index.json` = {"metadata": {"total_size": bytes},
"weight_map": {tensor name: file name}}.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megacoder.core.errors import CheckpointError, ConfigError, FormatError
from megacoder.core.files import replacing_dir

__all__ = ["MAX_SHARD_BYTES", "TensorFolder", "read_config", "write_model_folder"]

MAX_SHARD_BYTES = 5 * 10**9
"""Bytes of tensors in a shard, transformers' own default."""

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


def write_model_folder(
    folder: Path,
    *,
    config: Mapping[str, Any],
    generation_config: Mapping[str, Any],
    tensors: Iterable[tuple[str, Tensor]],
    files: Mapping[str, str] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Writes `folder`, replacing an older one only when whole; `tensors` is consumed one shard at a time.

    `files` are further text files by name, such as a tokenizer's. A tensor larger than `max_shard_bytes` gets a shard
    of its own. Tensors must not share memory.
    """
    if max_shard_bytes < 1:
        raise ConfigError(f"max_shard_bytes = {max_shard_bytes}: must be at least 1")
    with replacing_dir(folder) as temporary:
        _write_tensors(temporary, tensors, max_shard_bytes)
        _write_json(temporary / "config.json", config)
        _write_json(temporary / "generation_config.json", generation_config)
        for name, text in (files or {}).items():
            (temporary / name).write_text(text, encoding="utf-8")


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a model folder; FormatError where there is none or it is not a JSON object."""
    if not folder.is_dir():
        raise FormatError(f"{folder}: no such folder; expected a model folder with config.json and model.safetensors")
    return _read_json(folder / "config.json")


class TensorFolder:
    """The tensors of a model folder, by name; files are opened when first needed and mapped, not read."""

    def __init__(self, folder: Path) -> None:
        """Raises FormatError for a folder without safetensors, or an index that is no index."""
        self.folder = folder
        self._open_files: dict[str, Any] = {}
        self._file_of: dict[str, str]
        if (folder / _SINGLE).is_file():
            self._file_of = dict.fromkeys(self._file(_SINGLE).keys(), _SINGLE)
        elif (folder / _INDEX).is_file():
            weight_map = _read_json(folder / _INDEX).get("weight_map")
            if not isinstance(weight_map, dict) or not all(_is_file_name(file) for file in weight_map.values()):
                raise FormatError(f"{folder / _INDEX}: no 'weight_map' from tensor names to file names")
            self._file_of = weight_map
        else:
            pickled = (
                " (only pickled weights: convert them to safetensors)" if any(folder.glob("pytorch_model*.bin")) else ""
            )
            raise FormatError(f"{folder}: neither {_SINGLE} nor {_INDEX} in it{pickled}")

    def read(
        self, shapes: Mapping[str, tuple[int, ...]], *, ignored: Iterable[str] = ()
    ) -> Iterator[tuple[str, Tensor]]:
        """Yields (name, tensor) in the order of `shapes`, each tensor in the dtype of its file.

        Before the first one, raises FormatError naming a tensor that is missing, has another shape, or is neither in
        `shapes` nor in `ignored` (names, or their ends).
        """
        known_ends = tuple(ignored)
        for name, shape in shapes.items():
            found = self._shape(name)
            if found != tuple(shape):
                raise FormatError(f"{self.folder}: {name} has shape {list(found)}; config.json implies {list(shape)}")
        for name in self._file_of:
            if name not in shapes and not (known_ends and name.endswith(known_ends)):
                raise FormatError(f"{self.folder}: tensor {name} has no place in the model of config.json")
        return ((name, self._file(self._file_of[name]).get_tensor(name)) for name in shapes)

    def _shape(self, name: str) -> tuple[int, ...]:
        if name not in self._file_of:
            raise FormatError(f"{self.folder}: tensor {name} is missing")
        try:
            return tuple(self._file(self._file_of[name]).get_slice(name).get_shape())
        except SafetensorError:
            raise FormatError(f"{self.folder / self._file_of[name]}: tensor {name} is missing") from None

    def _file(self, name: str) -> Any:
        if name not in self._open_files:
            try:
                self._open_files[name] = safe_open(self.folder / name, framework="pt")
            except (OSError, SafetensorError) as error:
                raise FormatError(f"{self.folder / name}: not readable as safetensors: {error}") from None
        return self._open_files[name]


def _write_tensors(folder: Path, tensors: Iterable[tuple[str, Tensor]], max_shard_bytes: int) -> None:
    shards: list[list[str]] = []
    total = 0
    for shard in _shards(tensors, max_shard_bytes):
        shards.append(list(shard))
        total += sum(tensor.nbytes for tensor in shard.values())
        try:
            save_file(shard, folder / f"shard-{len(shards)}", metadata={"format": "pt"})
        except SafetensorError as error:  # it wraps what the system said, a full disk for one
            raise CheckpointError(f"{folder.parent}: cannot write the model: {error}") from None
        del shard  # else it would live on while the next one is gathered
    if len(shards) == 1:
        (folder / "shard-1").rename(folder / _SINGLE)
        return
    weight_map = {}
    for number, names in enumerate(shards, start=1):  # only now is their count known, which is part of the name
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        (folder / f"shard-{number}").rename(folder / file)
        weight_map.update(dict.fromkeys(names, file))
    _write_json(folder / _INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _shards(tensors: Iterable[tuple[str, Tensor]], max_shard_bytes: int) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors:
        if shard and size + tensor.nbytes > max_shard_bytes:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor
        size += tensor.nbytes
    yield shard


def _is_file_name(name: Any) -> bool:
    return isinstance(name, str) and name == Path(name).name


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FormatError(f"{path}: no such file; is {path.parent} a model folder?") from None
    except (OSError, ValueError) as error:
        raise FormatError(f"{path}: not readable as JSON: {error}") from None
    if not isinstance(value, dict):
        raise FormatError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value
