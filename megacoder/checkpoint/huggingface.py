"""Hugging Face model folders: config.json, safetensors in one file or in shards with an index, both ways.

This module knows names, shapes and files, not models: `megacoder.model.huggingface` says which tensors there are.
Weights are streamed: a writer holds a chunk of a tensor, a reader maps files into memory and hands out some rows at a
time, so that a small machine can convert a 33B model. A folder appears complete or not at all, and a reader checks
every name and shape against the files' headers before it reads the first weight.

Layout (huggingface.co/docs/safetensors; transformers 4 and 5 read it): `model.safetensors`, or
`model-00001-of-0000N.safetensors` beside `model.safetensors.index.json` = {"metadata": {"total_size": bytes},
"weight_map": {tensor name: file name}}.
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from megacoder.checkpoint.dcp import DCP_METADATA, DCP_SHARDS, DcpFolder
from megacoder.checkpoint.tensor_file import StoredTensor, write_tensor_file
from megacoder.core.errors import CheckpointError, FormatError
from megacoder.core.files import replacing_dir

__all__ = ["TensorFolder", "open_tensors", "read_config", "write_model_folder"]

_MAX_SHARD_BYTES = 5 * 10**9
"""Bytes of tensors in a shard, transformers' own default."""

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_FLOATS = ("F32", "BF16", "F16")


def write_model_folder(
    folder: Path,
    *,
    config: Mapping[str, Any],
    generation_config: Mapping[str, Any],
    tensors: Sequence[StoredTensor],
    data: Callable[[str], Iterable[memoryview]],
    files: Mapping[str, str],
) -> None:
    """Writes `folder`, replacing an older one only when complete, with the bytes of each tensor from `data(key)`.

    `files` are further text files by name, such as a tokenizer's. Shards hold up to 5 GB, or one larger
    tensor. Raises CheckpointError where the system cannot write.
    """
    try:
        with replacing_dir(folder) as temporary:
            _write_tensors(temporary, tensors, data)
            _write_json(temporary / "config.json", config)
            _write_json(temporary / "generation_config.json", generation_config)
            for name, text in files.items():
                (temporary / name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot write the model: {error.strerror or error}") from None


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a model folder; FormatError where there is none or it is not a JSON object."""
    if not folder.is_dir():
        raise FormatError(f"{folder}: no such folder; expected a model folder with config.json and model.safetensors")
    return _read_json(folder / "config.json")


def open_tensors(folder: Path) -> "TensorFolder | DcpFolder":
    """The tensors of a model folder, ordinary or DCP; FormatError where there are none that can be read."""
    ordinary = (folder / _SINGLE).is_file() or (folder / _INDEX).is_file()
    return DcpFolder(folder) if not ordinary and any(folder.glob(DCP_SHARDS)) else TensorFolder(folder)


class TensorFolder:
    """The tensors of a model folder, by name; files are opened when first needed and mapped, not read."""

    def __init__(self, folder: Path) -> None:
        """Raises FormatError for a folder without safetensors, or with an invalid index."""
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
            raise FormatError(f"{folder}: neither {_SINGLE} nor {_INDEX} in it{_pickled(folder)}")

    def check(self, shapes: Mapping[str, tuple[int, ...]], *, ignored: Iterable[str] = ()) -> None:
        """Raises FormatError naming a tensor that is missing, has a different shape or no float dtype, or is neither
        in `shapes` nor in `ignored` (names or suffixes).
        """
        known_ends = tuple(ignored)
        for name, shape in shapes.items():
            found = self._slice(name)
            if tuple(found.get_shape()) != tuple(shape):
                raise FormatError(
                    f"{self.folder}: {name} has shape {list(found.get_shape())}; config.json implies {list(shape)}"
                )
            if found.get_dtype() not in _FLOATS:
                raise FormatError(
                    f"{self.folder / self._file_of[name]}: {name} is stored as {found.get_dtype()}; only "
                    f"{', '.join(_FLOATS)} can be loaded"
                )
        for name in self._file_of:
            if name not in shapes and not (known_ends and name.endswith(known_ends)):
                raise FormatError(f"{self.folder}: tensor {name} has no place in the model of config.json")

    def read(self, name: str) -> Tensor:
        """A whole tensor in the dtype of its file; FormatError where there is none."""
        return self._slice(name)[:]

    def read_rows(self, name: str, chunk_elements: int) -> Iterator[Tensor]:
        """The same in order, in chunks of rows with about `chunk_elements` elements."""
        rows = self._slice(name)
        shape = rows.get_shape()
        step = max(1, chunk_elements // max(1, math.prod(shape[1:])))
        for begin in range(0, shape[0], step):
            yield rows[begin : begin + step]

    def _slice(self, name: str) -> Any:
        if name not in self._file_of:
            raise FormatError(f"{self.folder}: tensor {name} is missing")
        try:
            return self._file(self._file_of[name]).get_slice(name)
        except SafetensorError:
            raise FormatError(f"{self.folder / self._file_of[name]}: tensor {name} is missing") from None

    def _file(self, name: str) -> Any:
        if name not in self._open_files:
            try:
                self._open_files[name] = safe_open(self.folder / name, framework="pt")
            except (OSError, SafetensorError) as error:
                raise FormatError(f"{self.folder / name}: not readable as safetensors: {error}") from None
        return self._open_files[name]


def _write_tensors(folder: Path, tensors: Sequence[StoredTensor], data: Callable[[str], Iterable[memoryview]]) -> None:
    shards = _shards(tensors)
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file = _SINGLE if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        views = (view for tensor in shard for view in data(tensor.key))
        write_tensor_file(folder / file, shard, views, metadata={"format": "pt"})  # transformers requires it
        weight_map.update({tensor.key: file for tensor in shard})
    if len(shards) > 1:
        total = sum(tensor.num_bytes for tensor in tensors)
        _write_json(folder / _INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _shards(tensors: Iterable[StoredTensor]) -> list[list[StoredTensor]]:
    shards: list[list[StoredTensor]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.num_bytes > _MAX_SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.num_bytes
    return shards


def _pickled(folder: Path) -> str:
    """A hint for folders whose weights are pickled: pickles can run code and are never read."""
    if (folder / DCP_METADATA).exists():
        return (
            "; a torch DCP checkpoint's index is a pickle, which can run code, and is not read: save it with "
            "torch.distributed.checkpoint.HuggingFaceStorageWriter"
        )
    return " (only pickled weights: convert them to safetensors)" if any(folder.glob("pytorch_model*.bin")) else ""


def _is_file_name(name: Any) -> bool:
    return isinstance(name, str) and name == Path(name).name


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FormatError(f"{path}: no such file; is {path.parent} a model folder?") from None
    except (OSError, ValueError, RecursionError) as error:
        raise FormatError(f"{path}: not readable as JSON: {error}") from None
    if not isinstance(value, dict):
        raise FormatError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value
