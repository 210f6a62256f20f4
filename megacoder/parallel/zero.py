"""ZeRO stage 1 (arXiv:1910.02054): every data-parallel rank updates its slice of the flat weights and holds only that
slice's fp32 master weights and moments.

One update: reduce-scatter the gradient sums; the global norm from the slices; AdamW on the slice, which divides by the
number of tokens of the global batch and clips in the same pass; all-gather of the new weights. The loss is a sum over
tokens until that one division, so gradients are right for any split of tokens over ranks and microbatches.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megacoder.ops.adamw import AdamWConfig, adamw_, sum_of_squares
from megacoder.parallel.collectives import World, all_gather_into, all_reduce_sum, reduce_scatter_sum
from megacoder.parallel.flat import FlatParameters, FlatSlot

__all__ = ["OwnedRange", "Zero1AdamW"]


@dataclass(frozen=True)
class OwnedRange:
    """The part of one parameter that this rank updates, in elements of the flattened parameter."""

    slot: FlatSlot
    start: int
    """first element of the flattened parameter"""
    stop: int
    offset: int
    """where that element lies in the rank's slice"""


class Zero1AdamW:
    """AdamW over flat parameters, its state sharded over `world`."""

    def __init__(
        self,
        flat: FlatParameters,
        world: World,
        config: AdamWConfig,
        *,
        tensor_group: dist.ProcessGroup | None = None,
        counted_elsewhere: Iterable[slice] = (),
    ) -> None:
        """Where tensor-parallel ranks share the model, the norm is over `tensor_group` too.

        It then leaves out `counted_elsewhere`, ascending parts of the flat buffers that are copies of what another
        rank of that group counts.
        """
        self.flat, self.world, self.config = flat, world, config
        self.tensor_group = tensor_group
        self.num_updates = 0
        self._slice = flat.shard(world.rank)
        weight = flat.weight[self._slice]
        # In fp32 the weights are their own master copy.
        self.master = weight if weight.dtype == torch.float32 else weight.float()
        self.exp_avg = torch.zeros_like(self.master)
        self.exp_avg_sq = torch.zeros_like(self.master)
        self.owned = list(self._owned_ranges())
        self._counted = list(self._counted_ranges(counted_elsewhere))

    def step(self, *, lr: float, num_tokens: int, max_grad_norm: float) -> float:
        """Updates the weights from the gradient sums of `num_tokens` tokens (of all ranks) and zeroes the gradients.

        Returns the norm of the mean gradient before clipping. A non-finite norm changes no weight and no state.
        """
        grad = self.flat.grad[self._slice]
        reduce_scatter_sum(grad, self.flat.grad, self.world.group)
        squares = torch.zeros((), dtype=torch.float64, device=grad.device)
        for part in self._counted:
            squares += sum_of_squares(grad[part])
        all_reduce_sum(squares, self.world.group)
        all_reduce_sum(squares, self.tensor_group)
        norm = math.sqrt(squares.item()) / num_tokens if math.isfinite(squares.item()) else math.inf
        if math.isfinite(norm):
            self.num_updates += 1
            clip = min(1.0, max_grad_norm / (norm + 1e-6))
            weight = self.flat.weight[self._slice]
            for start, stop, decayed in self._segments():
                part = slice(start, stop)
                adamw_(
                    weight[part], self.master[part], self.exp_avg[part], self.exp_avg_sq[part], grad[part],
                    config=self.config, lr=lr, step=self.num_updates, grad_scale=clip / num_tokens, decayed=decayed,
                )  # fmt: skip
            all_gather_into(self.flat.weight, weight, self.world.group)
        self.flat.grad.zero_()
        return norm

    def state(self) -> dict[str, Tensor]:
        """This rank's slices by kind: what a checkpoint stores, as live tensors."""
        return {"weight": self.master, "exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}

    def publish_master(self) -> None:
        """Writes the master weights into the model on every rank; after a checkpoint was read into `state()`."""
        shard = self.flat.weight[self._slice]
        if shard.data_ptr() != self.master.data_ptr():
            shard.copy_(self.master)
        all_gather_into(self.flat.weight, shard, self.world.group)

    def _owned_ranges(self) -> Iterator[OwnedRange]:
        for slot in self.flat.slots:
            start, stop = max(slot.start, self._slice.start), min(slot.stop, self._slice.stop)
            if start < stop:
                yield OwnedRange(slot, start - slot.start, stop - slot.start, start - self._slice.start)

    def _counted_ranges(self, elsewhere: Iterable[slice]) -> Iterator[slice]:
        """The parts of this rank's slice, in its own elements, that lie between those counted elsewhere."""
        begin, size = 0, len(self.master)
        for part in elsewhere:
            start, stop = (min(max(edge - self._slice.start, 0), size) for edge in (part.start, part.stop))
            if begin < start:
                yield slice(begin, start)
            begin = max(begin, stop)
        if begin < size:
            yield slice(begin, size)

    def _segments(self) -> Iterator[tuple[int, int, bool]]:
        """(start, stop, decayed) in the slice; neighbours with the same decay are one segment, padding included."""
        begin, decayed = 0, None
        for owned in self.owned:
            wants = owned.slot.param.dim() > 1  # norm weights are not decayed
            if decayed is not None and wants != decayed:
                yield begin, owned.offset, decayed
                begin = owned.offset
            decayed = wants
        if decayed is not None:
            yield begin, len(self.master), decayed
