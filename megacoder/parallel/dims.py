"""Each rank's coordinates: pure arithmetic for data x pipeline x context x tensor parallelism.

    rank = ((dp_rank * pp + pp_rank) * cp + cp_rank) * tp + tp_rank

The axes are ordered by how much their traffic hurts, the worst innermost, where ranks share a node and its NVLink:

- tp: several collectives per layer and microbatch, each on the critical path before the next matrix product.
- cp: one exchange of K and V per layer and microbatch, before attention.
- pp: one activation and one gradient per stage and microbatch, point to point; late ones leave a stage idle.
- dp: one reduce-scatter and one all-gather per step, in large buckets, hidden behind a backward and a forward.

With dp outermost a replica is one block of consecutive ranks: a node that dies costs one replica, and a run with more
replicas keeps the coordinates of every old rank. Nothing here imports torch or knows about processes; the mesh builds
its groups from these lists.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from typing import Literal, NamedTuple

from megacoder.core.config import check_at_least
from megacoder.core.errors import ConfigError

__all__ = ["AXES", "Axis", "Coordinates", "ParallelDims"]

Axis = Literal["dp", "pp", "cp", "tp"]
AXES: tuple[Axis, ...] = ("dp", "pp", "cp", "tp")
"""Outermost first."""


class Coordinates(NamedTuple):
    """A rank's index along each axis."""

    dp: int
    pp: int
    cp: int
    tp: int


@dataclass(frozen=True, kw_only=True)
class ParallelDims:
    """The size of each axis; their product is the number of ranks."""

    tp: int = 1
    """tensor parallel (and sequence parallel) ranks"""
    cp: int = 1
    """context parallel ranks: parts of a sequence"""
    pp: int = 1
    """pipeline parallel ranks: consecutive layers"""
    dp: int = 1
    """replicas, among which ZeRO-1 shards the optimizer"""

    def __post_init__(self) -> None:
        check_at_least(self, 1, *AXES)

    @property
    def world_size(self) -> int:
        return self.tp * self.cp * self.pp * self.dp

    def size(self, axis: Axis) -> int:
        """Ranks along `axis`."""
        return getattr(self, axis)

    def stride(self, axis: Axis) -> int:
        """Distance in ranks between neighbors along `axis`."""
        return math.prod(self.size(inner) for inner in AXES[AXES.index(axis) + 1 :])

    def coordinates(self, rank: int) -> Coordinates:
        """The coordinates of `rank`."""
        if not 0 <= rank < self.world_size:
            raise ConfigError(f"rank {rank}: {self} has ranks 0 to {self.world_size - 1}")
        return Coordinates(*(rank // self.stride(axis) % self.size(axis) for axis in AXES))

    def rank(self, *, dp: int = 0, pp: int = 0, cp: int = 0, tp: int = 0) -> int:
        """The rank at these coordinates."""
        place = Coordinates(dp=dp, pp=pp, cp=cp, tp=tp)
        for axis, index in zip(AXES, place, strict=True):
            if not 0 <= index < self.size(axis):
                raise ConfigError(f"{axis} rank {index}: {axis} = {self.size(axis)} has 0 to {self.size(axis) - 1}")
        return sum(index * self.stride(axis) for axis, index in zip(AXES, place, strict=True))

    def group(self, rank: int, *axes: Axis) -> list[int]:
        """The ranks that differ from `rank` along `axes` only, itself included, in ascending order.

        With several axes this is the group over their product, e.g. ("dp", "cp") for gradients.
        """
        place = self.coordinates(rank)
        origin = rank - sum(getattr(place, axis) * self.stride(axis) for axis in set(axes))
        members = [origin]
        for axis in AXES:  # outermost first keeps the list in ascending order
            if axis in axes:
                steps = range(0, self.size(axis) * self.stride(axis), self.stride(axis))
                members = [member + step for member in members for step in steps]
        return members

    def groups(self, *axes: Axis) -> list[list[int]]:
        """All groups along `axes`, in the order of their first ranks: every rank is in exactly one."""
        others = [axis for axis in AXES if axis not in axes]
        return [self.group(origin, *axes) for origin in self.group(0, *others)]

    def check_world_size(self, world_size: int) -> None:
        """ConfigError with the nearest layouts that work, unless the layout needs exactly `world_size` ranks."""
        if self.world_size != world_size:
            nearest = "; ".join(map(str, self.nearest(world_size)))
            raise ConfigError(f"{self} needs {self.world_size} ranks, there are {world_size}; nearest: {nearest}")

    def nearest(
        self, world_size: int, *, count: int = 3, works: "Callable[[ParallelDims], bool]" = lambda _: True
    ) -> "list[ParallelDims]":
        """Up to `count` layouts of `world_size` ranks, among those that satisfy `works`, that change the axes least.

        dp is the cheapest axis to change, as each rank's share of the model stays the same; tp is the most expensive,
        as head counts and hidden sizes must be divisible by it.
        """
        if world_size < 1:
            raise ConfigError(f"{world_size} ranks: must be at least 1")
        weight = {"dp": 1.0, "pp": 4.0, "cp": 4.0, "tp": 8.0}

        def distance(other: ParallelDims) -> float:
            return sum(weight[axis] * abs(math.log(other.size(axis) / self.size(axis))) for axis in AXES)

        layouts = (
            ParallelDims(tp=tp, cp=cp, pp=pp, dp=world_size // (tp * cp * pp))
            for tp in _divisors(world_size)
            for cp in _divisors(world_size // tp)
            for pp in _divisors(world_size // (tp * cp))
        )
        ordered = sorted(layouts, key=lambda other: (distance(other), other.tp, other.cp, other.pp))
        return list(islice(filter(works, ordered), count))

    def __str__(self) -> str:
        """The layout as written on a command line, without the axes of size 1: `tp=2,pp=4`."""
        return (
            ",".join(f"{axis}={self.size(axis)}" for axis in ("tp", "cp", "pp", "dp") if self.size(axis) > 1) or "dp=1"
        )


def _divisors(number: int) -> list[int]:
    small = [candidate for candidate in range(1, math.isqrt(number) + 1) if number % candidate == 0]
    return sorted({*small, *(number // candidate for candidate in small)})
