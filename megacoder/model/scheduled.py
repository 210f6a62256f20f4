"""A decoder layer's training step by hand: forward and backward halves called explicitly, no autograd.

Legend: B sequences, S tokens, T = B * S, D model dim, C fused QKV dim, F feed-forward dim. The parameters are those of
`megacoder.model.transformer.DecoderLayer`, which is the reference; `megacoder.model.stage` puts layers together.

What this buys over autograd: it chooses what is saved (`Recompute`; nothing twice), fuses residual adds into the norms,
overwrites buffers in place, and adds every weight gradient straight into `param.grad`, which is a view of the flat fp32
buffer. Weight gradients go through `WeightGradients`, so that a pipeline schedule can postpone them behind the input
gradients of other microbatches.

Under tensor parallelism C and F are this rank's share, and the residual stream has N tokens: T, or T / tp under
sequence parallelism. The ranks' sum of an input gradient travels while weight gradients are computed, and the normed
input, of which only this rank's tokens are kept, while the input gradient is. Under context parallelism S is what this
rank holds of every sequence; the others' keys and values travel during one product of the backward, and the gradients
of keys and values during another.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from torch import Tensor, nn

from megacoder.model.config import ModelConfig
from megacoder.model.places import Places
from megacoder.model.transformer import DecoderLayer, RMSNorm, RopeTables
from megacoder.ops.linear import accumulate_weight_grad
from megacoder.ops.rms_norm import rms_norm_backward, rms_norm_forward
from megacoder.ops.rope import apply_rope_, gather_unrotate
from megacoder.ops.swiglu import swiglu_backward_, swiglu_forward
from megacoder.parallel.context import context_attention_backward, context_attention_forward, start_gather_keys
from megacoder.parallel.layers import Linear
from megacoder.parallel.tensor import ALONE, TensorParallel, start_gather, start_reduce

__all__ = [
    "Recompute",
    "SavedLayer",
    "WeightGradients",
    "grad_of",
    "kept_bytes_per_token",
    "layer_backward",
    "layer_forward",
]

Recompute = Literal["none", "selective", "full"]
"""What a layer forms again in its backward rather than keeps. The bits of every result are the same.

Kept per token and layer, H * K being the query heads' columns (D in most models) and e the bytes of the weights' dtype;
D counts for N / T under sequence parallelism:

none       e * (4 D + C + H K + 2 F) + 4 H + 8   everything that the backward reads
selective  e * (2 D + C + H K) + 4 H             both norms and the gate-up product are formed again: the widest tensors
                                                 for one product of 2 D F multiply-adds. Attention is not run again, as
                                                 in arXiv:2205.05198, whose selection holds scores: here there are none
full       e * D                                 the layer's input alone; all of the forward but the last product runs
                                                 again, with tensor parallelism its collectives too

For D = 2048, F = 5504, C = 3 D in bf16: 54.9 kB, 24.6 kB and 4.1 kB. `kept_bytes_per_token` computes it.
"""


def kept_bytes_per_token(
    model: ModelConfig, recompute: Recompute, *, itemsize: int, tp: TensorParallel = ALONE
) -> float:
    """What one layer keeps of each of this rank's T tokens, by the formula above."""
    stream = 1 / tp.size if tp.sequence_parallel else 1.0
    heads, kv_heads = model.num_attention_heads // tp.size, max(1, model.num_key_value_heads // tp.size)
    d, f = model.hidden_size * stream, model.intermediate_size // tp.size
    hk, c = heads * model.head_dim, (heads + 2 * kv_heads) * model.head_dim
    if recompute == "full":
        return itemsize * d
    if recompute == "selective":
        return itemsize * (2 * d + c + hk) + 4 * heads
    return itemsize * (4 * d + c + hk + 2 * f) + 4 * heads + 8 * stream


class Normed(NamedTuple):
    """A norm's result."""

    out: Tensor
    """(N, D)"""
    rstd: Tensor
    """(N,) fp32"""


@dataclass(frozen=True, slots=True)
class SavedAttention:
    """What the attention half of a layer leaves; all but a "full" layer keep it."""

    qkv: Tensor
    """rotated queries and keys, values (T, C)"""
    out: Tensor
    """(B, S, H, K)"""
    lse: Tensor
    """(B, H, S) fp32"""
    mlp_input: Tensor
    """residual stream after attention (N, D)"""


@dataclass(slots=True)
class SavedLayer:
    """What one layer's forward keeps for its backward, None what that forms again; of this microbatch alone."""

    attn_input: Tensor
    """residual stream before the layer (N, D)"""
    attention: SavedAttention | None = None
    attn_norm: Normed | None = None
    mlp_norm: Normed | None = None
    gate_up: Tensor | None = None
    """(T, 2F); the backward overwrites it"""


@dataclass(slots=True)
class WeightGradients:
    """Runs weight-gradient products at once, or keeps them for `run` when `postponed` (the W of zero bubble).

    What waits is the same whatever is recomputed: what a layer formed again is kept from then on. To form the normed
    inputs a second time would need the residual stream instead, which is as large.
    """

    postponed: bool = False
    waiting: list[Callable[[], None]] = field(default_factory=list)

    def add(self, linear: Linear, grad_out_TO: Tensor, x_TI: Tensor) -> None:
        """grad += grad_out^T x, now or later; the caller must not change either tensor before then."""
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
    places: Places,
    *,
    recompute: Recompute = "none",
) -> tuple[Tensor, Tensor, SavedLayer]:
    """(stream, residual, saved): the layer's output is stream + residual, added inside the next norm."""
    mlp, tp = layer.mlp, layer.tp
    attn_input, attn_norm, attention, mlp_norm = _attention_half(layer, stream_ND, residual_ND, rope, places)
    gate_up_T2F = start_gather(mlp_norm.out, tp).wait() @ mlp.gate_up_proj.weight.detach().t()
    partial_TD = swiglu_forward(gate_up_T2F) @ mlp.down_proj.weight.detach().t()
    stream_ND = start_reduce(partial_TD, tp).wait()
    saved = SavedLayer(attn_input)
    if recompute != "full":
        saved.attention = attention
    if recompute == "none":
        saved.attn_norm, saved.mlp_norm, saved.gate_up = attn_norm, mlp_norm, gate_up_T2F
    return stream_ND, attention.mlp_input, saved


def _attention_half(
    layer: DecoderLayer,
    stream_ND: Tensor,
    residual_ND: Tensor | None,
    rope: RopeTables,
    places: Places,
) -> tuple[Tensor, Normed, SavedAttention, Normed]:
    """From the layer's input through the second norm: (input, it normed, attention, its output normed)."""
    attn, tp = layer.self_attn, layer.tp
    attn_input, attn_norm = _norm(layer.input_layernorm, stream_ND, residual_ND)
    qkv_TC = start_gather(attn_norm.out, tp).wait() @ attn.qkv_proj.weight.detach().t()
    rotated, positions_T = attn.num_heads + attn.num_kv_heads, places.positions_BL.flatten()
    apply_rope_(qkv_TC, rope.cos, rope.sin, positions_T, num_heads=rotated, head_dim=attn.head_dim)
    q, k, v = _heads(layer, qkv_TC, places.batch)
    whole_kv = start_gather_keys(k, v, attn.cp)()
    out_BSHK, lse = context_attention_forward(q, *whole_kv, attn.cp, documents=places.documents)
    partial_TD = out_BSHK.view(qkv_TC.shape[0], -1) @ attn.o_proj.weight.detach().t()
    stream_ND = start_reduce(partial_TD, tp).wait()
    mlp_input, mlp_norm = _norm(layer.post_attention_layernorm, stream_ND, attn_input)
    return attn_input, attn_norm, SavedAttention(qkv_TC, out_BSHK, lse, mlp_input), mlp_norm


def layer_backward(
    layer: DecoderLayer,
    grad_ND: Tensor,
    saved: SavedLayer,
    rope: RopeTables,
    places: Places,
    weight_grads: WeightGradients,
) -> Tensor:
    """Gradient of the layer's output -> gradient of its input; consumes `saved`."""
    attn, mlp, tp = layer.self_attn, layer.mlp, layer.tp
    attention, attn_norm, mlp_norm, gate_up_T2F = saved.attention, saved.attn_norm, saved.mlp_norm, saved.gate_up
    if attention is None:
        _, attn_norm, attention, mlp_norm = _attention_half(layer, saved.attn_input, None, rope, places)
    if mlp_norm is None:
        _, mlp_norm = _norm(layer.post_attention_layernorm, attention.mlp_input)
    grad_TD = start_gather(grad_ND, tp).wait()
    gathering = start_gather(mlp_norm.out, tp)
    grad_act_TF = grad_TD @ mlp.down_proj.weight.detach()
    if gate_up_T2F is None:
        gate_up_T2F = gathering.wait() @ mlp.gate_up_proj.weight.detach().t()
    activation_TF = swiglu_backward_(grad_act_TF, gate_up_T2F)
    reducing = start_reduce(gate_up_T2F @ mlp.gate_up_proj.weight.detach(), tp)
    weight_grads.add(mlp.down_proj, grad_TD, activation_TF)
    weight_grads.add(mlp.gate_up_proj, gate_up_T2F, gathering.wait())
    weight = layer.post_attention_layernorm.weight
    grad_ND = rms_norm_backward(
        reducing.wait(), attention.mlp_input, weight.detach(), mlp_norm.rstd,
        grad_weight_D=grad_of(weight), grad_residual_TD=grad_ND,
    )  # fmt: skip

    if attn_norm is None:
        _, attn_norm = _norm(layer.input_layernorm, saved.attn_input)
    grad_TD = start_gather(grad_ND, tp).wait()
    gathering = start_gather(attn_norm.out, tp)
    q, k, v = _heads(layer, attention.qkv, places.batch)
    wait_for_kv = start_gather_keys(k, v, attn.cp)
    grad_attn_BSHK = (grad_TD @ attn.o_proj.weight.detach()).view(attention.out.shape)
    grad_q, wait_for_grad_kv = context_attention_backward(
        grad_attn_BSHK, q, *wait_for_kv(), attention.out, attention.lse, attn.cp, documents=places.documents
    )
    weight_grads.add(attn.o_proj, grad_TD, attention.out.view(grad_TD.shape[0], -1))
    grad_qkv_TC = gather_unrotate(grad_q, *wait_for_grad_kv(), rope.cos, rope.sin, places.positions_BL.flatten())
    reducing = start_reduce(grad_qkv_TC @ attn.qkv_proj.weight.detach(), tp)
    weight_grads.add(attn.qkv_proj, grad_qkv_TC, gathering.wait())
    weight = layer.input_layernorm.weight
    return rms_norm_backward(
        reducing.wait(), saved.attn_input, weight.detach(), attn_norm.rstd,
        grad_weight_D=grad_of(weight), grad_residual_TD=grad_ND,
    )  # fmt: skip


def _norm(norm: RMSNorm, stream_ND: Tensor, residual_ND: Tensor | None = None) -> tuple[Tensor, Normed]:
    """(stream + residual, that normed); the same bits from the two as from their rounded sum."""
    out, summed, rstd = rms_norm_forward(stream_ND, norm.weight.detach(), norm.eps, residual_TD=residual_ND)
    return summed, Normed(out, rstd)


def _heads(layer: DecoderLayer, qkv_TC: Tensor, batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """(B, H, S, K), (B, G, S, K), (B, G, S, K) views of fused rows."""
    attn = layer.self_attn
    split = qkv_TC.view(batch, -1, attn.num_heads + 2 * attn.num_kv_heads, attn.head_dim).transpose(1, 2)
    q, k, v = split.split([attn.num_heads, attn.num_kv_heads, attn.num_kv_heads], dim=1)
    return q, k, v
