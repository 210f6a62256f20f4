"""Linear layers and the embedding, each rank of the tensor axis holding its share of every weight.

For each weight a `Shard` declares which part of it a rank holds. Initial weights, gradient norm and checkpoints read
only this declaration, and it depends on nothing but (rank, size): a weight's values are a function of its name,
whatever the layout. With one rank the layers are plain torch.

Legend: O output dim, I input dim, D model dim, V ids of the vocabulary, W = V and its padding; tp size of the axis.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megacoder.parallel.tensor import TensorParallel, gather, reduce

__all__ = ["ColumnParallelLinear", "Linear", "RowParallelLinear", "Shard", "VocabParallelEmbedding"]


@dataclass(frozen=True, kw_only=True)
class Shard:
    """The part of a named weight that a rank holds: indices [start, start + size) along `dim`, all of other dims."""

    name: str
    """last part of the weight's Hugging Face name before `.weight` or `.bias`"""
    shape: tuple[int, ...]
    """of the whole weight"""
    dim: int
    """along which ranks share it"""
    start: int
    """first index held"""
    size: int
    """indices held; 0 where all of a rank's rows are padding"""
    copy: int = 0
    """this rank's number among those that hold the same part; number 0 counts where each part must count once"""
    sum_copies: bool = False
    """whether the copies' gradients must be summed, rather than being equal"""

    @staticmethod
    def of(
        name: str,
        shape: tuple[int, ...],
        tp: TensorParallel,
        *,
        dim: int = 0,
        num_blocks: int | None = None,
        sum_copies: bool = True,
    ) -> "Shard":
        """The share of rank `tp.rank` when `dim`, which is `num_blocks` equal blocks (heads), is dealt out in order.

        With fewer blocks than ranks, neighboring ranks hold copies of one block. One of the two numbers must divide the
        other.
        """
        num_blocks = shape[dim] if num_blocks is None else num_blocks
        block = shape[dim] // num_blocks
        num_copies = max(1, tp.size // num_blocks)
        size = max(1, num_blocks // tp.size) * block
        return Shard(
            name=name, shape=shape, dim=dim, start=tp.rank // num_copies * size, size=size,
            copy=tp.rank % num_copies, sum_copies=sum_copies and num_copies > 1,
        )  # fmt: skip

    @property
    def offsets(self) -> tuple[int, ...]:
        """Offsets of the part's first element in the whole weight."""
        return tuple(self.start if dim == self.dim else 0 for dim in range(len(self.shape)))

    @property
    def local_shape(self) -> tuple[int, ...]:
        """Shape of the part."""
        return (*self.shape[: self.dim], self.size, *self.shape[self.dim + 1 :])

    def part(self, whole: Tensor) -> Tensor:
        """This rank's part of the whole weight, a view."""
        return whole.narrow(self.dim, self.start, self.size)


class Linear(nn.Module):
    """y = x W^T; the rows of `weight` are those of `shards`, one after the other, then `padding`."""

    def __init__(self, shards: Sequence[Shard], tp: TensorParallel, *, padding: int = 0) -> None:
        super().__init__()
        self.shards, self.tp = list(shards), tp
        rows, columns = sum(shard.local_shape[0] for shard in shards) + padding, shards[0].local_shape[1]
        self.weight = nn.Parameter(torch.empty(rows, columns))


class ColumnParallelLinear(Linear):
    """Output features are sharded: all tokens (T, I) of the residual stream -> (T, O/tp).

    A bias, where there is one, has the rows of `weight`.
    """

    bias: nn.Parameter | None

    def __init__(self, shards: Sequence[Shard], tp: TensorParallel, *, bias: bool = False) -> None:
        super().__init__(shards, tp)
        self.register_parameter("bias", nn.Parameter(torch.empty(len(self.weight))) if bias else None)

    def forward(self, stream: Tensor) -> Tensor:
        return F.linear(gather(stream, self.tp), self.weight, self.bias)


class RowParallelLinear(Linear):
    """Input features are sharded: (T, I/tp) -> the residual stream (T, O), summed over the ranks."""

    def forward(self, x: Tensor) -> Tensor:
        return reduce(F.linear(x, self.weight), self.tp)


class VocabParallelEmbedding(Linear):
    """One row per id, sharded: (W/tp, D). The output head is one too; its rows multiply the hidden states.

    The padding, W - V rows, is at the end of the last ranks; it belongs to no shard.
    """

    def __init__(self, name: str, shape: tuple[int, int], padded_vocab: int, tp: TensorParallel) -> None:
        self.vocab = shape[0]
        rows = padded_vocab // tp.size
        start = min(tp.rank * rows, self.vocab)
        size = min(rows, self.vocab - start)
        super().__init__([Shard(name=name, shape=shape, dim=0, start=start, size=size)], tp, padding=rows - size)

    @property
    def num_ids(self) -> int:
        """Rows that are not padding."""
        return self.shards[0].size

    def forward(self, tokens: Tensor) -> Tensor:
        """Ids of any shape -> residual stream (..., D); under sequence parallelism (N, D)."""
        if self.tp.size == 1:
            return F.embedding(tokens, self.weight)
        rows, elsewhere = self.local_rows(tokens)
        return reduce(F.embedding(rows, self.weight).masked_fill(elsewhere[..., None], 0.0), self.tp)

    def local_rows(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """(row of `weight` for each id, 0 for ids of other ranks; True for ids of other ranks)."""
        rows = ids - self.shards[0].start
        elsewhere = (rows < 0) | (rows >= self.num_ids)
        return rows.masked_fill(elsewhere, 0), elsewhere

    def accumulate_grad(self, grad_weight_WD: Tensor, tokens_T: Tensor, grad_TD: Tensor) -> None:
        """The backward of `forward` by hand: adds all tokens' gradients into the rows of this rank's ids, in fp32."""
        grad_TD = grad_TD.float()
        if self.tp.size > 1:
            tokens_T, elsewhere = self.local_rows(tokens_T)
            grad_TD = grad_TD.masked_fill(elsewhere[:, None], 0.0)
        if grad_TD.is_cuda:  # sorts the ids and adds in a fixed order; index_add_ is not reproducible on a GPU
            grad_weight_WD.index_put_((tokens_T,), grad_TD, accumulate=True)
        else:
            grad_weight_WD.index_add_(0, tokens_T, grad_TD)
