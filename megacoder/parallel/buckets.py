"""Buckets on their way: gradients reduced while backwards still run, weights gathered while the next forward does.

A stage tells what it does with its units (any modules: the embedding, a layer, the head) by two plain calls, and that
is all there is: no autograd hooks, which fire too often where weight gradients come in parts and not at all where a
schedule postpones them. `finished` is counted. When every parameter of a bucket has been finished by every microbatch
of the step, the bucket's reduce-scatter starts, whichever order the pipeline schedule chose and however many stages of
it share the model. `entering` waits until the unit's weights have arrived.

All ranks of the group run the same schedule over the same units, so their collectives start in the same order.
"""

from collections import Counter
from collections.abc import Iterator
from typing import Protocol

import torch.distributed as dist
from torch import nn

from megacoder.parallel.collectives import (
    Pending,
    group_rank,
    group_size,
    start_all_gather,
    start_reduce_scatter_sum,
)
from megacoder.parallel.flat import FlatParameters

__all__ = ["NO_EVENTS", "BucketTraffic", "UnitEvents"]


class UnitEvents(Protocol):
    """What a stage tells about the modules that it runs as units."""

    def entering(self, unit: nn.Module) -> None:
        """A forward is about to read the unit's weights; returns when they may be read."""

    def finished(self, unit: nn.Module) -> None:
        """All gradients of the unit from one microbatch have been added up; called once for each microbatch."""


class _NoEvents:
    def entering(self, unit: nn.Module) -> None:
        pass

    def finished(self, unit: nn.Module) -> None:
        pass


NO_EVENTS: UnitEvents = _NoEvents()
"""For one data-parallel rank, and wherever weights are there and gradients stay."""


class BucketTraffic:
    """The collectives of one rank's buckets over its data-parallel `group`; None is a group of one."""

    def __init__(self, flat: FlatParameters, group: dist.ProcessGroup | None) -> None:
        """ValueError unless the buckets are cut for as many ranks as the group has."""
        if flat.num_shards != group_size(group):
            raise ValueError(f"parameters cut for {flat.num_shards} data-parallel ranks; there are {group_size(group)}")
        self.flat, self.group = flat, group
        self.shards = [flat.shard(bucket, group_rank(group)) for bucket in flat.buckets]
        self._bucket_of = {id(slot.param): index for index, bucket in enumerate(flat.buckets) for slot in bucket.slots}
        self._buckets_of: dict[nn.Module, Counter[int]] = {}
        self._unfinished: list[int] | None = None
        self._heard = False
        self._reducing: dict[int, Pending] = {}
        self._arriving: dict[int, Pending] = {}

    def begin_step(self, num_microbatches: int) -> None:
        """Asks for overlap in the step that begins, in which each unit will be finished that many times.

        A step without this call, or whose stages report nothing, reduces all at its end, and ends with all weights
        there.
        """
        if self.group is not None:
            self._unfinished = [len(bucket.slots) * num_microbatches for bucket in self.flat.buckets]
            self._heard = False

    def entering(self, unit: nn.Module) -> None:
        """See `UnitEvents`."""
        if self._arriving:
            for index in self._buckets(unit):
                self._wait_for_weights(index)

    def finished(self, unit: nn.Module) -> None:
        """See `UnitEvents`; RuntimeError where a unit is finished more often than `begin_step` was told."""
        if self._unfinished is None:
            return
        self._heard = True
        for index, num_parameters in self._buckets(unit).items():
            self._unfinished[index] -= num_parameters
            if self._unfinished[index] < 0:
                raise RuntimeError(f"{type(unit).__name__}: more microbatches than begin_step was told")
            if self._unfinished[index] == 0 and not self.flat.buckets[index].late:
                self._start_reduce(index)

    def reduced(self) -> Iterator[int]:
        """Each bucket's number, once this rank's slice of its gradients is the sum; starts what has not started.

        A step may ask again: a sum is formed once, until `end_step`.
        """
        self._unfinished = None
        for index in range(len(self.flat.buckets)):
            if index not in self._reducing:
                self._start_reduce(index)
        for index, pending in self._reducing.items():
            pending.wait()
            yield index

    def gather_order(self) -> list[int]:
        """The buckets' numbers in the order in which a forward needs them."""
        return sorted(range(len(self.flat.buckets)), key=lambda index: self.flat.buckets[index].first_use)

    def start_gather(self, index: int) -> None:
        """Sends this rank's slice of a bucket's weights, and receives the others'."""
        if self.group is not None:
            bucket, weight = self.flat.buckets[index], self.flat.weight
            self._arriving[index] = start_all_gather(
                weight[bucket.start : bucket.stop], weight[self.shards[index]], self.group
            )

    def end_step(self) -> None:
        """Gradients start anew. Returns when the weights have arrived, unless the stages tell what they enter."""
        self._reducing.clear()
        if not self._heard:
            self.wait_all()
        self._heard = False

    def wait_all(self) -> None:
        """Returns when all weights have arrived; for readers that are no stages."""
        for index in list(self._arriving):
            self._wait_for_weights(index)

    def _buckets(self, unit: nn.Module) -> Counter[int]:
        """How many of the unit's parameters are in which bucket."""
        if unit not in self._buckets_of:
            self._buckets_of[unit] = Counter(self._bucket_of[id(param)] for param in unit.parameters())
        return self._buckets_of[unit]

    def _start_reduce(self, index: int) -> None:
        bucket, shard = self.flat.buckets[index], self.flat.grad[self.shards[index]]
        self._reducing[index] = (
            Pending(shard)
            if self.group is None
            else start_reduce_scatter_sum(shard, self.flat.grad[bucket.start : bucket.stop], self.group)
        )

    def _wait_for_weights(self, index: int) -> None:
        if index in self._arriving:
            self._arriving.pop(index).wait()
