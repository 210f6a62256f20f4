"""safetensors files, streamed out and mapped in, with a CRC-32 for every 16 MiB.

The safetensors layout is a header that gives every tensor's place, then the bytes; so a file can be written straight
from where the tensors are, and any slice can be read straight from the page cache. The safetensors library builds a
whole file in memory and stores no checksum. Here a reader checks exactly the blocks that it is about to copy from, once
each, so that a slice of a large file costs only its own blocks and still cannot come out wrong. The price of mapping:
if a file is truncated while mapped, or a disk fails, SIGBUS kills the process without a message. Nothing in this
library truncates a file (rotation removes names; mapped files stay readable), and sizes are checked before mapping.

CRC-32 detects any damage of up to 32 consecutive bits and misses other damage once in 2^32 blocks; it guards against
accidents, not against forgers. `zlib.crc32` runs at 6.9 GB/s on one core (AMD EPYC); hashlib's SHA-256 at 2.1 GB/s,
slower than the disks that checkpoints are written to.
"""

import json
import math
import mmap
import operator
import os
import stat
import zlib
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megacoder.checkpoint.boxes import Box
from megacoder.core.errors import CheckpointError, DamagedCheckpoint

__all__ = [
    "BLOCK_SIZE", "DTYPES", "FileSums", "StoredTensor", "TensorFile", "dtype_name", "size_fault",
    "write_tensor_file",
]  # fmt: skip

BLOCK_SIZE = 1 << 24
"""Bytes under one checksum."""

_WRITE_BEHIND = 1 << 26
"""Bytes written before the system is asked to start flushing them to the device."""

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
"""safetensors' name of a dtype -> torch's."""


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a file."""

    key: str
    """its name in the file"""
    dtype: str
    """safetensors' name, a key of DTYPES"""
    shape: tuple[int, ...]
    """its dims"""

    @property
    def num_bytes(self) -> int:
        """Bytes of data."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class FileSums:
    """What a manifest says about a file."""

    size: int
    """bytes"""
    crc32: tuple[int, ...]
    """of each BLOCK_SIZE bytes, the last block shorter"""


def dtype_name(dtype: torch.dtype) -> str:
    """safetensors' name of a torch dtype; CheckpointError for an unsupported one."""
    for name, known in DTYPES.items():
        if known == dtype:
            return name
    raise CheckpointError(f"tensors of dtype {dtype} cannot be stored; use one of {', '.join(DTYPES)}")


def write_tensor_file(
    path: Path,
    tensors: Sequence[StoredTensor],
    data: Iterable[memoryview],
    *,
    metadata: Mapping[str, str] | None = None,
) -> FileSums:
    """Writes a safetensors file and flushes it to the device; holds no more than one item of `data` at a time.

    `data` is the tensors' bytes in their order, cut anywhere. Each tensor must begin at a multiple of its item size
    (sort by dtype, widest first). `metadata` is for other programs' readers.
    """
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    position = 0
    for tensor in tensors:
        end = position + tensor.num_bytes
        header[tensor.key] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the data begins at a multiple of 8
    sink = _Sink(path)
    try:
        sink.write(memoryview(len(text).to_bytes(8, "little") + text))
        for view in data:
            sink.write(view)
        if sink.size != 8 + len(text) + position:
            raise ValueError(f"got {sink.size - 8 - len(text)} bytes of data for tensors of {position} bytes")
        os.fsync(sink.descriptor)
    finally:
        sink.close()
    return FileSums(sink.size, tuple(sink.crc32))


class _Sink:
    """A file descriptor that checksums what is written to it, in a thread: writing and checksums take equally long.

    From time to time it asks the system to start flushing to the device. Little is then left for the final flush, which
    otherwise would have to write all that the system keeps dirty in memory.
    """

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        self.size = 0
        self.crc32: list[int] = []
        self._started = 0
        self._summer = ThreadPoolExecutor(1, thread_name_prefix="crc32")

    def write(self, view: memoryview) -> None:
        while len(view):
            filled = self.size % BLOCK_SIZE
            if filled == 0:
                self.crc32.append(0)
            part, view = view[: BLOCK_SIZE - filled], view[BLOCK_SIZE - filled :]
            total = self._summer.submit(zlib.crc32, part, self.crc32[-1])
            self.size += len(part)
            while len(part):
                part = part[os.write(self.descriptor, part) :]
            self.crc32[-1] = total.result()
            if self.size - self._started >= _WRITE_BEHIND:
                _start_writing(self.descriptor, self._started, self.size - self._started)
                self._started = self.size

    def close(self) -> None:
        self._summer.shutdown()
        os.close(self.descriptor)


def _start_writing(descriptor: int, start: int, size: int) -> None:
    """Starts to flush part of a file to the device, without waiting; flushed pages may leave the page cache."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, start, size, os.POSIX_FADV_DONTNEED)


class TensorFile:
    """A mapped safetensors file; no byte is used before its block's checksum has been verified."""

    def __init__(self, path: Path, sums: FileSums, tensors: Sequence[StoredTensor], unchecked: set[int]) -> None:
        """Maps `path`, which must be a file of the size in `sums`, with exactly these tensors in any order.

        `unchecked` holds the numbers of the blocks still to be verified, and is updated; the caller owns it, so that a
        file can be closed and mapped again. Raises CheckpointError naming the file for anything wrong.
        """
        self.path, self.sums, self._unchecked = path, sums, unchecked
        fault = size_fault(path, sums.size)
        if fault is not None:
            raise CheckpointError(fault)
        try:
            with path.open("rb") as file:  # mapping to that size fails if the file has just been cut off
                self._map = mmap.mmap(file.fileno(), sums.size, access=mmap.ACCESS_READ)
                self._bytes = memoryview(self._map)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path}: cannot be mapped: {error}") from None
        self._begin = self._parse_header({tensor.key: tensor for tensor in tensors})

    def read(self, tensor: StoredTensor, part: Box, out: np.ndarray) -> None:
        """Fills `out`, of shape part.sizes, from a part of a tensor; its items are integers as wide as the dtype.

        A copy needs only the width, and NumPy has no bfloat16.
        """
        width = DTYPES[tensor.dtype].itemsize
        begin = self._begin[tensor.key]
        # From the first element of the part to its last, in the flattened tensor.
        strides = [math.prod(tensor.shape[dim + 1 :]) for dim in range(len(tensor.shape))]
        first = sum(offset * stride for offset, stride in zip(part.offsets, strides, strict=True))
        last = sum((end - 1) * stride for end, stride in zip(part.ends, strides, strict=True))
        self._check(begin + first * width, begin + (last + 1) * width)
        flat = np.frombuffer(self._bytes[begin : begin + tensor.num_bytes], dtype=out.dtype)
        np.copyto(out, flat.reshape(tensor.shape)[part.inside(Box.whole(tensor.shape))])

    def check_all(self) -> None:
        """Verifies the blocks from which nothing has been read yet."""
        self._check(0, self.sums.size)

    def _check(self, start: int, stop: int) -> None:
        blocks = range(start // BLOCK_SIZE, -(-stop // BLOCK_SIZE))
        if hasattr(mmap, "MADV_WILLNEED"):  # else the system reads a few pages at a time, as they are touched
            begin = blocks.start * BLOCK_SIZE // mmap.PAGESIZE * mmap.PAGESIZE
            self._map.madvise(mmap.MADV_WILLNEED, begin, min(blocks.stop * BLOCK_SIZE, self.sums.size) - begin)
        for block in blocks:
            if block in self._unchecked:
                begin = block * BLOCK_SIZE
                if zlib.crc32(self._bytes[begin : begin + BLOCK_SIZE]) != self.sums.crc32[block]:
                    end = min(begin + BLOCK_SIZE, self.sums.size)
                    raise DamagedCheckpoint(
                        f"{self.path}: bytes {begin} to {end} are not what was written (wrong CRC-32); "
                        "put a good copy of the file there, or move its checkpoint away and use an older one"
                    )
                self._unchecked.discard(block)

    def _parse_header(self, expected: dict[str, StoredTensor]) -> dict[str, int]:
        """Where each tensor's bytes begin in the file, after checking that the tensors are those expected."""
        self._check(0, min(8, self.sums.size))
        length = int.from_bytes(self._bytes[:8], "little")
        data = 8 + length
        if data > self.sums.size:
            raise CheckpointError(f"{self.path}: not a safetensors file: its header would be {length} bytes long")
        self._check(0, data)
        try:
            header = json.loads(bytes(self._bytes[8:data]))
            header.pop("__metadata__", None)
            found = {key: StoredTensor(key, entry["dtype"], tuple(entry["shape"])) for key, entry in header.items()}
            begins = {key: data + operator.index(entry["data_offsets"][0]) for key, entry in header.items()}
            ends = {key: data + operator.index(entry["data_offsets"][1]) for key, entry in header.items()}
        except (ValueError, AttributeError, LookupError, TypeError, RecursionError):
            raise CheckpointError(f"{self.path}: not a safetensors file: its header does not parse") from None
        for key in sorted(expected.keys() | found.keys()):
            if expected.get(key) != found.get(key):
                raise CheckpointError(f"{self.path}: {key!r} is not the tensor that the manifest describes")
            if (
                not data <= begins[key] <= ends[key] <= self.sums.size
                or ends[key] - begins[key] != found[key].num_bytes
            ):
                raise CheckpointError(f"{self.path}: {key!r} lies outside the file")
        return begins


def size_fault(path: Path, size: int) -> str | None:
    """What is wrong with `path` unless it is a regular file, not a link, of exactly `size` bytes."""
    try:
        found = path.lstat()
    except OSError as error:
        return f"{path}: {error.strerror}; the checkpoint is incomplete"
    if not stat.S_ISREG(found.st_mode):
        return f"{path}: not a regular file; a checkpoint may not contain links"
    if found.st_size != size:
        return f"{path}: {found.st_size} bytes, the manifest says {size}; the checkpoint is incomplete"
    return None
