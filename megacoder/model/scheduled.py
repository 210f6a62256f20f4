"""A decoder layer's training step by hand: forward and backward halves called explicitly, no autograd.

Legend: B sequences, S tokens, T = B * S, D model dim, C fused QKV dim, F feed-forward dim. The parameters are those of
`megacoder.model.transformer.DecoderLayer`, which is the reference; `megacoder.model.stage` puts layers together.

What this buys over autograd: it chooses what is saved (`megacoder.model.kept`; nothing twice), fuses residual adds into
the norms, overwrites buffers in place, and adds every weight gradient straight into `param.grad`, which is a view of
the flat fp32 buffer. Weight gradients go through `WeightGradients`, so that a pipeline schedule can postpone them
behind the input gradients of other microbatches.

All matrix products take factors, which `Precision` makes from tensors: the tensors themselves, or their fp8 casts. In
fp8 a tensor kept only for a weight gradient is kept as its cast, one byte per element; weights are cast once per
microbatch.

Under tensor parallelism C and F are this rank's share, and the residual stream has N tokens: T, or T / tp under
sequence parallelism. Communication overlaps with the backward's products: an input gradient is reduced over the ranks
while weight gradients are computed, and a normed input, of which only this rank's tokens are kept, is gathered while an
input gradient is. Under context parallelism S is the length of this rank's part of every sequence; the other ranks'
keys and values are gathered during one product, and the gradients of keys and values reduced during another.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from typing import NamedTuple, Self

from torch import Tensor

from megacoder.core.errors import ConfigError
from megacoder.model.kept import Recompute
from megacoder.model.places import Places
from megacoder.model.transformer import DecoderLayer, RMSNorm, RopeTables
from megacoder.ops.linear import (
    STORED,
    Factor,
    Precision,
    accumulate_bias_grad,
    accumulate_weight_grad,
    for_later,
    linear_forward,
    linear_input_grad,
)
from megacoder.ops.qk_norm import norm_rope_backward, norm_rope_forward
from megacoder.ops.rms_norm import rms_norm_backward, rms_norm_forward
from megacoder.ops.rope import apply_rope_, gather_unrotate
from megacoder.ops.swiglu import swiglu_backward_, swiglu_forward
from megacoder.parallel.context import context_attention_backward, context_attention_forward, start_gather_keys
from megacoder.parallel.layers import Linear
from megacoder.parallel.tensor import TensorParallel, start_gather, start_reduce

__all__ = [
    "SavedLayer",
    "Shared",
    "StreamGrad",
    "WeightGradients",
    "check_layer",
    "grad_of",
    "layer_backward",
    "layer_forward",
]

PARAMETERS = {
    "input_layernorm.weight", "self_attn.qkv_proj.weight", "self_attn.o_proj.weight", "post_attention_layernorm.weight",
    "mlp.gate_up_proj.weight", "mlp.down_proj.weight",
}  # fmt: skip
OPTIONAL = ({"self_attn.qkv_proj.bias"}, {"self_attn.q_norm.weight", "self_attn.k_norm.weight"})
"""Present together or not at all."""


def check_layer(layer: DecoderLayer) -> None:
    """ConfigError for a layer that somebody has given other parameters: they would neither be applied nor trained."""
    unknown = {name for name, _ in layer.named_parameters()} ^ PARAMETERS
    for names in OPTIONAL:
        unknown -= names if names <= unknown else set()
    if unknown:
        raise ConfigError(
            f"the layers have parameters that the hand-scheduled block does not know, or lack some: "
            f'{", ".join(sorted(unknown))}; set execution.block = "plain", which runs the layers\' own forward'
        )


class Shared(NamedTuple):
    """What all layers share in one microbatch's forward or backward."""

    tp: TensorParallel
    """that of every layer"""
    rope: RopeTables
    places: Places
    precision: Precision = STORED


class StreamGrad(NamedTuple):
    """The gradient of what enters or leaves a layer."""

    values_ND: Tensor
    amax: Tensor | None = None
    """its largest magnitude, where that is known and a cast needs it"""


class LayerWeights(NamedTuple):
    """A layer's matrices as factors."""

    qkv: Factor
    o: Factor
    gate_up: Factor
    down: Factor

    @classmethod
    def of(cls, layer: DecoderLayer, precision: Precision) -> Self:
        """Casts them where `precision` is fp8."""
        attn, mlp = layer.self_attn, layer.mlp
        linears = attn.qkv_proj, attn.o_proj, mlp.gate_up_proj, mlp.down_proj
        return cls(*(precision.weight(linear.weight.detach()) for linear in linears))


class Normed(NamedTuple):
    """A norm's result."""

    out: Factor
    """(N, D); once cast, the part of the cast that the weight gradient reads (T, D)"""
    rstd: Tensor
    """(N,) fp32"""
    amax: Tensor | None = None
    """largest magnitude of `out`, where that is to be cast as it is"""


@dataclass(frozen=True, slots=True)
class SavedAttention:
    """What the attention half of a layer computes; kept unless `recompute` is "full"."""

    qkv: Tensor
    """rotated queries and keys, values (T, C); with `qk_norm` as projected"""
    out: Tensor
    """(B, S, H, K)"""
    lse: Tensor
    """(B, H, S) fp32"""
    mlp_input: Tensor
    """residual stream after attention (N, D)"""
    o_input: Factor | None
    """`out` as o_proj's weight gradient reads it, where it has been cast"""
    normed_qk: Tensor | None = None
    """with `qk_norm`: rotated queries and keys (T, (H + G) K), unless the backward makes them again"""


@dataclass(slots=True)
class SavedLayer:
    """What one layer's forward keeps for the backward of one microbatch; None for what the backward recomputes.

    What both halves of a backward read is put here once it is recomputed.
    """

    attn_input: Tensor
    """residual stream before the layer (N, D)"""
    attention: SavedAttention | None = None
    attn_norm: Normed | None = None
    mlp_norm: Normed | None = None
    gate_up: Tensor | None = None
    """(T, 2F); the backward overwrites it"""
    down_input: Factor | None = None
    """the activation as down_proj's weight gradient reads it, where it has been cast"""
    weights: LayerWeights | None = None
    """as the backward reads them, where they have been cast"""


@dataclass(slots=True)
class WeightGradients:
    """Runs weight-gradient products at once, or keeps them for `run` when `postponed` (the W of zero bubble).

    The tensors that wait are the same for every `Recompute`: what a backward has recomputed is kept from then on
    (`megacoder.model.kept.waiting_bytes_per_token`). Recomputing the normed inputs once more would need the residual
    stream instead, which is as large; and the feed-forward part once more takes as long as its weight gradients. So
    layers that recompute run by a schedule that postpones only what there is room for
    (`megacoder.parallel.schedules.waiting`).
    """

    postponed: bool = False
    waiting: list[Callable[[], None]] = field(default_factory=list)

    def add(self, linear: Linear, grad_out_TO: Factor, x_TI: Factor) -> None:
        """grad += grad_out^T x, now or later; the caller must not change either tensor before then."""
        grad_out_TO, x_TI = for_later(grad_out_TO), for_later(x_TI)
        if self.postponed:
            self.waiting.append(lambda: accumulate_weight_grad(grad_of(linear.weight), grad_out_TO, x_TI))
        else:
            accumulate_weight_grad(grad_of(linear.weight), grad_out_TO, x_TI)

    def then(self, call: Callable[[], None]) -> None:
        """Calls `call` once what was added so far has been computed."""
        if self.postponed:
            self.waiting.append(call)
        else:
            call()

    def run(self) -> None:
        """Computes what waits, in the order in which it was added."""
        for product in self.waiting:
            product()
        self.waiting.clear()


def grad_of(param: Tensor) -> Tensor:
    """The fp32 gradient buffer of `param`; RuntimeError where none was attached."""
    if param.grad is None:
        raise RuntimeError("a parameter has no gradient buffer; wrap the model in FlatParameters first")
    return param.grad


def layer_forward(
    layer: DecoderLayer,
    stream_ND: Tensor,
    residual_ND: Tensor | None,
    shared: Shared,
    *,
    recompute: Recompute = "none",
) -> tuple[Tensor, Tensor, SavedLayer]:
    """(stream, residual, saved): the layer's output is stream + residual, added inside the next norm."""
    precision, weights = shared.precision, LayerWeights.of(layer, shared.precision)
    attn_input, attn_norm, attention, mlp_norm = _attention_half(layer, weights, stream_ND, residual_ND, shared)
    mlp_input_TD, mlp_norm = _enter(mlp_norm, shared)
    gate_up_T2F = linear_forward(mlp_input_TD, weights.gate_up)
    amax = precision.new_amax(gate_up_T2F)
    down_input_TF = precision.input(swiglu_forward(gate_up_T2F, amax=amax), amax)
    stream_ND = start_reduce(linear_forward(down_input_TF, weights.down), shared.tp).wait()
    saved = SavedLayer(attn_input)
    if recompute == "selective":
        saved.attention = replace(attention, o_input=None, normed_qk=None)
    elif recompute != "full":
        saved.attention, saved.gate_up = attention, gate_up_T2F
        if recompute == "none":
            saved.attn_norm, saved.mlp_norm = attn_norm, mlp_norm
        else:
            saved.attention = replace(attention, normed_qk=None)
        if precision.fp8:
            saved.down_input = for_later(down_input_TF)
            saved.weights = LayerWeights(*map(for_later, weights))
    return stream_ND, attention.mlp_input, saved


def _attention_half(
    layer: DecoderLayer, weights: LayerWeights, stream_ND: Tensor, residual_ND: Tensor | None, shared: Shared
) -> tuple[Tensor, Normed, SavedAttention, Normed]:
    """From the layer's input through the second norm: (input, first norm, attention, second norm)."""
    attn, precision, places = layer.self_attn, shared.precision, shared.places
    attn_input, attn_norm = _norm(layer.input_layernorm, stream_ND, residual_ND, shared)
    qkv_input_TD, attn_norm = _enter(attn_norm, shared)
    qkv_TC = linear_forward(qkv_input_TD, weights.qkv, attn.qkv_proj.bias)
    normed_qk_TR = _rotate(layer, qkv_TC, shared)
    q, k, v = _heads(layer, qkv_TC, normed_qk_TR, places.batch)
    whole_kv = start_gather_keys(k, v, attn.cp)()
    out_BSHK, lse = context_attention_forward(q, *whole_kv, attn.cp, documents=places.documents)
    o_input_TI = precision.input(out_BSHK.view(qkv_TC.shape[0], -1))
    stream_ND = start_reduce(linear_forward(o_input_TI, weights.o), shared.tp).wait()
    mlp_input, mlp_norm = _norm(layer.post_attention_layernorm, stream_ND, attn_input, shared)
    kept = for_later(o_input_TI) if precision.fp8 else None
    return attn_input, attn_norm, SavedAttention(qkv_TC, out_BSHK, lse, mlp_input, kept, normed_qk_TR), mlp_norm


def layer_backward(
    layer: DecoderLayer, grad: StreamGrad, saved: SavedLayer, shared: Shared, weight_grads: WeightGradients
) -> StreamGrad:
    """Gradient of the layer's output -> gradient of its input; consumes `saved`."""
    if saved.weights is None:
        saved.weights = LayerWeights.of(layer, shared.precision)
    if saved.attention is None:
        _, saved.attn_norm, saved.attention, saved.mlp_norm = _attention_half(
            layer, saved.weights, saved.attn_input, None, shared
        )
    grad = _feed_forward_backward(layer, grad, saved, shared, weight_grads)
    return _attention_backward(layer, grad, saved, shared, weight_grads)


def _feed_forward_backward(
    layer: DecoderLayer, grad: StreamGrad, saved: SavedLayer, shared: Shared, weight_grads: WeightGradients
) -> StreamGrad:
    """Gradient of the layer's output -> that of the stream after attention."""
    mlp, tp, precision, norm = layer.mlp, shared.tp, shared.precision, layer.post_attention_layernorm
    attention, weights, mlp_norm, gate_up_T2F = saved.attention, saved.weights, saved.mlp_norm, saved.gate_up
    assert attention is not None
    assert weights is not None
    if mlp_norm is None:
        _, mlp_norm = _norm(norm, attention.mlp_input, None, shared)
    grad_TD = precision.grad(start_gather(grad.values_ND, tp).wait(), grad.amax)
    mlp_input = _start_entering(mlp_norm, shared)
    grad_act_TF = linear_input_grad(grad_TD, weights.down)
    if gate_up_T2F is None:
        gate_up_T2F = linear_forward(mlp_input(), weights.gate_up)
    down_input_TF, amax = saved.down_input, precision.new_amax(gate_up_T2F)
    activation_TF = swiglu_backward_(grad_act_TF, gate_up_T2F, forms_activation=down_input_TF is None, amax=amax)
    grad_gate_up_T2F = precision.grad(gate_up_T2F, amax)
    reducing = start_reduce(linear_input_grad(grad_gate_up_T2F, weights.gate_up), tp)
    if activation_TF is not None:
        down_input_TF = precision.input(activation_TF)
    assert down_input_TF is not None
    weight_grads.add(mlp.down_proj, grad_TD, down_input_TF)
    weight_grads.add(mlp.gate_up_proj, grad_gate_up_T2F, mlp_input())
    return _norm_backward(norm, reducing.wait(), attention.mlp_input, mlp_norm.rstd, grad, shared)


def _attention_backward(
    layer: DecoderLayer, grad: StreamGrad, saved: SavedLayer, shared: Shared, weight_grads: WeightGradients
) -> StreamGrad:
    """Gradient of the stream after attention -> that of the layer's input."""
    attn, tp, precision, places = layer.self_attn, shared.tp, shared.precision, shared.places
    attention, weights, attn_norm, norm = saved.attention, saved.weights, saved.attn_norm, layer.input_layernorm
    assert attention is not None
    assert weights is not None
    if attn_norm is None:
        _, attn_norm = _norm(norm, saved.attn_input, None, shared)
    grad_TD = precision.grad(start_gather(grad.values_ND, tp).wait(), grad.amax)
    qkv_input = _start_entering(attn_norm, shared)
    norms, normed_qk_TR = attn.head_norms, attention.normed_qk
    if norms is not None and normed_qk_TR is None:
        normed_qk_TR = _rotate(layer, attention.qkv, shared)
    q, k, v = _heads(layer, attention.qkv, normed_qk_TR, places.batch)
    wait_for_kv = start_gather_keys(k, v, attn.cp)
    grad_attn_BSHK = linear_input_grad(grad_TD, weights.o).view(attention.out.shape)
    grad_q, wait_for_grad_kv = context_attention_backward(
        grad_attn_BSHK, q, *wait_for_kv(), attention.out, attention.lse, attn.cp, documents=places.documents
    )
    o_input_TI = attention.o_input
    if o_input_TI is None:
        o_input_TI = precision.input(attention.out.view(len(attention.qkv), -1))
    weight_grads.add(attn.o_proj, grad_TD, o_input_TI)
    positions_T, amax = places.positions_BL.flatten(), precision.new_amax(grad.values_ND)
    rotation = shared.rope.cos, shared.rope.sin, positions_T
    if norms is None:
        uncast_TC = gather_unrotate(grad_q, *wait_for_grad_kv(), *rotation, amax=amax)
    else:
        uncast_TC = norm_rope_backward(
            grad_q, *wait_for_grad_kv(), attention.qkv, norms, *rotation,
            grad_query_K=grad_of(norms.query_K), grad_key_K=grad_of(norms.key_K), amax=amax,
        )  # fmt: skip
    if attn.qkv_proj.bias is not None:  # not postponed: one pass over what has just been written, and not yet rounded
        accumulate_bias_grad(grad_of(attn.qkv_proj.bias), uncast_TC)
    grad_qkv_TC = precision.grad(uncast_TC, amax)
    del uncast_TC  # else it would live beside its cast
    reducing = start_reduce(linear_input_grad(grad_qkv_TC, weights.qkv), tp)
    weight_grads.add(attn.qkv_proj, grad_qkv_TC, qkv_input())
    return _norm_backward(norm, reducing.wait(), saved.attn_input, attn_norm.rstd, grad, shared)


def _enter(normed: Normed, shared: Shared) -> tuple[Factor, Normed]:
    """(the input of a column-parallel linear, of all T tokens; what to keep of `normed`)."""
    x_TD = _start_entering(normed, shared)()
    if not shared.precision.fp8 or shared.tp.shares_tokens:  # then the N tokens are kept uncast, and gathered again
        return x_TD, normed
    return x_TD, Normed(for_later(x_TD), normed.rstd)


def _start_entering(normed: Normed, shared: Shared) -> Callable[[], Factor]:
    """Starts to gather a normed input, unless it is cast already; the returned function waits, and casts it once."""
    out = normed.out
    if not isinstance(out, Tensor):
        return lambda: out
    gathering = start_gather(out, shared.tp)
    return cache(lambda: shared.precision.input(gathering.wait(), normed.amax))


def _norm(norm: RMSNorm, stream_ND: Tensor, residual_ND: Tensor | None, shared: Shared) -> tuple[Tensor, Normed]:
    """(stream + residual, its norm); the same bits from the two tensors as from their rounded sum."""
    amax = _amax_of_stream(stream_ND, shared)
    out, summed, rstd = rms_norm_forward(stream_ND, norm.weight.detach(), norm.eps, residual_TD=residual_ND, amax=amax)
    return summed, Normed(out, rstd, amax)


def _norm_backward(
    norm: RMSNorm, grad_out_ND: Tensor, summed_ND: Tensor, rstd: Tensor, grad_residual: StreamGrad, shared: Shared
) -> StreamGrad:
    """The gradient of what was normed."""
    amax = _amax_of_stream(grad_out_ND, shared)
    grad_ND = rms_norm_backward(
        grad_out_ND, summed_ND, norm.weight.detach(), rstd,
        grad_weight_D=grad_of(norm.weight), grad_residual_TD=grad_residual.values_ND, amax=amax,
    )  # fmt: skip
    return StreamGrad(grad_ND, amax)


def _amax_of_stream(stream_ND: Tensor, shared: Shared) -> Tensor | None:
    """None under sequence parallelism: the cast covers all ranks' tokens, and no rank knows their largest magnitude."""
    return None if shared.tp.shares_tokens else shared.precision.new_amax(stream_ND)


def _rotate(layer: DecoderLayer, qkv_TC: Tensor, shared: Shared) -> Tensor | None:
    """Rotates the queries and keys of fused rows in place; with `qk_norm` it leaves them as they are and returns them
    normed and rotated (T, (H + G) K)."""
    attn, norms = layer.self_attn, layer.self_attn.head_norms
    rotation = shared.rope.cos, shared.rope.sin, shared.places.positions_BL.flatten()
    if norms is None:
        rotated = attn.num_heads + attn.num_kv_heads
        apply_rope_(qkv_TC, *rotation, num_rotated=rotated, head_dim=attn.head_dim)
        return None
    return norm_rope_forward(qkv_TC, norms, *rotation, num_heads=attn.num_heads, num_kv_heads=attn.num_kv_heads)


def _heads(
    layer: DecoderLayer, qkv_TC: Tensor, normed_qk_TR: Tensor | None, batch: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(B, H, S, K), (B, G, S, K), (B, G, S, K) views of fused rows, or of `normed_qk_TR` for queries and keys."""
    attn = layer.self_attn
    heads, kv_heads = attn.num_heads, attn.num_kv_heads
    split = qkv_TC.view(batch, -1, heads + 2 * kv_heads, attn.head_dim).transpose(1, 2)
    q, k, v = split.split([heads, kv_heads, kv_heads], dim=1)
    if normed_qk_TR is not None:
        q, k = normed_qk_TR.view(batch, -1, heads + kv_heads, attn.head_dim).transpose(1, 2).split([heads, kv_heads], 1)
    return q, k, v
