"""Overlap of bucket traffic: gradients are reduced while backwards run, weights gathered during the next forward.

A stage reports what it does with its units (any modules: the embedding, a layer, the head) by two plain calls. There
are no autograd hooks, which fire too often where weight gradients come in parts and not at all where a schedule
postpones them. Calls of `finished` are counted. When every parameter of a bucket has been finished by every microbatch
of the step, the bucket's reduce-scatter starts, whatever the order of the pipeline schedule and however many of its
stages share the model. `entering` waits until the unit's weights have arrived.

All ranks of the group run the same schedule over the same units, so their collectives start in the same order.
"""

from collections import Counter
from collections.abc import Iterator
from typing import Protocol

import torch.distributed as dist
from torch import nn

from megacoder.parallel.collectives import Pending, group_rank, group_size, start_all_gather, start_reduce_scatter_sum
from megacoder.parallel.flat import FlatParameters

__all__ = ["NO_EVENTS", "BucketTraffic", "UnitEvents"]


class UnitEvents(Protocol):
    """What a stage reports about the modules that it runs as units."""

    def entering(self, unit: nn.Module) -> None:
        """Called before a forward reads the unit's weights; returns when they may be read."""

    def finished(self, unit: nn.Module) -> None:
        """Called once for each microbatch, when all gradients of the unit have been accumulated."""


class _NoEvents:
    def entering(self, unit: nn.Module) -> None:
        pass

    def finished(self, unit: nn.Module) -> None:
        pass


NO_EVENTS: UnitEvents = _NoEvents()
"""For a single data-parallel rank, and wherever weights are never gathered and gradients never reduced."""


class BucketTraffic:
    """The collectives of one rank's buckets over its data-parallel `group`; None is a group of one."""

    def __init__(self, flat: FlatParameters, group: dist.ProcessGroup | None) -> None:
        """ValueError unless the buckets are cut for as many ranks as the group has."""
        if flat.num_shards != group_size(group):
            raise ValueError(
                f"parameters are cut for {flat.num_shards} data-parallel ranks; there are {group_size(group)}"
            )
        self.flat, self.group = flat, group
        self.shards = [flat.shard(bucket, group_rank(group)) for bucket in flat.buckets]
        self._bucket_of = {id(slot.param): index for index, bucket in enumerate(flat.buckets) for slot in bucket.slots}
        self._buckets_of: dict[nn.Module, Counter[int]] = {}
        self._unfinished: list[int] | None = None
        self._heard = False
        self._reducing: dict[int, Pending] = {}
        self._arriving: dict[int, Pending] = {}

    def begin_step(self, num_microbatches: int) -> None:
        """Enables overlap in the step that begins, in which each unit will be finished `num_microbatches` times.

        A step without this call, or whose stages report nothing, reduces everything at its end, and ends only when all
        weights have arrived.
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
        """See `UnitEvents`; RuntimeError where a unit is finished more often than `begin_step` announced."""
        if self._unfinished is None:
            return
        self._heard = True
        for index, num_parameters in self._buckets(unit).items():
            self._unfinished[index] -= num_parameters
            if self._unfinished[index] < 0:
                raise RuntimeError(f"{type(unit).__name__}: finished by more microbatches than begin_step announced")
            if self._unfinished[index] == 0 and not self.flat.buckets[index].late:
                self._start_reduce(index)

    def reduced(self) -> Iterator[int]:
        """Each bucket's number, once this rank's slice of its gradients is the sum; starts the sums not yet started.

        May be called again in a step: each sum is computed once, until `end_step`.
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
        """Starts to send this rank's slice of a bucket's weights and to receive the other ranks'."""
        if self.group is not None:
            bucket, weight = self.flat.buckets[index], self.flat.weight
            self._arriving[index] = start_all_gather(
                weight[bucket.start : bucket.stop], weight[self.shards[index]], self.group
            )

    def end_step(self) -> None:
        """Ends the step's reductions. Waits for the weights to arrive, unless the stages report what they enter."""
        self._reducing.clear()
        if not self._heard:
            self.wait_all()
        self._heard = False

    def wait_all(self) -> None:
        """Returns when all weights have arrived; for readers other than stages."""
        for index in list(self._arriving):
            self._wait_for_weights(index)

    def _buckets(self, unit: nn.Module) -> Counter[int]:
        """How many of the unit's parameters are in each bucket."""
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
