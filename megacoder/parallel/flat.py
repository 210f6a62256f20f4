"""All weights of a rank in one flat buffer, all gradients in another, every parameter a view of both.

The gradient buffer is fp32 whatever the weights' dtype: microbatches accumulate without rounding, and the buffer is
reduced over data-parallel ranks with no copying. Autograd adds into the same views (`param.grad_dtype`), so the plain
model and the hand-scheduled step share them.

Layout: the buffers are cut into buckets, runs of whole parameters in the order given. A bucket is the unit of
communication: its gradients are reduced together once they are complete, its weights gathered once they are updated
(see `megacoder.parallel.buckets`). Parameters whose gradients are complete only after a sum over other ranks come last,
in separate `late` buckets, so that they delay no others. A parameter starts at a multiple of ALIGNMENT elements; a
bucket's end is padded to a multiple of the number of data-parallel ranks, each of which owns one equal slice of every
bucket. Padding stays zero.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

__all__ = ["BUCKET_ELEMENTS", "Bucket", "FlatParameters", "FlatSlot", "OwnedRange", "cut_buckets"]

ALIGNMENT = 64
"""Elements; 128 bytes in bf16, so that every view starts on a cache line and a vector load."""

BUCKET_ELEMENTS = 40_000_000
"""Elements at which a bucket is closed; 160 MB of gradients, since many ranks need long messages for full bandwidth."""


@dataclass(frozen=True)
class FlatSlot:
    """Where a parameter lives in the flat buffers: elements [start, start + numel)."""

    name: str
    param: nn.Parameter
    start: int

    @property
    def stop(self) -> int:
        """One past the parameter's last element."""
        return self.start + self.param.numel()


@dataclass(frozen=True, kw_only=True)
class Bucket:
    """Elements [start, stop) of the flat buffers, which are communicated together."""

    slots: tuple[FlatSlot, ...]
    start: int
    stop: int
    late: bool
    """whether its gradients are complete only after sums over other ranks, at the end of the step"""
    first_use: int
    """index of its earliest parameter in the order given"""


@dataclass(frozen=True)
class OwnedRange:
    """The part of one parameter that a data-parallel rank updates, in elements of the flattened parameter."""

    slot: FlatSlot
    start: int
    """first element of the flattened parameter"""
    stop: int
    offset: int
    """where that element is in the rank's slices of all buckets, end to end"""


class FlatParameters:
    """Moves `parameters` into flat buffers; afterwards `weight` and `grad` are the memory behind every view."""

    weight: Tensor
    """all weights, `dtype`"""
    grad: Tensor
    """all gradients, fp32"""

    def __init__(
        self,
        parameters: Iterable[tuple[str, nn.Parameter]],
        *,
        dtype: torch.dtype,
        device: torch.device,
        num_shards: int = 1,
        late: Iterable[nn.Parameter] = (),
        bucket_elements: int = BUCKET_ELEMENTS,
    ) -> None:
        """`parameters` in the order in which a forward reads them; `late` are some of them (see `Bucket.late`)."""
        self.num_shards = num_shards
        self.numel = 0
        self.buckets: list[Bucket] = []
        numbered = list(enumerate(parameters))
        late_ids = {id(param) for param in late}
        for is_late in (False, True):
            chosen = [entry for entry in numbered if (id(entry[1][1]) in late_ids) == is_late]
            self._cut(chosen, late=is_late, bucket_elements=bucket_elements)
        self.slots = [slot for bucket in self.buckets for slot in bucket.slots]
        self.weight = torch.zeros(self.numel, dtype=dtype, device=device)
        self.grad = torch.zeros(self.numel, dtype=torch.float32, device=device)
        for slot in self.slots:
            param, shape = slot.param, slot.param.shape
            view = self.weight[slot.start : slot.stop].view(shape)
            view.copy_(param.detach())
            param.data = view
            param.grad_dtype = torch.float32
            param.grad = self.grad[slot.start : slot.stop].view(shape)

    def shard(self, bucket: Bucket, index: int) -> slice:
        """The elements of `bucket` that data-parallel rank `index` updates."""
        size = (bucket.stop - bucket.start) // self.num_shards
        return slice(bucket.start + index * size, bucket.start + (index + 1) * size)

    def owned(self, index: int) -> Iterator[OwnedRange]:
        """What data-parallel rank `index` updates, in the order of the buffers."""
        offset = 0
        for bucket in self.buckets:
            shard = self.shard(bucket, index)
            for slot in bucket.slots:
                start, stop = max(slot.start, shard.start), min(slot.stop, shard.stop)
                if start < stop:
                    yield OwnedRange(slot, start - slot.start, stop - slot.start, offset + start - shard.start)
            offset += shard.stop - shard.start

    def _cut(self, numbered: list[tuple[int, tuple[str, nn.Parameter]]], *, late: bool, bucket_elements: int) -> None:
        """Appends buckets for these parameters, each with its index in the order given."""
        sizes = [param.numel() for _, (_, param) in numbered]
        remaining = iter(numbered)
        for starts, elements in cut_buckets(sizes, num_shards=self.num_shards, bucket_elements=bucket_elements):
            members = [(start, *next(remaining)) for start in starts]
            slots = [FlatSlot(name, param, self.numel + start) for start, _, (name, param) in members]
            stop = self.numel + elements
            self.buckets.append(
                Bucket(slots=tuple(slots), start=self.numel, stop=stop, late=late, first_use=members[0][1])
            )
            self.numel = stop


def cut_buckets(
    sizes: Sequence[int], *, num_shards: int, bucket_elements: int = BUCKET_ELEMENTS
) -> Iterator[tuple[list[int], int]]:
    """The buckets of parameters of so many elements: (where each of its parameters starts in it, its elements)."""
    starts, end = list[int](), 0
    for index, size in enumerate(sizes):
        starts.append(end)
        end += _round_up(size, ALIGNMENT)
        if end >= bucket_elements or index == len(sizes) - 1:
            yield starts, _round_up(end, ALIGNMENT * num_shards)
            starts, end = [], 0


def _round_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple
