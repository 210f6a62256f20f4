"""ZeRO stage 1 (arXiv:1910.02054): every data-parallel rank updates its slices of the flat weights and holds only those
slices' fp32 master weights and moments.

One update: reduce-scatter of the gradient sums, bucket by bucket; the global norm from the slices; AdamW on the slices,
which divides by the number of tokens of the global batch and clips in the same pass; all-gather of the new weights.
The loss is a sum over tokens until that one division, so gradients are right for any split of tokens over ranks and
microbatches. `Zero1AdamW.traffic` moves the buckets, overlapped with forwards and backwards where stages report.

On a CPU bf16 weights are the upper half of their fp32 master weights, so a rank stores only the lower half
(`megacoder.ops.split_master`).
"""

import itertools
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from megacoder.ops.adamw import (
    AdamWConfig,
    adamw_,
    adamw_with_scalars_,
    scalars_stay_on_device,
    sum_of_squares,
    update_scalars,
)
from megacoder.ops.split_master import join_master, split_master_
from megacoder.parallel.buckets import BucketTraffic
from megacoder.parallel.collectives import all_reduce_sum, group_rank
from megacoder.parallel.flat import Bucket, FlatParameters

__all__ = ["Zero1AdamW", "master_dtype"]


def master_dtype(weights: torch.dtype, num_shards: int, device_type: str) -> torch.dtype | None:
    """Of the master weights beside the weights: int16 where these are their upper half, None where all of them."""
    if weights == torch.float32 and num_shards == 1:  # the slices of several ranks are not contiguous
        return None
    return torch.int16 if weights == torch.bfloat16 and device_type == "cpu" else torch.float32


@dataclass(frozen=True, kw_only=True)
class _Part:
    """What this rank updates of one bucket."""

    flat: slice
    """in the flat buffers"""
    local: slice
    """in the rank's own state"""
    segments: list[tuple[slice, bool]]
    """parts of `flat` to be updated, and whether weight decay applies to them"""
    counted: list[slice]
    """parts of `flat` whose gradients this rank counts in the norm"""

    def in_state(self, segment: slice) -> slice:
        """Where a part of `flat` is in the rank's own state."""
        offset = self.local.start - self.flat.start
        return slice(segment.start + offset, segment.stop + offset)


class Zero1AdamW:
    """AdamW over flat parameters, its state sharded over a data-parallel group."""

    traffic: BucketTraffic
    """for overlap: stages report to it, and its `begin_step` is called"""

    def __init__(
        self,
        flat: FlatParameters,
        group: dist.ProcessGroup | None,
        config: AdamWConfig,
        *,
        norm_group: dist.ProcessGroup | None = None,
        counted_elsewhere: Iterable[slice] = (),
    ) -> None:
        """`group` is the data-parallel one, None for one rank; `flat` must be cut for its size.

        Where several ranks share one replica of the model, the norm is over all ranks of all replicas, `norm_group`:
        one sum, so that it has the same bits everywhere and all ranks make the same decision. It excludes
        `counted_elsewhere`, parts of the flat buffers that are copies of what another rank of the replica counts.
        """
        self.flat, self.config = flat, config
        self.norm_group = group if norm_group is None else norm_group
        self.traffic = BucketTraffic(flat, group)
        self.num_updates = 0
        self._master_dtype = master_dtype(flat.weight.dtype, flat.num_shards, flat.weight.device.type)
        self._is_split = self._master_dtype == torch.int16
        self._parts = list(self._cut(sorted(counted_elsewhere, key=lambda part: part.start)))
        self._master = self._first_master()
        self.exp_avg = torch.zeros_like(self._master, dtype=torch.float32)
        self.exp_avg_sq = torch.zeros_like(self.exp_avg)
        self.owned = list(flat.owned(group_rank(group)))

    def step(
        self, *, lr: float, num_tokens: int, max_grad_norm: float, skip_above: float = sys.float_info.max
    ) -> float:
        """Updates the weights from the gradient sums of `num_tokens` tokens (of all ranks) and zeroes the gradients.

        Returns the norm of the mean gradient before clipping, inf where it is not finite. If it is not finite or above
        `skip_above`, the update is skipped on every rank: weights, state and `num_updates` stay unchanged. After a step
        with overlap weights are still in flight: readers other than stages must call `traffic.wait_all` first.
        """
        squares = self._squares()
        update = self._update_on_device if scalars_stay_on_device(self.flat.weight) else self._update_on_host
        norm = update(squares, lr=lr, num_tokens=num_tokens, max_grad_norm=max_grad_norm, skip_above=skip_above)
        self.traffic.end_step()
        return norm

    def state(self) -> dict[str, Tensor]:
        """This rank's slices by kind, fp32: what a checkpoint stores.

        The moments are live; so are master weights that are not split. After writing into them call `publish_master`.
        """
        return {"weight": self._whole_master(), "exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}

    def held(self) -> list[Tensor]:
        """The memory that this rank's state takes beside weights and gradients."""
        return [*([] if self._master_dtype is None else [self._master]), self.exp_avg, self.exp_avg_sq]

    def gradients(self) -> Tensor:
        """This rank's slices of the gradient sums over all ranks, copied, laid out as `state()`; `step` may follow."""
        for _ in self.traffic.reduced():
            pass
        return torch.cat([self.flat.grad[part.flat] for part in self._parts])

    def squares_by_parameter(self) -> dict[str, float]:
        """Sums of squares of this rank's slices of the gradient sums over all ranks, without `counted_elsewhere`.

        `step` or `drop_gradients` may follow.
        """
        for _ in self.traffic.reduced():
            pass
        sums: dict[str, list[Tensor]] = {}
        for bucket, part in zip(self.flat.buckets, self._parts, strict=True):
            for slot, counted in itertools.product(bucket.slots, part.counted):
                start, stop = max(slot.start, counted.start), min(slot.stop, counted.stop)
                if start < stop:
                    sums.setdefault(slot.name, []).append(sum_of_squares(self.flat.grad[start:stop]))
        return {name: torch.stack(parts).sum().item() for name, parts in sums.items()}

    def drop_gradients(self) -> None:
        """Ends a step without an update."""
        self.flat.grad.zero_()
        self.traffic.end_step()

    def publish_master(self, master: Tensor) -> None:
        """Takes over `master`, `state()["weight"]` with a checkpoint read into it, and updates every rank's model."""
        self.traffic.wait_all()
        for index, part in enumerate(self._parts):
            weight, ours = self.flat.weight[part.flat], self._master[part.local]
            if self._is_split:
                split_master_(master[part.local], weight, ours)
            else:
                ours.copy_(master[part.local])
                weight.copy_(ours)
            self.traffic.start_gather(index)
        self.traffic.wait_all()

    def _first_master(self) -> Tensor:
        """The initial `_master`, when the weights are as they were drawn."""
        if self._master_dtype is None:
            return self.flat.weight
        master = self.flat.weight.new_zeros(self._parts[-1].local.stop, dtype=self._master_dtype)
        if not self._is_split:
            for part in self._parts:
                master[part.local] = self.flat.weight[part.flat]
        return master

    def _whole_master(self) -> Tensor:
        """This rank's slices of the fp32 master weights; a copy where they are split."""
        if not self._is_split:
            return self._master
        self.traffic.wait_all()
        master = torch.empty_like(self.exp_avg)
        for part in self._parts:
            master[part.local] = join_master(self.flat.weight[part.flat], self._master[part.local])
        return master

    def _squares(self) -> Tensor:
        """Completes the gradient sums; returns the whole model's sum of squares, fp64, the same on all ranks."""
        grad = self.flat.grad
        squares = grad.new_zeros(len(self._parts), dtype=torch.float64)  # by bucket: always added in the same order
        for index in self.traffic.reduced():
            for counted in self._parts[index].counted:
                squares[index] += sum_of_squares(grad[counted])
        total = squares.sum()
        all_reduce_sum(total, self.norm_group)
        return total

    def _update_on_host(
        self, squares: Tensor, *, lr: float, num_tokens: int, max_grad_norm: float, skip_above: float
    ) -> float:
        finite = squares.item()
        norm = math.sqrt(finite) / num_tokens if math.isfinite(finite) else math.inf
        if math.isfinite(norm) and norm <= skip_above:
            self.num_updates += 1
            scale = min(1.0, max_grad_norm / (norm + 1e-6)) / num_tokens
            self._update_parts(partial(adamw_, config=self.config, lr=lr, step=self.num_updates, grad_scale=scale))
        self.flat.grad.zero_()
        return norm

    def _update_on_device(
        self, squares: Tensor, *, lr: float, num_tokens: int, max_grad_norm: float, skip_above: float
    ) -> float:
        """The same; the host learns the norm when everything has been launched."""
        scalars, norm = update_scalars(
            squares, config=self.config, lr=lr, num_updates=self.num_updates, num_tokens=num_tokens,
            max_grad_norm=max_grad_norm, skip_above=skip_above,
        )  # fmt: skip
        self._update_parts(partial(adamw_with_scalars_, config=self.config, scalars=scalars))
        self.flat.grad.zero_()
        found = norm.item()
        self.num_updates += math.isfinite(found) and found <= skip_above
        return found

    def _update_parts(self, update: Callable[..., None]) -> None:
        """Calls `update` for every segment, and starts the all-gather of each bucket's new weights."""
        self.traffic.wait_all()
        for index in self.traffic.gather_order():
            part = self._parts[index]
            for segment, decayed in part.segments:
                local = part.in_state(segment)
                update(
                    self.flat.weight[segment], self._master[local], self.exp_avg[local], self.exp_avg_sq[local],
                    self.flat.grad[segment], decayed=decayed,
                )  # fmt: skip
            self.traffic.start_gather(index)

    def _cut(self, elsewhere: list[slice]) -> Iterator[_Part]:
        start = 0
        for bucket, shard in zip(self.flat.buckets, self.traffic.shards, strict=True):
            stop = start + shard.stop - shard.start
            yield _Part(
                flat=shard, local=slice(start, stop),
                segments=list(_segments(bucket, shard)), counted=list(_between(elsewhere, shard)),
            )  # fmt: skip
            start = stop


def _between(elsewhere: list[slice], shard: slice) -> Iterator[slice]:
    """What `shard` has outside the ascending slices `elsewhere`."""
    begin = shard.start
    for part in elsewhere:
        start, stop = (min(max(edge, shard.start), shard.stop) for edge in (part.start, part.stop))
        if begin < start:
            yield slice(begin, start)
        begin = max(begin, stop)
    if begin < shard.stop:
        yield slice(begin, shard.stop)


def _segments(bucket: Bucket, shard: slice) -> Iterator[tuple[slice, bool]]:
    """(part, decayed) of `shard`; neighbours with the same decay are one segment, padding included."""
    begin, decayed = shard.start, None
    for slot in bucket.slots:
        if slot.start >= shard.stop or slot.stop <= shard.start:
            continue
        wants = slot.param.dim() > 1  # norm weights and biases are not decayed
        if decayed is not None and wants != decayed:
            yield slice(begin, slot.start), decayed
            begin = slot.start
        decayed = wants
    if decayed is not None:
        yield slice(begin, shard.stop), decayed
