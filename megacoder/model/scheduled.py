"""A decoder layer's training step by hand: forward and backward halves called explicitly, no autograd.

Legend: B sequences, S tokens, T = B * S, D model dim, C fused QKV dim, F feed-forward dim. The parameters are those of
`megacoder.model.transformer.DecoderLayer`, which is the reference; `megacoder.model.stage` puts layers together.

What this buys over autograd: it chooses what is saved (a layer keeps its two normed inputs, fused QKV, attention output
and gate-up; nothing twice), fuses residual adds into the norms, overwrites buffers in place, and adds every weight
gradient straight into `param.grad`, which is a view of the flat fp32 buffer. Weight gradients go through
`WeightGradients`, so that a pipeline schedule can postpone them behind the input gradients of other microbatches.

Under tensor parallelism C and F are this rank's share, and the residual stream has N tokens: T, or T / tp under
sequence parallelism. The ranks' sum of an input gradient travels while weight gradients are computed, and the normed
input, of which only this rank's tokens are kept, while the input gradient is.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from megacoder.model.transformer import DecoderLayer, RopeTables
from megacoder.ops.attention import attention_backward, attention_forward
from megacoder.ops.linear import accumulate_weight_grad
from megacoder.ops.rms_norm import rms_norm_backward, rms_norm_forward
from megacoder.ops.rope import apply_rope_
from megacoder.ops.swiglu import swiglu_backward_, swiglu_forward
from megacoder.parallel.layers import Linear
from megacoder.parallel.tensor import start_gather, start_reduce

__all__ = ["SavedLayer", "WeightGradients", "grad_of", "layer_backward", "layer_forward"]


@dataclass(slots=True)
class SavedLayer:
    """What one layer's forward keeps for its backward; tensors are (T, ...) and belong to this microbatch alone."""

    attn_input: Tensor
    """residual stream before the layer (N, D)"""
    attn_normed: Tensor
    attn_rstd: Tensor
    qkv: Tensor
    """rotated queries and keys, values (T, C)"""
    attn_out: Tensor
    """(B, S, H, K)"""
    lse: Tensor
    mlp_input: Tensor
    """residual stream after attention (N, D)"""
    mlp_normed: Tensor
    mlp_rstd: Tensor
    gate_up: Tensor
    """(T, 2F); the backward overwrites it"""


@dataclass(slots=True)
class WeightGradients:
    """Runs weight-gradient products at once, or keeps them for `run` when `postponed` (the W of zero bubble)."""

    postponed: bool = False
    waiting: list[Callable[[], None]] = field(default_factory=list)

    def add(self, linear: Linear, grad_out_TO: Tensor, x_TI: Tensor) -> None:
        """grad += grad_out^T x, now or later; the caller must not change either tensor before then."""
        if self.postponed:
            self.waiting.append(lambda: accumulate_weight_grad(grad_of(linear.weight), grad_out_TO, x_TI))
        else:
            accumulate_weight_grad(grad_of(linear.weight), grad_out_TO, x_TI)

    def run(self) -> None:
        """Computes what waits, in the order in which it was added."""
        for product in self.waiting:
            product()
        self.waiting.clear()


def grad_of(param: nn.Parameter) -> Tensor:
    """The fp32 gradient buffer of `param`; RuntimeError where none was attached."""
    if param.grad is None:
        raise RuntimeError("a parameter has no gradient buffer; wrap the model in FlatParameters first")
    return param.grad


def layer_forward(
    layer: DecoderLayer,
    stream_ND: Tensor,
    residual_ND: Tensor | None,
    rope: RopeTables,
    positions_T: Tensor,
    batch: int,
) -> tuple[Tensor, Tensor, SavedLayer]:
    """(stream, residual, saved): the layer's output is stream + residual, added inside the next norm."""
    attn, mlp, tp = layer.self_attn, layer.mlp, layer.tp
    norm = layer.input_layernorm
    attn_normed, attn_input, attn_rstd = rms_norm_forward(
        stream_ND, norm.weight.detach(), norm.eps, residual_TD=residual_ND
    )
    qkv_TC = start_gather(attn_normed, tp).wait() @ attn.qkv_proj.weight.detach().t()
    rotated = attn.num_heads + attn.num_kv_heads
    apply_rope_(qkv_TC, rope.cos, rope.sin, positions_T, num_heads=rotated, head_dim=attn.head_dim)
    attn_out_BSHK, lse = attention_forward(*_heads(layer, qkv_TC, batch))
    partial_TD = attn_out_BSHK.view(qkv_TC.shape[0], -1) @ attn.o_proj.weight.detach().t()
    stream_ND = start_reduce(partial_TD, tp).wait()

    norm = layer.post_attention_layernorm
    mlp_normed, mlp_input, mlp_rstd = rms_norm_forward(
        stream_ND, norm.weight.detach(), norm.eps, residual_TD=attn_input
    )
    gate_up_T2F = start_gather(mlp_normed, tp).wait() @ mlp.gate_up_proj.weight.detach().t()
    partial_TD = swiglu_forward(gate_up_T2F) @ mlp.down_proj.weight.detach().t()
    stream_ND = start_reduce(partial_TD, tp).wait()
    saved = SavedLayer(
        attn_input, attn_normed, attn_rstd, qkv_TC, attn_out_BSHK, lse, mlp_input, mlp_normed, mlp_rstd, gate_up_T2F
    )
    return stream_ND, mlp_input, saved


def layer_backward(
    layer: DecoderLayer,
    grad_ND: Tensor,
    saved: SavedLayer,
    rope: RopeTables,
    positions_T: Tensor,
    weight_grads: WeightGradients,
) -> Tensor:
    """Gradient of the layer's output -> gradient of its input; consumes `saved`."""
    attn, mlp, tp = layer.self_attn, layer.mlp, layer.tp
    batch = saved.attn_out.shape[0]
    grad_TD = start_gather(grad_ND, tp).wait()
    gathering = start_gather(saved.mlp_normed, tp)
    grad_act_TF = grad_TD @ mlp.down_proj.weight.detach()
    activation_TF = swiglu_backward_(grad_act_TF, saved.gate_up)
    reducing = start_reduce(saved.gate_up @ mlp.gate_up_proj.weight.detach(), tp)
    weight_grads.add(mlp.down_proj, grad_TD, activation_TF)
    weight_grads.add(mlp.gate_up_proj, saved.gate_up, gathering.wait())
    weight = layer.post_attention_layernorm.weight
    grad_ND = rms_norm_backward(
        reducing.wait(), saved.mlp_input, weight.detach(), saved.mlp_rstd,
        grad_weight_D=grad_of(weight), grad_residual_TD=grad_ND,
    )  # fmt: skip

    grad_TD = start_gather(grad_ND, tp).wait()
    gathering = start_gather(saved.attn_normed, tp)
    grad_attn_BSHK = (grad_TD @ attn.o_proj.weight.detach()).view(saved.attn_out.shape)
    grad_qkv_TC = torch.empty_like(saved.qkv)
    heads = _heads(layer, saved.qkv, batch)
    grads = attention_backward(grad_attn_BSHK, *heads, saved.attn_out, saved.lse)
    for target, grad in zip(_heads(layer, grad_qkv_TC, batch), grads, strict=True):
        target.copy_(grad)
    rotated = attn.num_heads + attn.num_kv_heads
    apply_rope_(grad_qkv_TC, rope.cos, rope.sin, positions_T, num_heads=rotated, head_dim=attn.head_dim, inverse=True)
    reducing = start_reduce(grad_qkv_TC @ attn.qkv_proj.weight.detach(), tp)
    weight_grads.add(attn.o_proj, grad_TD, saved.attn_out.view(grad_TD.shape[0], -1))
    weight_grads.add(attn.qkv_proj, grad_qkv_TC, gathering.wait())
    weight = layer.input_layernorm.weight
    return rms_norm_backward(
        reducing.wait(), saved.attn_input, weight.detach(), saved.attn_rstd,
        grad_weight_D=grad_of(weight), grad_residual_TD=grad_ND,
    )  # fmt: skip


def _heads(layer: DecoderLayer, qkv_TC: Tensor, batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """(B, H, S, K), (B, G, S, K), (B, G, S, K) views of fused rows."""
    attn = layer.self_attn
    split = qkv_TC.view(batch, -1, attn.num_heads + 2 * attn.num_kv_heads, attn.head_dim).transpose(1, 2)
    q, k, v = split.split([attn.num_heads, attn.num_kv_heads, attn.num_kv_heads], dim=1)
    return q, k, v
