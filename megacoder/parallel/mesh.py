"""This rank's place in a layout and its process groups; made once and passed to whoever needs it, no global state."""

import torch.distributed as dist

from megacoder.parallel.context import ContextParallel
from megacoder.parallel.dims import AXES, Axis, ParallelDims
from megacoder.parallel.tensor import TensorParallel
from megacoder.parallel.world import World, new_group

__all__ = ["Mesh"]

GROUPS: tuple[tuple[Axis, ...], ...] = (("tp",), ("cp",), ("pp",), ("dp", "cp"))
"""Axes along which ranks communicate: layers; attention; stages; gradients (parts of a sequence add up as microbatches
do)."""


class Mesh:
    """One rank's place and groups; all ranks make it with the same `dims`. A group of one rank is None."""

    def __init__(self, world: World, dims: ParallelDims, *, sequence_parallel: bool) -> None:
        """ConfigError unless the layout needs exactly `world.size` ranks."""
        dims.check_world_size(world.size)
        self.world, self.dims = world, dims
        self.place = dims.coordinates(world.rank)
        self._groups = {axes: new_group(dims.groups(*axes), world, name="-".join(axes)) for axes in GROUPS}
        self.tp = TensorParallel(
            rank=self.place.tp, size=dims.tp, group=self.group("tp"), sequence_parallel=sequence_parallel
        )
        self.cp = ContextParallel(rank=self.place.cp, size=dims.cp, group=self.group("cp"))

    def group(self, *axes: Axis) -> dist.ProcessGroup | None:
        """The ranks that differ from this one along `axes` only, one of GROUPS."""
        return self._groups[tuple(axis for axis in AXES if axis in axes)]

    @property
    def speaks_for_replica(self) -> bool:
        """Whether this is the first of the ranks that read the same data."""
        return (self.place.tp, self.place.cp, self.place.pp) == (0, 0, 0)
