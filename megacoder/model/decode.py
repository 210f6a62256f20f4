"""One new token a sequence, from keys and values already there: the model's forward with nothing in it but the work.

`Transformer.forward` is the reference, and what prompts go through. A step that makes one token a sequence is so short
that on a CPU half of its time went to what surrounds the arithmetic: module calls, views for general shapes, a rotary
lookup in every layer. Here a layer is a dozen operations, and products go through `few_rows_linear`, which reads each
weight once.

Legend: B sequences, D model dim, G key-value heads, R query heads of each, K head dim, P columns so far.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from megacoder.model.kv_cache import KVCache
from megacoder.model.transformer import Transformer
from megacoder.ops.few_rows import few_rows_linear
from megacoder.ops.rms_norm import rms_norm_forward
from megacoder.ops.rope import apply_rope_
from megacoder.ops.swiglu import swiglu_forward
from megacoder.parallel.tensor import TensorParallel, reduce

__all__ = ["decode_step"]


@torch.no_grad()
def decode_step(model: Transformer, tokens_B: Tensor, cache: KVCache) -> Tensor:
    """Hidden states (B, D), normalised, of one more token of each sequence, which `cache` takes in."""
    positions_B = cache.advance(1).flatten()
    x_BD = model.embed_tokens(tokens_B)
    rope, batch, mask = model.rope(x_BD.device), len(tokens_B), cache.mask_of_one
    for layer, kept in zip(model.decoder_layers().values(), cache.layers, strict=True):
        attn, mlp = layer.self_attn, layer.mlp
        heads, groups, dim = attn.num_heads, attn.num_kv_heads, attn.head_dim
        norm = layer.input_layernorm
        qkv_BC = few_rows_linear(rms_norm_forward(x_BD, norm.weight, norm.eps)[0], attn.qkv_proj.weight)
        apply_rope_(qkv_BC, rope.cos, rope.sin, positions_B, num_heads=heads + groups, head_dim=dim)
        rows = qkv_BC.view(batch, -1, dim)
        k_BGPK, v_BGPK, _ = kept.append(rows[:, heads : heads + groups, None], rows[:, heads + groups :, None])
        # the heads of a group take the place of queries: no key is read twice
        q_BGRK = rows[:, :heads].view(batch, groups, heads // groups, dim)
        out = F.scaled_dot_product_attention(q_BGRK, k_BGPK, v_BGPK, attn_mask=mask)
        x_BD = _add(x_BD, out.reshape(batch, heads * dim), attn.o_proj.weight, model.tp)
        norm = layer.post_attention_layernorm
        gate_up = few_rows_linear(rms_norm_forward(x_BD, norm.weight, norm.eps)[0], mlp.gate_up_proj.weight)
        x_BD = _add(x_BD, swiglu_forward(gate_up), mlp.down_proj.weight, model.tp)
    return rms_norm_forward(x_BD, model.norm.weight, model.norm.eps)[0]


def _add(x_BD: Tensor, partial_BI: Tensor, weight_DI: Tensor, tp: TensorParallel) -> Tensor:
    """x plus the product, summed over the ranks that share it."""
    return x_BD + reduce(few_rows_linear(partial_BI, weight_DI), tp)
