"""Boxes of a tensor, and how to get from the boxes that are stored to the boxes that are wanted.

A box is what every layout has in common: a tensor-parallel shard is a box of the global tensor, and the flat range of
it that a ZeRO rank owns is a few boxes (three for a matrix: the rest of a row, full rows, the start of a row). So
files hold boxes, and loading in a different layout is intersection. All of this is integer arithmetic: no tensor is
touched here. A plan covers what is wanted exactly once, or is an error that names the first hole or overlap.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from megacoder.core.errors import CheckpointError, MegacoderError

__all__ = ["Box", "Copy", "Fault", "boxes_of_range", "find_fault", "plan_copies"]


@dataclass(frozen=True)
class Box:
    """The elements offsets[d] <= index[d] < offsets[d] + sizes[d] of a tensor; of a 0-d tensor, its one element."""

    offsets: tuple[int, ...]
    """first index along each dim"""
    sizes: tuple[int, ...]
    """length along each dim"""

    @staticmethod
    def whole(shape: Sequence[int]) -> "Box":
        """The box that is all of a tensor of that shape."""
        return Box((0,) * len(shape), tuple(shape))

    @property
    def ends(self) -> tuple[int, ...]:
        """One past the last index along each dim."""
        return tuple(offset + size for offset, size in zip(self.offsets, self.sizes, strict=True))

    @property
    def volume(self) -> int:
        """Number of elements."""
        return math.prod(self.sizes)

    def lies_in(self, shape: Sequence[int]) -> bool:
        """Whether a tensor of that shape has all these elements."""
        return len(self.offsets) == len(self.sizes) == len(shape) and all(
            offset >= 0 and size >= 0 and offset + size <= length
            for offset, size, length in zip(self.offsets, self.sizes, shape, strict=True)
        )

    def inside(self, outer: "Box") -> tuple[slice, ...]:
        """This box as slices of an array that holds `outer`."""
        return tuple(
            slice(offset - origin, end - origin)
            for offset, end, origin in zip(self.offsets, self.ends, outer.offsets, strict=True)
        )

    def __str__(self) -> str:
        return f"[{', '.join(f'{offset}:{end}' for offset, end in zip(self.offsets, self.ends, strict=True))}]"


@dataclass(frozen=True)
class Fault:
    """Why a list of boxes does not cover a region exactly."""

    missing: bool
    """True for a hole, False for elements that two boxes hold"""
    box: Box
    """the first such part of the region"""


@dataclass(frozen=True)
class Copy:
    """Copy `overlap` from stored box number `source` to wanted box number `target`."""

    source: int
    target: int
    overlap: Box


def boxes_of_range(region: Box, start: int, stop: int) -> list[Box]:
    """Elements [start, stop) of the row-major flattening of `region`, as boxes of the tensor that `region` is part of.

    The boxes are in order and each is contiguous in the flattening: laid end to end they are the range. There are at
    most 2n - 1 of them for an n-d region, three for a matrix, one for a vector.
    """
    if not 0 <= start <= stop <= region.volume:
        raise ValueError(f"[{start}, {stop}) is not a range of the {region.volume} elements of {region}")
    if start == stop:
        return []
    if stop - start == region.volume:
        return [region]
    row = math.prod(region.sizes[1:])
    first_full, last_full = -(-start // row), stop // row
    if first_full > last_full:  # strictly within one row
        return _boxes_of_row(region, last_full, start - last_full * row, stop - last_full * row)
    boxes = []
    if start < first_full * row:
        boxes += _boxes_of_row(region, first_full - 1, start - (first_full - 1) * row, row)
    if first_full < last_full:
        offsets = (region.offsets[0] + first_full, *region.offsets[1:])
        boxes.append(Box(offsets, (last_full - first_full, *region.sizes[1:])))
    if last_full * row < stop:
        boxes += _boxes_of_row(region, last_full, 0, stop - last_full * row)
    return boxes


def find_fault(region: Box, boxes: Sequence[Box]) -> Fault | None:
    """None when `boxes`, which lie in `region`, cover it exactly once; else the first hole or overlap.

    Cuts the region into slabs where a box begins or ends along the first dim and recurses into each slab with the
    remaining dims. The cost is the number of slabs each box spans, summed: linear for flat ranges and for shards.
    """
    if region.volume == 0:
        return None
    if not region.sizes:
        return None if len(boxes) == 1 else Fault(missing=not boxes, box=region)
    if len(boxes) == 1 and boxes[0] == region:
        return None
    waiting = sorted(boxes, key=lambda box: box.offsets[0], reverse=True)
    cuts = sorted({region.offsets[0], region.ends[0]}.union(*((box.offsets[0], box.ends[0]) for box in boxes)))
    rest = Box(region.offsets[1:], region.sizes[1:])
    active: list[Box] = []
    for begin, end in pairwise(cuts):
        active = [box for box in active if box.ends[0] > begin]
        while waiting and waiting[-1].offsets[0] == begin:
            active.append(waiting.pop())
        fault = find_fault(rest, [Box(box.offsets[1:], box.sizes[1:]) for box in active])
        if fault is not None:
            box = Box((begin, *fault.box.offsets), (end - begin, *fault.box.sizes))
            return Fault(missing=fault.missing, box=box)
    return None


def plan_copies(
    wanted: Sequence[Box], stored: Sequence[Box], *, tensor: str, error: type[MegacoderError] = CheckpointError
) -> list[Copy]:
    """The copies that fill every wanted box from the stored ones, each element once.

    Raises `error` naming `tensor` and the first region that no stored box holds, or that two hold.
    """
    copies = []
    shape = (len(stored), len(stored[0].offsets) if stored else 0)
    offsets = np.array([box.offsets for box in stored], dtype=np.int64).reshape(shape)
    ends = np.array([box.ends for box in stored], dtype=np.int64).reshape(shape)
    for target, box in enumerate(wanted):
        low = np.maximum(offsets, np.array(box.offsets, dtype=np.int64)) if stored else offsets
        high = np.minimum(ends, np.array(box.ends, dtype=np.int64)) if stored else ends
        overlaps = [
            Copy(int(source), target, Box(tuple(low[source].tolist()), tuple((high - low)[source].tolist())))
            for source in np.flatnonzero((low < high).all(axis=1))
        ]
        fault = find_fault(box, [copy.overlap for copy in overlaps])
        if fault is not None:
            raise error(f"{tensor}: {fault.box} {'is in no file' if fault.missing else 'is stored twice'}")
        copies += overlaps
    return copies


def _boxes_of_row(region: Box, row: int, start: int, stop: int) -> list[Box]:
    """Elements [start, stop) of one row of `region`, with that row's index put back in front."""
    inner = boxes_of_range(Box(region.offsets[1:], region.sizes[1:]), start, stop)
    index = region.offsets[0] + row
    return [Box((index, *box.offsets), (1, *box.sizes)) for box in inner]
