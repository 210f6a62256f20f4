"""Decoding steps of one new token per sequence, on cached keys and values: the forward without module overhead.

`Transformer.forward` is the reference and processes the prompts. A step of one token per sequence is so short that on a
CPU most of its time went into what surrounds the arithmetic: module calls, views for general shapes, a rotary lookup in
every layer. Where the CPU kernels are built and the batch is small, a layer here is two calls (`megacoder.ops.decode`);
elsewhere, and with biases, it is a dozen operations: on one core that takes 0.9 ms longer for eight layers of D = 256,
and no longer from D = 896 on.

Legend: B sequences, D model dim, G key-value heads, R query heads of each, K head dim, P columns so far.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from megacoder.model.kv_cache import KVCache, LayerCache
from megacoder.model.transformer import DecoderLayer, Transformer
from megacoder.ops.decode import FusedLayer, LayerCacheView, LayerWeights, can_fuse
from megacoder.ops.few_rows import few_rows_linear
from megacoder.ops.qk_norm import norm_rope_forward
from megacoder.ops.rms_norm import rms_norm_forward
from megacoder.ops.rope import apply_rope_
from megacoder.ops.swiglu import swiglu_forward
from megacoder.parallel.tensor import TensorParallel, reduce

__all__ = ["Decoder"]


class Decoder:
    """Decodes one batch, whose prompts are already in `cache`; after `cache.keep` make a new one."""

    def __init__(self, model: Transformer, cache: KVCache) -> None:
        self._model, self._cache = model, cache
        weight = model.lm_head.weight
        self._rope = model.rope(weight.device)
        self._fused: list[FusedLayer] | None = None
        if can_fuse(weight, cache.num_sequences) and not model.config.qkv_bias:
            layers = zip(model.decoder_layers().values(), cache.layers, strict=True)
            self._fused = [FusedLayer(_weights(layer), self._view(kept)) for layer, kept in layers]

    @torch.no_grad()
    def step(self, tokens_B: Tensor) -> Tensor:
        """Hidden states (B, D), normalized, of one more token per sequence, which is added to the cache."""
        model = self._model
        x_BD = model.embed_tokens(tokens_B)
        x_BD = self._plain(x_BD) if self._fused is None else self._by_kernels(self._fused, x_BD)
        return rms_norm_forward(x_BD, model.norm.weight, model.norm.eps)[0]

    def _by_kernels(self, layers: list[FusedLayer], x_BD: Tensor) -> Tensor:
        column, tp = self._cache.advance_one(), self._model.tp
        if tp.size == 1:
            for layer in layers:
                layer.attend(x_BD, column, out_BD=x_BD, adds=True)
                layer.feed_forward(x_BD, out_BD=x_BD, adds=True)
            return x_BD
        partial_BD = torch.empty_like(x_BD)
        for layer in layers:
            layer.attend(x_BD, column, out_BD=partial_BD, adds=False)
            x_BD = x_BD + reduce(partial_BD, tp)
            layer.feed_forward(x_BD, out_BD=partial_BD, adds=False)
            x_BD = x_BD + reduce(partial_BD, tp)
        return x_BD

    def _plain(self, x_BD: Tensor) -> Tensor:
        model, cache, rope = self._model, self._cache, self._rope
        positions_B = cache.advance(1).flatten()
        batch, mask = len(x_BD), cache.mask_of_one
        for layer, kept in zip(model.decoder_layers().values(), cache.layers, strict=True):
            attn, mlp = layer.self_attn, layer.mlp
            heads, groups, dim = attn.num_heads, attn.num_kv_heads, attn.head_dim
            norm, qkv = layer.input_layernorm, attn.qkv_proj
            qkv_BC = few_rows_linear(rms_norm_forward(x_BD, norm.weight, norm.eps)[0], qkv.weight, qkv.bias)
            rows = rotated = qkv_BC.view(batch, -1, dim)
            rotation, norms = (rope.cos, rope.sin, positions_B), attn.head_norms
            if norms is None:
                apply_rope_(qkv_BC, *rotation, num_rotated=heads + groups, head_dim=dim)
            else:
                normed_BR = norm_rope_forward(qkv_BC, norms, *rotation, num_heads=heads, num_kv_heads=groups)
                rotated = normed_BR.view(batch, -1, dim)
            k_BGPK, v_BGPK, _ = kept.append(rotated[:, heads : heads + groups, None], rows[:, heads + groups :, None])
            # the heads of a group go into the query dim: no key is read twice
            q_BGRK = rotated[:, :heads].view(batch, groups, heads // groups, dim)
            out = F.scaled_dot_product_attention(q_BGRK, k_BGPK, v_BGPK, attn_mask=mask)
            x_BD = _add(x_BD, out.reshape(batch, heads * dim), attn.o_proj.weight, model.tp)
            norm = layer.post_attention_layernorm
            gate_up = few_rows_linear(rms_norm_forward(x_BD, norm.weight, norm.eps)[0], mlp.gate_up_proj.weight)
            x_BD = _add(x_BD, swiglu_forward(gate_up), mlp.down_proj.weight, model.tp)
        return x_BD

    def _view(self, kept: LayerCache) -> LayerCacheView:
        return LayerCacheView(
            keys_BGPK=kept.keys, values_BGPK=kept.values, padding_B=self._cache.padding_B, cos=self._rope.cos,
            sin=self._rope.sin,
        )  # fmt: skip


def _weights(layer: DecoderLayer) -> LayerWeights:
    attn, mlp, norms = layer.self_attn, layer.mlp, layer.self_attn.head_norms
    return LayerWeights(
        input_norm_D=layer.input_layernorm.weight, qkv_CD=attn.qkv_proj.weight, out_DI=attn.o_proj.weight,
        query_norm_K=norms and norms.query_K, key_norm_K=norms and norms.key_K,
        post_norm_D=layer.post_attention_layernorm.weight, gate_up_EF=mlp.gate_up_proj.weight,
        down_DF=mlp.down_proj.weight, eps=layer.input_layernorm.eps,
    )  # fmt: skip


def _add(x_BD: Tensor, partial_BI: Tensor, weight_DI: Tensor, tp: TensorParallel) -> Tensor:
    """x plus the product, summed over the tensor ranks."""
    return x_BD + reduce(few_rows_linear(partial_BI, weight_DI), tp)
