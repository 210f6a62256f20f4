"""manifest.json: what a checkpoint is made of, sealed so that any changed byte of it is detected.

Its last member is the SHA-256 of every byte before that digest, so the seal needs no canonical form of JSON. While a
checkpoint is being written each rank leaves a manifest of its own file; the checkpoint's is their union. FORMAT.md
beside this file gives every field and every rule that `decode_manifest` enforces.
"""

import hashlib
import json
import re
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megacoder.checkpoint.boxes import Box, find_fault
from megacoder.checkpoint.tensor_file import BLOCK_SIZE, DTYPES, FileSums, StoredTensor
from megacoder.core.errors import CheckpointError

__all__ = [
    "MANIFEST", "Manifest", "Piece", "TensorEntry", "decode_manifest", "encode_manifest", "merge_manifests",
    "read_manifest",
]  # fmt: skip

MANIFEST = "manifest.json"
FORMAT = "megacoder-checkpoint"
VERSION = 1

_MEMBERS = ["format", "version", "step", "layout", "state", "block_size", "files", "tensors"]
_SEAL = re.compile(rb'"sha256":"([0-9a-f]{64})"}\n\Z')
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*\.safetensors")
_DEEPEST = 64
"""Deepest nesting of `layout` and `state`, so that readers may recurse into them."""


@dataclass(frozen=True)
class Piece:
    """A box of a tensor, and where its elements are."""

    box: Box
    """which elements of the global tensor"""
    file: str
    """name of a file in the checkpoint's folder"""
    key: str
    """name of the tensor, of shape box.sizes, in that file"""


@dataclass(frozen=True)
class TensorEntry:
    """One global tensor."""

    shape: tuple[int, ...]
    """global shape"""
    dtype: str
    """safetensors' name"""
    pieces: tuple[Piece, ...]
    """boxes that cover the tensor exactly; none for a tensor without elements"""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Everything about a checkpoint except its tensors' bytes."""

    step: int
    """training steps done, those whose update was skipped included"""
    layout: dict[str, Any]
    """how the run was laid out over ranks; for people, never needed to load"""
    state: dict[str, Any]
    """plain JSON of the training loop: updates made, position in the data, configuration; no random state"""
    files: dict[str, FileSums]
    """name -> size and checksums"""
    tensors: dict[tuple[str, str], TensorEntry]
    """(kind, Hugging Face name) -> the tensor; kind is weight, exp_avg or exp_avg_sq"""

    def tensors_by_file(self) -> dict[str, list[StoredTensor]]:
        """What each file holds."""
        found: dict[str, list[StoredTensor]] = {file: [] for file in self.files}
        for entry in self.tensors.values():
            for piece in entry.pieces:
                found[piece.file].append(StoredTensor(piece.key, entry.dtype, piece.box.sizes))
        return found

    def cover_faults(self) -> list[str]:
        """A line for each tensor whose pieces leave a hole or overlap."""
        faults = []
        for (kind, name), entry in self.tensors.items():
            fault = find_fault(Box.whole(entry.shape), [piece.box for piece in entry.pieces])
            if fault is not None:
                problem = "is in no file" if fault.missing else "is stored twice"
                faults.append(f"{kind} of {name}: {fault.box} of shape {list(entry.shape)} {problem}")
        return faults


def merge_manifests(parts: Sequence[Manifest]) -> Manifest:
    """The union of manifests of different files of one step; layout and state are the first one's.

    Raises CheckpointError where ranks disagree about a tensor, or the pieces of all of them do not cover it exactly.
    """
    files: dict[str, FileSums] = {}
    tensors: dict[tuple[str, str], TensorEntry] = {}
    for part in parts:
        files |= part.files
        for key, entry in part.tensors.items():
            known = tensors.get(key, TensorEntry(entry.shape, entry.dtype, ()))
            if (known.shape, known.dtype) != (entry.shape, entry.dtype):
                raise CheckpointError(
                    f"{key[0]} of {key[1]} is {known.dtype} {list(known.shape)} on one rank "
                    f"and {entry.dtype} {list(entry.shape)} on another"
                )
            tensors[key] = TensorEntry(entry.shape, entry.dtype, known.pieces + entry.pieces)
    first = parts[0]
    merged = Manifest(step=first.step, layout=first.layout, state=first.state, files=files, tensors=tensors)
    faults = merged.cover_faults()
    if faults:
        raise CheckpointError(f"{faults[0]}; the ranks' fragments must cover every tensor exactly once")
    return merged


def encode_manifest(manifest: Manifest) -> bytes:
    """The file's bytes: one line for each member, the seal last."""
    tensors: dict[str, dict[str, Any]] = {}
    for (kind, name), entry in manifest.tensors.items():
        tensors.setdefault(kind, {})[name] = {
            "shape": entry.shape,
            "dtype": entry.dtype,
            "pieces": [
                {"offsets": piece.box.offsets, "sizes": piece.box.sizes, "file": piece.file, "key": piece.key}
                for piece in entry.pieces
            ],
        }
    files = {name: {"size": sums.size, "crc32": sums.crc32} for name, sums in manifest.files.items()}
    values = [FORMAT, VERSION, manifest.step, manifest.layout, manifest.state, BLOCK_SIZE, files, tensors]
    members = [
        f'"{member}":{json.dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=False)},\n'
        for member, value in zip(_MEMBERS, values, strict=True)
    ]
    body = ("{" + "".join(members)).encode()
    return body + b'"sha256":"' + hashlib.sha256(body).hexdigest().encode() + b'"}\n'


def read_manifest(path: Path) -> Manifest:
    """Reads and checks a manifest, which must be a regular file; every CheckpointError begins with its path."""
    try:
        if not stat.S_ISREG(path.lstat().st_mode):
            raise CheckpointError(f"{path}: not a regular file; a checkpoint may not contain links")
        content = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}; the checkpoint is incomplete") from None
    return decode_manifest(content, where=str(path))


def decode_manifest(content: bytes, *, where: str) -> Manifest:
    """The manifest in `content`, every field checked; CheckpointErrors begin with `where`."""
    seal = _SEAL.search(content)
    if seal is None or hashlib.sha256(content[: seal.start()]).hexdigest().encode() != seal.group(1):
        raise CheckpointError(f"{where}: its content does not match its SHA-256: it is cut off, damaged or edited")
    try:
        return _manifest(_typed(json.loads(content), dict, "manifest"))
    except _Invalid as error:
        raise CheckpointError(f"{where}: {error}") from None
    except (ValueError, RecursionError):
        raise CheckpointError(f"{where}: not JSON") from None


class _Invalid(Exception):
    """What is wrong with a manifest, without its path."""


def _manifest(table: dict[str, Any]) -> Manifest:
    if table.get("format") != FORMAT:
        raise _Invalid(f"format {table.get('format')!r}, expected {FORMAT!r}")
    if table.get("version") != VERSION:
        raise _Invalid(f"version {table.get('version')!r} of the format; this megacoder reads version {VERSION}")
    if list(table) != [*_MEMBERS, "sha256"]:
        raise _Invalid(f"members {list(table)}, expected {[*_MEMBERS, 'sha256']}")
    if table["block_size"] != BLOCK_SIZE:
        raise _Invalid(f"block_size {table['block_size']!r}, expected {BLOCK_SIZE}")
    manifest = Manifest(
        step=_integer(table["step"], "step"),
        layout=_shallow(_typed(table["layout"], dict, "layout"), "layout"),
        state=_shallow(_typed(table["state"], dict, "state"), "state"),
        files={name: _file(name, entry) for name, entry in _typed(table["files"], dict, "files").items()},
        tensors={
            (kind, name): _tensor(entry, f"{kind} of {name}")
            for kind, names in _typed(table["tensors"], dict, "tensors").items()
            for name, entry in _typed(names, dict, kind).items()
        },
    )
    places = set()
    for (kind, name), tensor in manifest.tensors.items():
        for piece in tensor.pieces:
            if piece.file not in manifest.files:
                raise _Invalid(f"{kind} of {name} is in file {piece.file!r}, which is not listed")
            if (piece.file, piece.key) in places:
                raise _Invalid(f"{kind} of {name}: {piece.key!r} of {piece.file} is used twice")
            places.add((piece.file, piece.key))
    return manifest


def _file(name: str, entry: Any) -> FileSums:
    if not _FILE_NAME.fullmatch(name):
        raise _Invalid(f"file {name!r}: not a plain name ending in .safetensors, inside the checkpoint's folder")
    members = _members(entry, ["size", "crc32"], f"file {name}")
    size = _integer(members["size"], f"size of file {name}")
    sums = _integers(members["crc32"], f"crc32 of file {name}")
    if len(sums) != -(-size // BLOCK_SIZE):
        raise _Invalid(f"file {name}: {len(sums)} checksums for {size} bytes")
    return FileSums(size, sums)


def _tensor(entry: Any, what: str) -> TensorEntry:
    members = _members(entry, ["shape", "dtype", "pieces"], what)
    shape = _integers(members["shape"], f"shape of {what}")
    dtype = _typed(members["dtype"], str, f"dtype of {what}")
    if dtype not in DTYPES:
        raise _Invalid(f"{what}: dtype {dtype!r}, expected one of {', '.join(DTYPES)}")
    pieces = []
    for piece in _typed(members["pieces"], list, f"pieces of {what}"):
        place = _members(piece, ["offsets", "sizes", "file", "key"], f"piece of {what}")
        box = Box(_integers(place["offsets"], f"offsets in {what}"), _integers(place["sizes"], f"sizes in {what}"))
        if len(box.offsets) != len(box.sizes) or not box.lies_in(shape) or box.volume == 0:
            raise _Invalid(f"{what}: offsets {box.offsets} and sizes {box.sizes} are not a box in shape {list(shape)}")
        pieces.append(Piece(box, _typed(place["file"], str, f"file of {what}"), _typed(place["key"], str, "key")))
    return TensorEntry(shape, dtype, tuple(pieces))


def _members(value: Any, names: list[str], what: str) -> dict[str, Any]:
    if not isinstance(value, dict) or list(value) != names:
        raise _Invalid(f"{what}: expected the members {', '.join(names)}")
    return value


def _typed(value: Any, kind: type, what: str) -> Any:
    if not isinstance(value, kind):
        raise _Invalid(f"{what} = {value!r}: expected {kind.__name__}")
    return value


def _shallow(value: dict[str, Any], what: str) -> dict[str, Any]:
    level: list[Any] = [value]
    for _ in range(_DEEPEST):
        level = [
            child
            for item in level
            if isinstance(item, dict | list)
            for child in (item.values() if isinstance(item, dict) else item)
        ]
        if not level:
            return value
    raise _Invalid(f"{what}: nested more than {_DEEPEST} levels deep")


def _integer(value: Any, what: str) -> int:
    if type(value) is not int or value < 0:  # a bool is an int to isinstance
        raise _Invalid(f"{what} = {value!r}: expected a non-negative integer")
    return value


def _integers(value: Any, what: str) -> tuple[int, ...]:
    return tuple(_integer(item, what) for item in _typed(value, list, what))
