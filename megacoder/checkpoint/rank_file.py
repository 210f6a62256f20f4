"""What one rank puts into a checkpoint: fragments of tensors, laid out as the tensors of one file.

A fragment is what a ZeRO rank owns of a weight or of its optimizer state: a range of the flattened tensor, or of the
flattened shard where tensor parallelism has cut it first. Each becomes a few boxes whose bytes are in the fragment's
order, so a file's data is its fragments end to end, with nothing to rearrange.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megacoder.checkpoint.boxes import Box, boxes_of_range
from megacoder.checkpoint.manifest import Piece, TensorEntry
from megacoder.checkpoint.tensor_file import StoredTensor, dtype_name

__all__ = ["Fragment", "RankFile", "Staging", "bytes_of", "live_bytes", "plan_rank_file"]

_DEVICE_CHUNK = 1 << 24
"""Elements that a save without staging (a synchronous one) fetches from a device at a time."""

_BLOCK_BYTES = 1 << 28
"""A power of two, and so a multiple of every dtype's size."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Fragment:
    """Elements [start, stop) of the row-major flattening of the box `region` of a global tensor."""

    name: str
    """the weight's Hugging Face name"""
    kind: str
    """weight, exp_avg or exp_avg_sq"""
    global_shape: tuple[int, ...]
    """shape of the whole tensor"""
    region: Box
    """this rank's shard of it; Box.whole(global_shape) without tensor parallelism"""
    start: int
    """first element of the flattened region"""
    stop: int
    """one past the last; a fragment may be empty"""
    data: Tensor
    """(stop - start,), contiguous, on any device: read by a save, filled by a load; on `meta` to name elements only"""

    def __post_init__(self) -> None:
        if not self.region.lies_in(self.global_shape):
            raise ValueError(f"{self}: the region is not a box of the tensor")
        if not 0 <= self.start <= self.stop <= self.region.volume:
            raise ValueError(f"{self}: not a range of the region's {self.region.volume} elements")
        if self.data.shape != (self.stop - self.start,) or not self.data.is_contiguous():
            raise ValueError(
                f"{self}: data has shape {tuple(self.data.shape)} and stride {self.data.stride()}; expected "
                f"({self.stop - self.start},) and contiguous"
            )

    def __str__(self) -> str:
        shape = list(self.global_shape)
        return f"{self.kind} of {self.name}, elements {self.start} to {self.stop} of {self.region} of {shape}"

    def boxes(self) -> list[Box]:
        """The fragment as boxes of the global tensor, contiguous in `data` one after the other."""
        return boxes_of_range(self.region, self.start, self.stop)


@dataclass(frozen=True, kw_only=True)
class RankFile:
    """The plan of a rank's file."""

    fragments: list[Fragment]
    """in the order of the file's data"""
    stored: list[StoredTensor]
    """the file's tensors, in that order"""
    entries: dict[tuple[str, str], TensorEntry]
    """(kind, name) -> the pieces of that tensor in this file"""


def plan_rank_file(file: str, fragments: Sequence[Fragment]) -> RankFile:
    """Lays fragments out in a file called `file`: widest dtypes first, so that every tensor is aligned."""
    ordered = sorted(fragments, key=lambda fragment: -fragment.data.itemsize)
    stored: list[StoredTensor] = []
    entries: dict[tuple[str, str], TensorEntry] = {}
    for fragment in ordered:
        dtype = dtype_name(fragment.data.dtype)
        known = entries.get((fragment.kind, fragment.name), TensorEntry(fragment.global_shape, dtype, ()))
        if (known.shape, known.dtype) != (fragment.global_shape, dtype):
            raise ValueError(f"{fragment} is {dtype}; an earlier fragment is {known.dtype} of {list(known.shape)}")
        pieces = [
            Piece(box, file, f"{fragment.kind}/{fragment.name}/{index}")
            for index, box in enumerate(fragment.boxes(), start=len(known.pieces))
        ]
        stored += [StoredTensor(piece.key, dtype, piece.box.sizes) for piece in pieces]
        entries[fragment.kind, fragment.name] = TensorEntry(fragment.global_shape, dtype, (*known.pieces, *pieces))
    return RankFile(fragments=ordered, stored=stored, entries=entries)


def live_bytes(fragments: Sequence[Fragment]) -> Iterator[memoryview]:
    """The fragments' bytes straight from their tensors; tensors on a device are copied to the host in chunks."""
    for fragment in fragments:
        for chunk in fragment.data.detach().split(_DEVICE_CHUNK):
            yield bytes_of(chunk.cpu())


class Staging:
    """Host memory for a copy of a rank's state, reused by every save: fresh pages would cost as much as two copies.

    In blocks, because torch rounds page-locked memory up to a power of two: a single one of 33 GiB would take 64.
    """

    def __init__(self) -> None:
        self._blocks: list[Tensor] = []

    def copy_out(self, fragments: Sequence[Fragment]) -> list[memoryview]:
        """The fragments' bytes in order, in as many pieces; valid until the next call. The tensors may then change."""
        devices = {fragment.data.device for fragment in fragments if fragment.data.is_cuda}
        size = sum(fragment.data.nbytes for fragment in fragments)
        if sum(map(len, self._blocks)) < size:
            self._blocks.clear()  # give the old ones back first
            for start in range(0, size, _BLOCK_BYTES):
                length = min(_BLOCK_BYTES, size - start)
                self._blocks.append(torch.empty(length, dtype=torch.uint8, pin_memory=bool(devices)))
        position = 0
        for fragment in fragments:
            for part in _split_at_blocks(fragment.data.detach(), position):
                block, offset = divmod(position, _BLOCK_BYTES)
                target = self._blocks[block][offset : offset + part.nbytes].view(part.dtype)
                target.copy_(part, non_blocking=True)
                position += part.nbytes
        for device in devices:
            torch.cuda.current_stream(device).synchronize()
        starts = range(0, size, _BLOCK_BYTES)
        return [bytes_of(block[: size - start]) for block, start in zip(self._blocks, starts, strict=False)]


def _split_at_blocks(values: Tensor, position: int) -> tuple[Tensor, ...]:
    """`values`, which go to byte `position` of the blocks, cut where a block ends."""
    first = min(len(values), (-position % _BLOCK_BYTES) // values.itemsize)
    head, rest = values[:first], values[first:]
    return tuple(part for part in (head, *rest.split(_BLOCK_BYTES // values.itemsize)) if len(part))


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor of one dim on the host."""
    # A tensor of one element or none is contiguous with any stride, but a view as another dtype needs a stride of 1.
    return tensor.as_strided(tensor.shape, (1,)).view(torch.uint8).numpy().data
