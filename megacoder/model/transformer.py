"""The transformer as plain torch: the reference for every faster path, and what generation and custom code run.

Legend: B sequences, S tokens each, D model dim, H query heads, G key-value heads, K head dim, F feed-forward dim.
Forward is a loop over children; data parallelism, dtype and the hand-scheduled backward wrap it from outside. Query,
key and value projections are one matrix, gate and up another, because one large product beats three small ones;
`weight_pieces` gives them back under Hugging Face's names, as views.

Tensor parallelism is in the linear layers and the embedding alone. Each rank then has H/tp query heads, G/tp key-value
heads (at least one: ranks share a head when there are fewer) and F/tp of the feed-forward dim. Under sequence
parallelism the residual stream, (B, S, D) in what follows, is this rank's tokens (B * S / tp, D). Context parallelism
is in attention alone; S is then the length of this rank's part of every sequence.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import repeat

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megacoder.core.errors import ConfigError
from megacoder.model.config import ModelConfig
from megacoder.model.kv_cache import KVCache, LayerCache
from megacoder.model.places import Places
from megacoder.ops.attention import attention
from megacoder.ops.few_rows import few_rows_linear
from megacoder.ops.qk_norm import HeadNorms
from megacoder.ops.rms_norm import rms_norm
from megacoder.ops.rope import apply_rope, rope_tables
from megacoder.ops.swiglu import swiglu
from megacoder.parallel.collectives import all_gather_into
from megacoder.parallel.context import UNCUT, ContextParallel, gather_keys
from megacoder.parallel.cross_entropy import head_loss
from megacoder.parallel.layers import ColumnParallelLinear, Linear, RowParallelLinear, Shard, VocabParallelEmbedding
from megacoder.parallel.tensor import ALONE, TensorParallel

__all__ = [
    "DecoderLayer",
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


class RMSNorm(nn.Module):
    """See `megacoder.ops.rms_norm`."""

    sees_own_heads = False
    """set it on a norm of queries or keys, which under tensor parallelism is of the rank's own heads (see
    `weight_pieces`)"""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class Attention(nn.Module):
    """Causal self-attention with rotary positions and grouped queries."""

    q_norm: RMSNorm | None
    """of each query head, before it is rotated; None without `qk_norm`"""
    k_norm: RMSNorm | None

    def __init__(self, config: ModelConfig, tp: TensorParallel, *, cp: ContextParallel) -> None:
        super().__init__()
        self.cp = cp
        heads, kv_heads, dim = config.num_attention_heads, config.num_key_value_heads, config.hidden_size
        self.num_heads, self.num_kv_heads = config.local_heads(tp.size)
        self.head_dim = config.head_dim
        query, key_value = (heads * config.head_dim, dim), (kv_heads * config.head_dim, dim)
        self.qkv_proj = ColumnParallelLinear(
            [
                Shard.of("q_proj", query, tp, num_blocks=heads),
                Shard.of("k_proj", key_value, tp, num_blocks=kv_heads),
                Shard.of("v_proj", key_value, tp, num_blocks=kv_heads),
            ],
            tp,
            bias=config.qkv_bias,
        )
        self.q_norm = self._head_norm(config)
        self.k_norm = self._head_norm(config)
        self.o_proj = RowParallelLinear([Shard.of("o_proj", (dim, heads * config.head_dim), tp, dim=1)], tp)

    def forward(self, x_BSD: Tensor, rope: RopeTables, places: Places, cache: LayerCache | None = None) -> Tensor:
        batch, length = places.positions_BL.shape
        rotated = self.num_heads + self.num_kv_heads
        qkv = self.qkv_proj(x_BSD).view(batch * length, -1, self.head_dim)
        qk = qkv[:, :rotated]
        if self.q_norm is not None and self.k_norm is not None:
            qk = torch.cat((self.q_norm(qk[:, : self.num_heads]), self.k_norm(qk[:, self.num_heads :])), dim=1)
        qk = apply_rope(qk, rope.cos, rope.sin, places.positions_BL.flatten())
        q, k = qk.view(batch, length, rotated, -1).transpose(1, 2).split([self.num_heads, self.num_kv_heads], dim=1)
        v = qkv[:, rotated:].view(batch, length, self.num_kv_heads, -1).transpose(1, 2)
        if cache is not None:
            k, v, mask = cache.append(k, v)
        else:
            (k, v), mask = gather_keys(k, v, self.cp), places.mask(self.cp)
        out_BHSK = attention(q, k, v, mask=mask)
        return self.o_proj(out_BHSK.transpose(1, 2).flatten(2))

    @property
    def head_norms(self) -> HeadNorms | None:
        """The norms of queries and keys as ops take them; None without `qk_norm`."""
        if self.q_norm is None or self.k_norm is None:
            return None
        return HeadNorms(self.q_norm.weight, self.k_norm.weight, self.q_norm.eps)

    @staticmethod
    def _head_norm(config: ModelConfig) -> RMSNorm | None:
        if not config.qk_norm:
            return None
        norm = RMSNorm(config.head_dim, config.rms_norm_eps)
        norm.sees_own_heads = True
        return norm


class MLP(nn.Module):
    """SwiGLU feed-forward."""

    def __init__(self, config: ModelConfig, tp: TensorParallel) -> None:
        super().__init__()
        shape = (config.intermediate_size, config.hidden_size)
        self.gate_up_proj = ColumnParallelLinear([Shard.of("gate_proj", shape, tp), Shard.of("up_proj", shape, tp)], tp)
        self.down_proj = RowParallelLinear([Shard.of("down_proj", shape[::-1], tp, dim=1)], tp)

    def forward(self, x_BSD: Tensor) -> Tensor:
        return self.down_proj(swiglu(self.gate_up_proj(x_BSD)))


class DecoderLayer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)).

    To change a layer, change its `forward`s here and train with `[execution] block = "plain"`: the default block
    (`megacoder.model.scheduled`) does not call them, and refuses parameters that it does not know.
    """

    def __init__(self, config: ModelConfig, tp: TensorParallel, *, cp: ContextParallel) -> None:
        super().__init__()
        self.tp = tp
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, tp, cp=cp)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config, tp)

    def forward(self, x_BSD: Tensor, rope: RopeTables, places: Places, cache: LayerCache | None = None) -> Tensor:
        return self.feed_forward(self.attend(x_BSD, rope, places, cache))

    def attend(self, x_BSD: Tensor, rope: RopeTables, places: Places, cache: LayerCache | None = None) -> Tensor:
        """The first half of `forward`."""
        return x_BSD + self.self_attn(self.input_layernorm(x_BSD), rope, places, cache)

    def feed_forward(self, x_BSD: Tensor) -> Tensor:
        """The second half, whose inner tensors are the widest."""
        return x_BSD + self.mlp(self.post_attention_layernorm(x_BSD))


class TransformerPart(nn.Module):
    """The layers that one process holds, with the embedding, and the final norm and head, where it holds them.

    Parameters are named as in the whole model (`layers.7...` is layer 7 on every rank), so that initial weights,
    checkpoints and export do not depend on which rank holds what. Weights start empty; see `megacoder.model.init`.
    """

    embed_tokens: VocabParallelEmbedding
    """with an embedding, and with a tied head"""
    norm: RMSNorm
    """with a head"""
    lm_head: VocabParallelEmbedding
    """with a head; `embed_tokens` itself if tied"""

    def __init__(
        self,
        config: ModelConfig,
        tp: TensorParallel,
        *,
        cp: ContextParallel,
        layers: Iterable[int],
        embedding: bool,
        head: bool,
    ) -> None:
        """ConfigError where `tp.size` ranks cannot share the model."""
        super().__init__()
        config.check_tensor_parallel(tp.size)
        self.config, self.tp, self.cp = config, tp, cp
        tied = config.tie_word_embeddings
        self.copies_embedding = head and tied and not embedding
        """whether `embed_tokens` is the head's copy of what another rank of the pipeline holds"""
        self.shares_embedding = tied and head != embedding
        """whether another rank of the pipeline holds `embed_tokens` too"""
        if embedding or (head and tied):
            self.embed_tokens = self._vocab_parallel("embed_tokens")
        self.layers = nn.ModuleDict({str(layer): DecoderLayer(config, tp, cp=cp) for layer in layers})
        if head:
            self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
            self.lm_head = self.embed_tokens if tied else self._vocab_parallel("lm_head")
        self._rope: RopeTables | None = None  # not a buffer: `.to(dtype)` must not round it

    def decoder_layers(self) -> dict[int, DecoderLayer]:
        """The layers by their index in the whole model, first to last."""
        return {int(index): layer for index, layer in self.layers.items() if isinstance(layer, DecoderLayer)}

    def rope(self, device: torch.device) -> RopeTables:
        """The rotary tables on `device`, in fp32 whatever the model's dtype."""
        config = self.config
        if self._rope is None or self._rope.cos.device != device:
            cos, sin = rope_tables(
                config.max_position_embeddings, config.head_dim,
                theta=config.rope_theta, factor=config.rope_factor, scaling=config.rope_scaling,
            )  # fmt: skip
            self._rope = RopeTables(cos.to(device), sin.to(device))
        return self._rope

    def _vocab_parallel(self, name: str) -> VocabParallelEmbedding:
        config = self.config
        shape = (config.vocab_size, config.hidden_size)
        return VocabParallelEmbedding(name, shape, config.padded_vocab_size, self.tp)


class Transformer(TransformerPart):
    """The whole model: embedding, decoder layers, final norm, head."""

    def __init__(self, config: ModelConfig, tp: TensorParallel = ALONE, *, cp: ContextParallel = UNCUT) -> None:
        """ConfigError where `tp.size` ranks cannot share the model."""
        super().__init__(config, tp, cp=cp, layers=range(config.num_hidden_layers), embedding=True, head=True)

    def forward(self, tokens_BS: Tensor, *, starts_BS: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        """Token ids of whole sequences, the same on every rank -> final hidden states (B, S, D), normalized.

        With `starts_BS` (bool), True where a document begins, tokens see only their own document. Under context
        parallelism the result covers this rank's tokens, (B, S / cp, D), and under sequence parallelism its share of
        those, (B * S / cp / tp, D). With a cache, `tokens_BS` continue the cached tokens, and the cache gives their
        positions; neither cp nor sequence parallelism may then cut the sequences.
        """
        layer_caches: Iterable[LayerCache | None] = repeat(None)
        if cache is not None:
            if self.cp.size > 1:
                raise ConfigError(f"cp = {self.cp.size}: a cache needs whole sequences; generate with cp = 1")
            if self.tp.shares_tokens:
                raise ConfigError("a cache needs whole sequences; generate with sequence_parallel = false")
            places, layer_caches = Places(positions_BL=cache.advance(tokens_BS.shape[1])), cache.layers
        else:
            places = Places.of(tokens_BS.shape, self.cp, device=tokens_BS.device, starts_BS=starts_BS)
            tokens_BS = self.cp.part(tokens_BS)
        self.tp.check_tokens(*tokens_BS.shape)
        x_BSD = self.embed_tokens(tokens_BS)
        rope = self.rope(x_BSD.device)
        for layer, layer_cache in zip(self.decoder_layers().values(), layer_caches, strict=False):
            x_BSD = layer(x_BSD, rope, places, layer_cache)
        return self.norm(x_BSD)

    def logits(self, hidden_BSD: Tensor) -> Tensor:
        """(..., D) -> (..., vocab_size) without padding, complete on every rank; not differentiable with tp > 1."""
        if self.tp.size == 1:
            weight_VD = self.lm_head.weight[: self.config.vocab_size]
            if hidden_BSD.ndim == 2 and not torch.is_grad_enabled():
                return few_rows_linear(hidden_BSD, weight_VD)
            return F.linear(hidden_BSD, weight_VD)
        if self.tp.shares_tokens:
            raise ConfigError("logits need all tokens on every rank; generate with sequence_parallel = false")
        local = F.linear(hidden_BSD, self.lm_head.weight)  # (..., W/tp)
        gathered = local.new_empty(self.tp.size * local.shape[0], *local.shape[1:])
        all_gather_into(gathered, local.contiguous(), self.tp.group)
        return torch.cat(gathered.chunk(self.tp.size), dim=-1)[..., : self.config.vocab_size]

    def loss(self, tokens_BS: Tensor, labels_BS: Tensor, *, starts_BS: Tensor | None = None) -> Tensor:
        """Sum of this rank's token losses in nats; labels are already shifted, IGNORE_INDEX where not trained."""
        hidden_BSD = self(tokens_BS, starts_BS=starts_BS)
        return head_loss(hidden_BSD, self.lm_head, self.cp.part(labels_BS).flatten())


@dataclass(frozen=True)
class WeightPiece:
    """A part of a parameter that has a Hugging Face name of its own, from row `start` of `param` on."""

    hf_name: str
    param_name: str
    param: nn.Parameter
    start: int
    shard: Shard
    """which part of the named weight this is: all of it, unless tensor-parallel ranks share the model"""
    is_copy: bool
    """whether another rank of the replica holds the same part, and counts it where each part must count once"""

    @property
    def rows(self) -> int:
        """Rows of `param` that are the piece."""
        return self.shard.local_shape[0]

    @property
    def view(self) -> Tensor:
        """The piece's rows, sharing the parameter's memory."""
        return self.param.detach()[self.start : self.start + self.rows]


def weight_pieces(model: TransformerPart) -> Iterator[WeightPiece]:
    """Every weight of `model` once, under its Hugging Face name, in a fixed order; a tied head is the embedding.

    Embedding and head pieces exclude the rows that pad the vocabulary: those have no Hugging Face name. A bias of a
    `Linear` is cut as the rows of its weight are. What is not a `Linear` is a copy on every tensor-parallel rank; its
    gradients are summed where ranks compute them from parts: from their own tokens under sequence parallelism, or from
    their own heads if the module has `sees_own_heads`.
    """
    modules = dict(model.named_modules())
    for param_name, param in model.named_parameters():
        module_name, _, kind = param_name.rpartition(".")
        module = modules[module_name]
        parent, _, own_name = module_name.rpartition(".")
        if isinstance(module, Linear):
            shards = module.shards
            if kind == "bias":
                shards = [replace(shard, shape=shard.shape[:1]) for shard in shards]
        else:
            shape = tuple(param.shape)
            summed = model.tp.sequence_parallel or getattr(module, "sees_own_heads", False)
            shards = [Shard.of(own_name, shape, model.tp, num_blocks=1, sum_copies=summed)]
        start = 0
        for shard in shards:
            scope = "" if shard.name == "lm_head" else "model." + (parent + "." if parent else "")
            is_copy = shard.copy > 0 or (model.copies_embedding and module is model.embed_tokens)
            yield WeightPiece(f"{scope}{shard.name}.{kind}", param_name, param, start, shard, is_copy)
            start += shard.local_shape[0]
