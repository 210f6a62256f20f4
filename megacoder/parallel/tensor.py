"""Tensor parallelism's two collectives, and their autograd form, in which each is the other's backward.

Inside a layer every rank of the tensor axis holds its own columns or heads of all tokens; between layers is the
residual stream. `gather` leads from the stream into a layer, `reduce` back:

                               gather                      reduce
    without sequence parallel  identity (Megatron's f)     all-reduce (Megatron's g)            arXiv:1909.08053, 3
    with sequence parallel     all-gather of tokens        reduce-scatter to each its tokens    arXiv:2205.05198, 4.2.2

The pair is conjugate: the backward of `gather` is `reduce`, and vice versa. Without sequence parallelism the stream is
the same on all ranks; with it each rank holds T / size of the T tokens (all sequences end to end, cut anywhere), and
runs the norms on these alone. The traffic is the same, and that part of activation memory is divided by size.

With one rank both are the identity and copy nothing.
Legend: T tokens, N = T / size of them under sequence parallelism and else T, D model dim.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megacoder.core.errors import ConfigError
from megacoder.parallel.collectives import Pending, start_all_gather, start_all_reduce_sum, start_reduce_scatter_sum

__all__ = ["ALONE", "TensorParallel", "gather", "reduce", "start_gather", "start_reduce"]


@dataclass(frozen=True, kw_only=True)
class TensorParallel:
    """A rank's place on the tensor axis."""

    rank: int = 0
    """index in the group"""
    size: int = 1
    """ranks that share every layer"""
    group: dist.ProcessGroup | None = None
    """None for one rank, and where only the layout of weights is needed"""
    sequence_parallel: bool = False
    """whether the ranks share the tokens of the residual stream too; nothing changes with one rank"""

    @property
    def shares_tokens(self) -> bool:
        """Whether a rank holds only its part of the residual stream's tokens."""
        return self.sequence_parallel and self.size > 1

    def check_tokens(self, batch: int, length: int) -> None:
        """ConfigError where sequence parallelism cannot share batch * length tokens evenly."""
        if self.sequence_parallel and batch * length % self.size:
            down = length // self.size * self.size
            nearest = f"{down} or {down + self.size}" if down else f"{self.size}"
            raise ConfigError(
                f"sequence parallelism over tp = {self.size}: {batch} x {length} tokens of a microbatch are not "
                f"divisible by {self.size}; nearest sequence lengths that work: {nearest}"
            )


ALONE = TensorParallel()
"""No tensor parallelism."""


def start_gather(stream_ND: Tensor, tp: TensorParallel) -> Pending:
    """Pending (T, D): all tokens of the residual stream."""
    if tp.group is None or not tp.sequence_parallel:
        return Pending(stream_ND)
    full_TD = stream_ND.new_empty(tp.size * stream_ND.shape[0], *stream_ND.shape[1:])
    return start_all_gather(full_TD, stream_ND.contiguous(), tp.group)


def start_reduce(partial_TD: Tensor, tp: TensorParallel) -> Pending:
    """Pending (N, D): the sum of the ranks' partial sums, which must be contiguous; overwrites `partial_TD`."""
    if tp.group is None or not tp.sequence_parallel:
        return start_all_reduce_sum(partial_TD, tp.group)
    shard_ND = partial_TD.new_empty(partial_TD.shape[0] // tp.size, *partial_TD.shape[1:])
    return start_reduce_scatter_sum(shard_ND, partial_TD, tp.group)


def gather(stream: Tensor, tp: TensorParallel) -> Tensor:
    """Differentiable `start_gather`, with the wait; its backward is `reduce`. Opens a column-parallel linear."""
    return stream if tp.group is None else _Gather.apply(stream, tp)


def reduce(partial: Tensor, tp: TensorParallel) -> Tensor:
    """Differentiable `start_reduce`, with the wait; its backward is `gather`. Closes a row-parallel linear.

    Under sequence parallelism all dims but the last are tokens: (B, S, D) comes back as (N, D).
    """
    if tp.group is None:
        return partial
    return _Reduce.apply(partial.flatten(0, -2) if tp.sequence_parallel else partial, tp)


class _Gather(torch.autograd.Function):
    """f, or the all-gather of tokens; backward: all-reduce, or reduce-scatter."""

    @staticmethod
    def forward(ctx: Any, stream: Tensor, tp: TensorParallel) -> Tensor:
        ctx.tp = tp
        return start_gather(stream, tp).wait()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _summed(grad, ctx.tp), None


class _Reduce(torch.autograd.Function):
    """g, or the reduce-scatter of tokens; backward: identity, or all-gather."""

    @staticmethod
    def forward(ctx: Any, partial: Tensor, tp: TensorParallel) -> Tensor:
        ctx.tp = tp
        return _summed(partial, tp)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return start_gather(grad, ctx.tp).wait(), None


def _summed(partial: Tensor, tp: TensorParallel) -> Tensor:
    """The sum, in new memory: autograd may pass the same tensor to others."""
    return start_reduce(partial.clone(memory_format=torch.contiguous_format), tp).wait()
