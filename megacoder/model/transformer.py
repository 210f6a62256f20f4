"""The transformer as plain torch: the reference for every faster path, and what generation and custom code run.

Legend: B sequences, S tokens each, D model dim, H query heads, G key-value heads, K head dim, F feed-forward dim.
Forward is a loop over children; data parallelism, dtype and the hand-scheduled backward wrap it from outside. Query,
key and value projections are one matrix, gate and up another, because one large product beats three small ones;
`weight_pieces` gives them back under Hugging Face's names, as views.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import repeat

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megacoder.model.config import ModelConfig
from megacoder.model.kv_cache import KVCache, LayerCache
from megacoder.ops.attention import attention
from megacoder.ops.cross_entropy import linear_cross_entropy
from megacoder.ops.rms_norm import rms_norm
from megacoder.ops.rope import apply_rope, rope_tables
from megacoder.ops.swiglu import swiglu

__all__ = [
    "DecoderLayer",
    "Linear",
    "RMSNorm",
    "RopeTables",
    "Transformer",
    "TransformerPart",
    "WeightPiece",
    "weight_pieces",
]


@dataclass(frozen=True)
class RopeTables:
    """cos and sin, each (positions, K/2) fp32."""

    cos: Tensor
    sin: Tensor


class Linear(nn.Module):
    """y = x W^T without a bias; `pieces` are the (Hugging Face name, rows) of which a fused weight consists."""

    def __init__(self, in_features: int, pieces: list[tuple[str, int]]) -> None:
        super().__init__()
        self.pieces = pieces
        self.weight = nn.Parameter(torch.empty(sum(rows for _, rows in pieces), in_features))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class RMSNorm(nn.Module):
    """See `megacoder.ops.rms_norm`."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class Attention(nn.Module):
    """Causal self-attention with rotary positions and grouped queries."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.head_dim
        query, key_value = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        self.qkv_proj = Linear(config.hidden_size, [("q_proj", query), ("k_proj", key_value), ("v_proj", key_value)])
        self.o_proj = Linear(query, [("o_proj", config.hidden_size)])

    def forward(self, x_BSD: Tensor, rope: RopeTables, positions_BS: Tensor, cache: LayerCache | None = None) -> Tensor:
        batch, length, _ = x_BSD.shape
        rotated = self.num_heads + self.num_kv_heads
        qkv = self.qkv_proj(x_BSD).view(batch * length, -1, self.head_dim)
        qk = apply_rope(qkv[:, :rotated], rope.cos, rope.sin, positions_BS.flatten())
        q, k = qk.view(batch, length, rotated, -1).transpose(1, 2).split([self.num_heads, self.num_kv_heads], dim=1)
        v = qkv[:, rotated:].view(batch, length, self.num_kv_heads, -1).transpose(1, 2)
        mask = None
        if cache is not None:
            k, v, mask = cache.append(k, v)
        out_BHSK = attention(q, k, v, mask=mask)
        return self.o_proj(out_BHSK.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """SwiGLU feed-forward."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        dim = config.intermediate_size
        self.gate_up_proj = Linear(config.hidden_size, [("gate_proj", dim), ("up_proj", dim)])
        self.down_proj = Linear(dim, [("down_proj", config.hidden_size)])

    def forward(self, x_BSD: Tensor) -> Tensor:
        return self.down_proj(swiglu(self.gate_up_proj(x_BSD)))


class DecoderLayer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x_BSD: Tensor, rope: RopeTables, positions_BS: Tensor, cache: LayerCache | None = None) -> Tensor:
        x_BSD = x_BSD + self.self_attn(self.input_layernorm(x_BSD), rope, positions_BS, cache)
        return x_BSD + self.mlp(self.post_attention_layernorm(x_BSD))


class TransformerPart(nn.Module):
    """The layers that one process holds, with the embedding, and the final norm and head, where it holds them.

    Parameters are named as in the whole model (`layers.7...` is layer 7 whoever holds it), so that initial weights,
    checkpoints and export do not depend on who holds what. Weights start empty; see `megacoder.model.init`.
    """

    embed_tokens: Linear
    """with an embedding, and with a tied head"""
    norm: RMSNorm
    """with a head"""
    lm_head: Linear
    """with a head; `embed_tokens` itself if tied"""

    def __init__(self, config: ModelConfig, *, layers: Iterable[int], embedding: bool, head: bool) -> None:
        super().__init__()
        self.config = config
        rows, tied = config.padded_vocab_size, config.tie_word_embeddings
        if embedding or (head and tied):
            self.embed_tokens = Linear(config.hidden_size, [("embed_tokens", rows)])
        self.layers = nn.ModuleDict({str(layer): DecoderLayer(config) for layer in layers})
        if head:
            self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
            self.lm_head = self.embed_tokens if tied else Linear(config.hidden_size, [("lm_head", rows)])
        cos, sin = rope_tables(
            config.max_position_embeddings, config.head_dim, theta=config.rope_theta, factor=config.rope_factor
        )
        self._rope = RopeTables(cos, sin)  # not a buffer: `.to(dtype)` must not round it

    def decoder_layers(self) -> dict[int, DecoderLayer]:
        """The layers by their index in the whole model, first to last."""
        return {int(index): layer for index, layer in self.layers.items() if isinstance(layer, DecoderLayer)}

    def rope(self, device: torch.device) -> RopeTables:
        """The rotary tables on `device`, in fp32 whatever the model's dtype."""
        if self._rope.cos.device != device:
            self._rope = RopeTables(self._rope.cos.to(device), self._rope.sin.to(device))
        return self._rope


class Transformer(TransformerPart):
    """The whole model: embedding, decoder layers, final norm, head."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config, layers=range(config.num_hidden_layers), embedding=True, head=True)

    def forward(self, tokens_BS: Tensor, positions_BS: Tensor | None = None, *, cache: KVCache | None = None) -> Tensor:
        """Token ids -> final hidden states (B, S, D), normalised; positions count from 0 unless given.

        With a cache, `tokens_BS` continue the tokens that it holds, and it knows their positions.
        """
        layer_caches: Iterable[LayerCache | None] = repeat(None)
        if cache is not None:
            positions_BS, layer_caches = cache.advance(tokens_BS.shape[1]), cache.layers
        elif positions_BS is None:
            positions_BS = torch.arange(tokens_BS.shape[1], device=tokens_BS.device).expand_as(tokens_BS)
        x_BSD = F.embedding(tokens_BS, self.embed_tokens.weight)
        rope = self.rope(x_BSD.device)
        for layer, layer_cache in zip(self.decoder_layers().values(), layer_caches, strict=False):
            x_BSD = layer(x_BSD, rope, positions_BS, layer_cache)
        return self.norm(x_BSD)

    def logits(self, hidden_BSD: Tensor) -> Tensor:
        """(B, S, vocab_size), without the padding."""
        return F.linear(hidden_BSD, self.lm_head.weight[: self.config.vocab_size])

    def loss(self, tokens_BS: Tensor, labels_BS: Tensor) -> Tensor:
        """Sum of token losses in nats; labels are already shifted, IGNORE_INDEX where not trained."""
        hidden = self(tokens_BS).flatten(0, 1)
        return linear_cross_entropy(hidden, self.lm_head.weight, labels_BS.flatten(), vocab=self.config.vocab_size)


@dataclass(frozen=True)
class WeightPiece:
    """A part of a parameter that has a Hugging Face name of its own: rows [start, start + rows) of `param`."""

    hf_name: str
    param_name: str
    param: nn.Parameter
    start: int
    rows: int

    @property
    def view(self) -> Tensor:
        """The piece's rows, sharing the parameter's memory."""
        return self.param.detach()[self.start : self.start + self.rows]


def weight_pieces(model: TransformerPart) -> Iterator[WeightPiece]:
    """Every weight of `model` once, under its Hugging Face name, in a fixed order; a tied head is the embedding.

    Embedding and head pieces hold `vocab_size` rows: the padding has no Hugging Face name.
    """
    modules = dict(model.named_modules())
    for param_name, param in model.named_parameters():
        module_name = param_name.rsplit(".", 1)[0]
        module = modules[module_name]
        pieces = module.pieces if isinstance(module, Linear) else [(module_name.rsplit(".", 1)[-1], param.shape[0])]
        parent, start = module_name.rpartition(".")[0], 0
        for name, rows in pieces:
            scope = "" if name == "lm_head" else "model." + (parent + "." if parent else "")
            real = model.config.vocab_size if name in ("embed_tokens", "lm_head") else rows
            yield WeightPiece(f"{scope}{name}.weight", param_name, param, start, real)
            start += rows
