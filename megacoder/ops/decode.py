"""One decoder layer for one new token of each sequence, in two halves, each a single call of the CPU kernel.

A step of one token per sequence is so short that calling its dozen operations one by one takes as long as their
arithmetic. `FusedLayer` checks the addresses of a layer's weights and cache once; from then on a half is one call
(csrc/cpp/decode.inc). Activations stay fp32 within a half. The reference is the plain path of `Decoder` in
`megacoder.model.decode`. Not differentiable.

Legend: B sequences, D model dim, H query heads, G key-value heads, K head dim, F feed-forward dim, P cache columns.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from megacoder.ops.backends import backend
from megacoder.ops.cpp import address, kernels
from megacoder.ops.few_rows import FEW

__all__ = ["FusedLayer", "LayerCacheView", "LayerWeights", "can_fuse"]


@dataclass(frozen=True, kw_only=True)
class LayerWeights:
    """The weights of one decoder layer, or of a rank's part of it."""

    input_norm_D: Tensor
    qkv_CD: Tensor
    """rows [q | k | v], C = (H + 2 G) K"""
    query_norm_K: Tensor | None
    """with `key_norm_K` norms each head before it is rotated"""
    key_norm_K: Tensor | None
    out_DI: Tensor
    """I = H K"""
    post_norm_D: Tensor
    gate_up_EF: Tensor
    """(2F, D), rows [gate | up]"""
    down_DF: Tensor
    eps: float


@dataclass(frozen=True, kw_only=True)
class LayerCacheView:
    """A layer's keys and values, and what gives each column its position in each sequence."""

    keys_BGPK: Tensor
    values_BGPK: Tensor
    padding_B: Tensor
    """the column, int64, where each sequence begins; positions count from there"""
    cos: Tensor
    sin: Tensor
    """rotary tables, (positions, K/2) fp32"""


def can_fuse(weight: Tensor, rows: int) -> bool:
    """Whether `FusedLayer` can run `rows` sequences of a model with such weights."""
    return rows <= FEW and backend("decode", weight) == "cpp"


class FusedLayer:
    """The halves of one layer on one cache."""

    def __init__(self, weights: LayerWeights, cache: LayerCacheView) -> None:
        """ValueError where a tensor is not what the kernel needs; none may be moved or resized afterwards."""
        self._held = weights, cache  # keeps the memory alive: the kernel knows only addresses
        dtype = self._dtype = weights.qkv_CD.dtype
        rows, groups, columns, head_dim = cache.keys_BGPK.shape
        (dim, mixed_dim), inner_dim = weights.out_DI.shape, weights.down_DF.shape[1]
        heads, positions = mixed_dim // head_dim, len(cache.cos)
        self._rows, self._dim, self._is_bf16 = rows, dim, dtype == torch.bfloat16
        table = positions, head_dim // 2
        self._attention = (
            address(weights.input_norm_D, dtype, dim),
            address(weights.qkv_CD, dtype, (heads + 2 * groups) * head_dim, dim),
            address(weights.query_norm_K, dtype, head_dim), address(weights.key_norm_K, dtype, head_dim),
            address(weights.out_DI, dtype, dim, heads * head_dim),
            address(cache.cos, torch.float32, *table), address(cache.sin, torch.float32, *table),
            address(cache.padding_B, torch.int64, rows),
            address(cache.keys_BGPK, dtype), address(cache.values_BGPK, dtype, rows, groups, columns, head_dim),
        )  # fmt: skip
        self._attention_sizes = rows, dim, heads, groups, head_dim, columns
        self._feed_forward = (
            address(weights.post_norm_D, dtype, dim), address(weights.gate_up_EF, dtype, 2 * inner_dim, dim),
            address(weights.down_DF, dtype),
        )  # fmt: skip
        self._feed_forward_sizes = rows, dim, inner_dim, weights.eps
        self._last_column, self._eps = min(columns, positions) - 1, weights.eps

    def attend(self, x_BD: Tensor, column: int, *, out_BD: Tensor, adds: bool) -> None:
        """out = attention half of x, plus x itself if it `adds`; new keys and values go into `column`.

        `out_BD` may be `x_BD`. Raises ValueError for a column that the cache or the rotary table does not have.
        """
        if not 0 <= column <= self._last_column:
            raise ValueError(f"column {column}: must be from 0 to {self._last_column}")
        x = address(x_BD, self._dtype, self._rows, self._dim)
        kernels().decode_attention(
            self._is_bf16, x, x if adds else 0, *self._attention, address(out_BD, self._dtype, self._rows, self._dim),
            *self._attention_sizes, column, self._eps,
        )  # fmt: skip

    def feed_forward(self, x_BD: Tensor, *, out_BD: Tensor, adds: bool) -> None:
        """out = feed-forward half of x, plus x itself if it `adds`; `out_BD` may be `x_BD`."""
        x = address(x_BD, self._dtype, self._rows, self._dim)
        kernels().decode_feed_forward(
            self._is_bf16, x, x if adds else 0, *self._feed_forward,
            address(out_BD, self._dtype, self._rows, self._dim), *self._feed_forward_sizes,
        )  # fmt: skip
