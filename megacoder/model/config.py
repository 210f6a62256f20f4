"""The shape of a Llama-architecture model, in Hugging Face's names (DeepSeek-Coder is this architecture exactly,
Qwen2.5-Coder with biases, and Qwen3 with norms of queries and keys)."""

import math
from dataclasses import dataclass, field
from typing import NamedTuple

from megacoder.core.config import check_at_least
from megacoder.core.errors import ConfigError
from megacoder.ops.rope_scaling import RopeScaling

__all__ = ["LocalSizes", "ModelConfig"]


class LocalSizes(NamedTuple):
    """Dims of what one of several tensor-parallel ranks computes in a layer."""

    heads: int
    """query heads"""
    kv_heads: int
    """with fewer of them than ranks, several ranks hold a copy of one"""
    qkv: int
    """columns of queries, keys and values together"""
    attention: int
    """columns of attention's output, which are those of the queries"""
    feed_forward: int


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Pre-RMSNorm, SwiGLU, RoPE, grouped queries; no biases unless `qkv_bias` (arXiv:2401.14196, Table 2).

    Defaults: the 1.3B model as it is pre-trained, before it is extended to 16,384 positions.
    """

    vocab_size: int = 32256
    """ids the tokenizer can produce; the weights have `padded_vocab_size` rows"""
    hidden_size: int = 2048
    """model dim D"""
    intermediate_size: int = 5504
    """feed-forward dim F"""
    num_hidden_layers: int = 24
    """decoder layers"""
    num_attention_heads: int = 16
    """query heads H"""
    num_key_value_heads: int = 16
    """key-value heads G; H is a multiple of it"""
    head_dim: int = 128
    """dim K of a head; H * K need not equal hidden_size"""
    rms_norm_eps: float = 1e-6
    """added under the square root of RMSNorm"""
    rope_theta: float = 10000.0
    """RoPE base; DeepSeek-Coder's 16K models use 100,000"""
    rope_factor: float = 1.0
    """how many times as long a context RoPE is stretched to; DeepSeek-Coder's 16K models use 4, linearly"""
    rope_scaling: RopeScaling = field(default_factory=RopeScaling)
    """how RoPE is stretched"""
    max_position_embeddings: int = 4096
    """longest sequence the model is meant for"""
    tie_word_embeddings: bool = False
    """share the embedding's weights with the head"""
    qkv_bias: bool = False
    """add a bias to queries, keys and values, as Qwen2 does (arXiv:2407.10671, 2.2)"""
    qk_norm: bool = False
    """norm every query and key head by RMSNorm before it is rotated, as Qwen3 does (arXiv:2505.09388, 2)"""
    init_std: float = 0.006
    """standard deviation of every matrix at initialization (arXiv:2401.02954, 2.2)"""
    vocab_multiple: int = 128
    """pad the rows of embedding and head to a multiple of this; padding is neither predicted nor exported"""

    def __post_init__(self) -> None:
        check_at_least(
            self, 1, "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "num_key_value_heads", "head_dim", "max_position_embeddings", "vocab_multiple", prefix="model.",
        )  # fmt: skip
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"model.num_attention_heads = {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads = {self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ConfigError(f"model.head_dim = {self.head_dim}: RoPE rotates pairs, so it must be even")
        for name in ("rope_theta", "rope_factor", "rms_norm_eps", "init_std"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"model.{name} = {getattr(self, name)}: must be positive and finite")
        self.rope_scaling.check(head_dim=self.head_dim, theta=self.rope_theta, factor=self.rope_factor)

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding and the head."""
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple

    @property
    def rope_words(self) -> str:
        """RoPE in a few words."""
        original = self.rope_scaling.original_max_position_embeddings
        stretched = "" if original is None else f" from {original:,} positions"
        unscaled = original is None and self.rope_factor == 1
        scaling = "" if unscaled else f", {self.rope_scaling.kind} scaling by {self.rope_factor:g}{stretched}"
        return f"RoPE of base {self.rope_theta:,.0f}{scaling}"

    @property
    def rope_reach(self) -> int | None:
        """Positions that RoPE is stretched to; None where its settings do not say from how many."""
        original = self.rope_scaling.original_max_position_embeddings
        return None if original is None else int(original * self.rope_factor)

    @property
    def positions_advice(self) -> str:
        """Goes behind a message that the model has too few positions, where its RoPE is stretched to more."""
        reach = self.rope_reach
        if reach is None or reach <= self.max_position_embeddings:
            return ""
        return f"; its RoPE is scaled to {reach:,}, to which max_position_embeddings can be set"

    @property
    def num_layer_matmul_params(self) -> int:
        """Weights of one layer that take part in a matrix product: all but its norms."""
        return self.local_matmul_params(1)

    def local_matmul_params(self, tp: int) -> int:
        """Those of one of `tp` tensor-parallel ranks, some of which may hold a copy of the same key-value head."""
        local = self.local_sizes(tp)
        return self.hidden_size * (local.qkv + local.attention + 3 * local.feed_forward)

    @property
    def num_matmul_params(self) -> int:
        """Weights that take part in a matrix product for every token: all but the embedding and the norms."""
        return self.num_hidden_layers * self.num_layer_matmul_params + self.vocab_size * self.hidden_size

    @property
    def num_params(self) -> int:
        """All weights that are trained, padding not counted."""
        embedding = 0 if self.tie_word_embeddings else self.vocab_size * self.hidden_size
        vectors = 2 * self.hidden_size  # of a layer
        vectors += self.local_sizes(1).qkv if self.qkv_bias else 0
        vectors += 2 * self.head_dim if self.qk_norm else 0
        return self.num_matmul_params + embedding + self.num_hidden_layers * vectors + self.hidden_size

    def attention_flops_per_token(self, seq_length: int, *, causal: bool) -> float:
        """Training FLOPs per token of the score and value products.

        Full (PaLM, arXiv:2204.02311, appendix B): 12 * layers * heads * head_dim * seq; causal counts the half that a
        causal mask leaves.
        """
        full = 12.0 * self.num_hidden_layers * self.num_attention_heads * self.head_dim * seq_length
        return full / 2 if causal else full

    def training_flops_per_token(self, seq_length: int, *, causal: bool) -> float:
        """6 FLOPs per weight that takes part in a matrix product, forward and backward, plus attention's own."""
        return 6.0 * self.num_matmul_params + self.attention_flops_per_token(seq_length, causal=causal)

    def local_heads(self, tp: int) -> tuple[int, int]:
        """(H, G) of one of `tp` tensor-parallel ranks."""
        return self.num_attention_heads // tp, max(1, self.num_key_value_heads // tp)

    def normed_columns(self, tp: int) -> int:
        """Columns of the queries and keys that `qk_norm` norms on one of `tp` tensor-parallel ranks; 0 without it."""
        return sum(self.local_heads(tp)) * self.head_dim if self.qk_norm else 0

    def local_sizes(self, tp: int) -> LocalSizes:
        """Of one of `tp` tensor-parallel ranks."""
        heads, kv_heads = self.local_heads(tp)
        return LocalSizes(
            heads, kv_heads, qkv=(heads + 2 * kv_heads) * self.head_dim, attention=heads * self.head_dim,
            feed_forward=self.intermediate_size // tp,
        )  # fmt: skip

    def check_tensor_parallel(self, size: int) -> None:
        """ConfigError, with the nearest sizes that work, unless `size` tensor-parallel ranks can share the model."""
        reason = self._not_shared_by(size)
        if reason is None:
            return
        sizes = [other for other in range(1, self.num_attention_heads + 1) if self._not_shared_by(other) is None]
        nearest = sorted(sorted(sizes, key=lambda other: abs(other - size))[:2])
        raise ConfigError(f"tp = {size}: {reason}; nearest that work: tp = {' or '.join(map(str, nearest))}")

    def _not_shared_by(self, size: int) -> str | None:
        if size < 1:
            return "must be at least 1"
        for name in ("num_attention_heads", "intermediate_size"):
            if getattr(self, name) % size:
                return f"model.{name} = {getattr(self, name)} is not a multiple of {size}"
        if self.padded_vocab_size % size:
            multiple = f"model.vocab_multiple = {self.vocab_multiple}"
            return f"the vocabulary, padded to {self.padded_vocab_size} by {multiple}, is not a multiple of {size}"
        if self.num_key_value_heads % size and size % self.num_key_value_heads:
            return (
                f"model.num_key_value_heads = {self.num_key_value_heads} is neither a multiple nor a divisor of {size}"
            )
        return None
