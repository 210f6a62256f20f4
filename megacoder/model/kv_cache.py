"""Keys and values of the tokens so far: a new token then costs one column of attention, not a pass over the text.

Legend: B sequences, S new tokens each, G key-value heads, P columns so far, K head dim.
Sequences of unequal length all end at the same column, the shorter ones padded on the left, so that one slice writes
the next token of every sequence. Padding changes nothing: no real token sees it, and positions count from the first
real token. Memory is allocated once, for the greatest length that the batch may reach.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from megacoder.model.config import ModelConfig
from megacoder.parallel.tensor import TensorParallel

__all__ = ["KVCache", "LayerCache"]

_MASK_ELEMENTS = 1 << 26
"""Most elements of a mask, which attention on CPUs turns into fp32. 16 prompts of 16K in one pass would need 4G."""
_SCORES = 1 << 28
"""Most scores of a masked pass on other devices, 1 GB in fp32: whether torch has a fused kernel for a mask with grouped
queries depends on its version, the dtype and the GPU; where it has none, it holds them all."""


class LayerCache:
    """One layer's keys and values; the `KVCache` says where new columns go and what each token may see."""

    def __init__(self, cache: "KVCache", shape: tuple[int, ...], like: Tensor) -> None:
        self.cache = cache
        self.keys, self.values = like.new_empty(shape), like.new_empty(shape)  # (B, G, capacity, K)

    def append(self, k_BGSK: Tensor, v_BGSK: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Stores the new columns; returns all keys and values so far, (B, G, P, K), and the mask for `attention`."""
        start, stop = self.cache.start, self.cache.stop
        self.keys[:, :, start:stop] = k_BGSK
        self.values[:, :, start:stop] = v_BGSK
        return self.keys[:, :, :stop], self.values[:, :, :stop], self.cache.mask


class KVCache:
    """The cache of one batch; hand it to `Transformer.forward` with the padded prompts, then with each new token.

    Prompts may come in several passes (`longest_pass`).
    """

    def __init__(
        self, config: ModelConfig, lengths: Sequence[int], *, capacity: int, like: Tensor, tp: TensorParallel
    ) -> None:
        """`lengths` are the prompts' own, before padding; `like` is a weight, for dtype and device.

        Each of `tp`'s ranks holds its own key-value heads.
        """
        shape = (len(lengths), config.local_heads(tp.size)[1], capacity, config.head_dim)
        self.layers = [LayerCache(self, shape, like) for _ in range(config.num_hidden_layers)]
        self.start = self.stop = 0
        self.mask: Tensor | None = None
        """attention mask of this pass, True is seen: (B, 1, S, P), or None for plain causal"""
        self._columns = torch.arange(capacity, device=like.device)
        self._padding_B1 = torch.tensor([[max(lengths) - length] for length in lengths], device=like.device)
        self._padded = min(lengths) != max(lengths)
        on_cpu, num_heads = like.device.type == "cpu", config.local_heads(tp.size)[0]
        self._most_mask_elements = _MASK_ELEMENTS if on_cpu else _SCORES // num_heads
        self._real_B11P = (self._columns >= self._padding_B1)[:, None, None]

    @property
    def longest_pass(self) -> int:
        """Columns to add in one pass so that its mask stays small; at least two, since one is taken for a new token."""
        capacity = len(self._columns)
        return max(2, self._most_mask_elements // (capacity * self.num_sequences)) if self._padded else capacity

    def advance(self, count: int) -> Tensor:
        """Makes room for `count` more columns; returns the positions (B, count) of their tokens, 0 in the padding."""
        self.start, self.stop = self.stop, self.stop + count
        new_S, all_P = self._columns[self.start : self.stop], self._columns[: self.stop]
        if count == 1:
            self.mask = self._real_B11P[..., : self.stop]
        elif self.start == 0 and not self._padded:
            self.mask = None
        else:  # a padding token sees itself: a softmax over nothing would be NaN
            causal_SP, itself_SP = all_P <= new_S[:, None], all_P == new_S[:, None]
            self.mask = (causal_SP & self._real_B11P[..., : self.stop]) | itself_SP
        return (new_S - self._padding_B1).clamp_min(0)

    @property
    def mask_of_one(self) -> Tensor | None:
        """`mask` in a pass of one token, but None where no sequence is padded: the token then sees every column."""
        return self.mask if self._padded else None

    def advance_one(self) -> int:
        """Makes room for one more column and returns its index; for callers that take positions from `padding_B`."""
        self.start, self.stop = self.stop, self.stop + 1
        return self.start

    @property
    def num_sequences(self) -> int:
        return len(self._padding_B1)

    @property
    def padding_B(self) -> Tensor:
        """The column where each sequence begins."""
        return self._padding_B1.flatten()

    def keep(self, rows_B: Tensor) -> None:
        """Drops all sequences but `rows_B`."""
        for layer in self.layers:
            layer.keys, layer.values = layer.keys[rows_B], layer.values[rows_B]
        self._padding_B1, self._real_B11P = self._padding_B1[rows_B], self._real_B11P[rows_B]
