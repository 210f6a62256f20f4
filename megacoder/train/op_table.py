"""Each op of a step by itself, at the shapes of a run: the time it takes, and how close that is to a limit.

An op that computes little is bound by memory: its row counts the bytes that must move, each input read once and each
output written once, and its rate is compared with a copy's (`megacoder.core.rates.copy_rate`). A rate above the copy's
means that caches held the data. Matrix products and attention are compared with one large matrix product instead.

Legend: B sequences, S tokens each, T = B * S of this rank, N of them in the residual stream, D model dim, C fused QKV
dim, F feed-forward dim, H query heads, G key-value heads, K head dim, W output rows; all but D are this rank's share.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from megacoder.core.timing import median_seconds
from megacoder.model.config import ModelConfig
from megacoder.ops.adamw import (
    AdamWConfig,
    adamw_,
    adamw_with_scalars_,
    scalars_stay_on_device,
    sum_of_squares,
    update_scalars,
)
from megacoder.ops.attention import attention_backward, attention_forward
from megacoder.ops.cross_entropy import chunk_tokens, cross_entropy_
from megacoder.ops.linear import accumulate_weight_grad
from megacoder.ops.qk_norm import HeadNorms, norm_rope_backward, norm_rope_forward
from megacoder.ops.rms_norm import rms_norm_backward, rms_norm_forward
from megacoder.ops.rope import apply_rope_, gather_unrotate, rope_tables
from megacoder.ops.swiglu import swiglu_backward_, swiglu_forward
from megacoder.parallel.context import UNCUT, ContextParallel
from megacoder.parallel.flat import BUCKET_ELEMENTS
from megacoder.parallel.tensor import ALONE, TensorParallel

__all__ = ["OpRow", "op_table"]


@dataclass(frozen=True, kw_only=True)
class OpRow:
    """One op."""

    name: str
    shape: str
    """of its main input"""
    seconds: float
    """median of several calls"""
    moved_bytes: int | None = None
    """the least that must be read and written; None where arithmetic is the limit"""
    flops: float | None = None
    """under the causal mask; None where memory is the limit"""

    @property
    def rate(self) -> float:
        """Bytes/s or FLOP/s."""
        return (self.moved_bytes or self.flops or 0.0) / self.seconds


def op_table(
    model: ModelConfig,
    *,
    batch: int,
    sequence: int,
    dtype: torch.dtype,
    device: torch.device,
    tp: TensorParallel = ALONE,
    cp: ContextParallel = UNCUT,
    num_updated: int | None = None,
    budget_seconds: float = 0.25,
) -> list[OpRow]:
    """Every op of a microbatch of `batch` whole sequences, and of the update, as the rank at `tp` and `cp` runs them.

    Nothing is communicated: tp and cp need no groups. The optimizer's ops run on one bucket, or on `num_updated`
    elements if those are fewer. Each op is called for `budget_seconds`, at least three times.
    """
    case = _Case(model, batch, sequence, dtype, device, tp, cp, budget_seconds)
    parts = (_norm, _rope, _swiglu, _cross_entropy, _attention, _linear)
    rows = [row for part in parts for row in part(case)]
    return [*rows, *_optimizer(case, min(num_updated or model.num_params, BUCKET_ELEMENTS))]


@dataclass(frozen=True)
class _Case:
    model: ModelConfig
    batch: int
    whole_sequence: int
    dtype: torch.dtype
    device: torch.device
    tp: TensorParallel
    cp: ContextParallel
    budget_seconds: float

    @property
    def sequence(self) -> int:
        return self.whole_sequence // self.cp.size

    @property
    def tokens(self) -> int:
        return self.batch * self.sequence

    @property
    def stream_tokens(self) -> int:
        return self.tokens // (self.tp.size if self.tp.sequence_parallel else 1)

    @property
    def heads(self) -> tuple[int, int]:
        """(H, G)."""
        return self.model.local_heads(self.tp.size)

    @property
    def width(self) -> int:
        """F."""
        return self.model.local_sizes(self.tp.size).feed_forward

    def random(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(*shape, dtype=dtype or self.dtype, device=self.device)

    def row(
        self,
        name: str,
        shape: tuple[int, ...],
        call: Callable[[], object],
        *,
        moved: float | None = None,
        flops: float | None = None,
        prepare: Callable[[], object] | None = None,
    ) -> OpRow:
        seconds = median_seconds(call, self.device, prepare=prepare, budget_seconds=self.budget_seconds)
        return OpRow(
            name=name, shape=" x ".join(f"{size:,}" for size in shape), seconds=seconds,
            moved_bytes=None if moved is None else int(moved), flops=flops,
        )  # fmt: skip


def _norm(case: _Case) -> Iterator[OpRow]:
    """With the residual added, as in a layer."""
    shape = (case.stream_tokens, case.model.hidden_size)
    x_ND, residual_ND, weight_D = case.random(*shape), case.random(*shape), case.random(shape[1])
    grad_weight_D = case.random(shape[1], dtype=torch.float32)
    eps = case.model.rms_norm_eps
    _, _, rstd_N = rms_norm_forward(x_ND, weight_D, eps)
    stream = x_ND.numel() * x_ND.itemsize
    statistics = 4 * shape[0] + shape[1] * weight_D.itemsize
    yield case.row(
        "rms_norm forward", shape, lambda: rms_norm_forward(x_ND, weight_D, eps, residual_TD=residual_ND),
        moved=4 * stream + statistics,
    )  # fmt: skip
    yield case.row(
        "rms_norm backward", shape,
        lambda: rms_norm_backward(
            x_ND, x_ND, weight_D, rstd_N, grad_weight_D=grad_weight_D, grad_residual_TD=residual_ND
        ),
        moved=4 * stream + statistics + 8 * shape[1],
    )  # fmt: skip


def _rope(case: _Case) -> Iterator[OpRow]:
    """Forward: queries and keys in place, or with `qk_norm` into new rows. Backward: also gathers attention's gradients
    into fused rows, values too."""
    heads, kv_heads = case.heads
    rotated, dim = heads + kv_heads, case.model.head_dim
    qkv_TC = case.random(case.tokens, (rotated + kv_heads) * dim)
    cos, sin = (table.to(case.device) for table in rope_tables(case.whole_sequence, dim, theta=case.model.rope_theta))
    positions_T = case.cp.places(case.whole_sequence, case.device).repeat(case.batch)
    rotation, tables = (cos, sin, positions_T), 8 * case.tokens + 4 * case.sequence * dim
    queries_and_keys = case.tokens * rotated * dim * qkv_TC.itemsize
    grad_q, grad_k, grad_v = (
        case.random(case.batch, number, case.sequence, dim) for number in (heads, kv_heads, kv_heads)
    )
    moved = 2 * queries_and_keys + tables, 2 * qkv_TC.numel() * qkv_TC.itemsize + tables
    shapes = (case.tokens, rotated * dim), (case.tokens, qkv_TC.shape[1])
    if not case.model.qk_norm:
        yield case.row(
            "rope", shapes[0], lambda: apply_rope_(qkv_TC, *rotation, num_rotated=rotated, head_dim=dim), moved=moved[0]
        )
        yield case.row(
            "rope backward", shapes[1], lambda: gather_unrotate(grad_q, grad_k, grad_v, *rotation), moved=moved[1]
        )
        return
    norms = HeadNorms(case.random(dim), case.random(dim), case.model.rms_norm_eps)
    sums = case.random(2, dim, dtype=torch.float32)
    yield case.row(
        "norm and rope", shapes[0],
        lambda: norm_rope_forward(qkv_TC, norms, *rotation, num_heads=heads, num_kv_heads=kv_heads), moved=moved[0],
    )  # fmt: skip
    yield case.row(
        "norm and rope backward", shapes[1],
        lambda: norm_rope_backward(
            grad_q, grad_k, grad_v, qkv_TC, norms, *rotation, grad_query_K=sums[0], grad_key_K=sums[1]
        ),
        moved=moved[1] + queries_and_keys,
    )  # fmt: skip


def _swiglu(case: _Case) -> Iterator[OpRow]:
    shape = (case.tokens, 2 * case.width)
    gate_up_T2F, grad_TF = case.random(*shape), case.random(case.tokens, case.width)
    work_T2F = gate_up_T2F.clone()
    activation = grad_TF.numel() * grad_TF.itemsize
    yield case.row("swiglu forward", shape, lambda: swiglu_forward(gate_up_T2F), moved=3 * activation)
    yield case.row(
        "swiglu backward", shape, lambda: swiglu_backward_(grad_TF, work_T2F),
        moved=6 * activation, prepare=lambda: work_T2F.copy_(gate_up_T2F),
    )  # fmt: skip


def _cross_entropy(case: _Case) -> Iterator[OpRow]:
    """Of one chunk of tokens: the loss, and the logits overwritten by their gradient."""
    rows = case.model.padded_vocab_size // case.tp.size
    chunk = chunk_tokens(rows, case.device.type)
    shape = (min(case.tokens, chunk), rows)
    vocab = min(rows, case.model.vocab_size)
    logits_CW, labels_C = case.random(*shape), torch.randint(0, vocab, shape[:1], device=case.device)
    work_CW = logits_CW.clone()
    yield case.row(
        "cross_entropy", shape, lambda: cross_entropy_(work_CW, labels_C, vocab=vocab),
        moved=2 * logits_CW.numel() * logits_CW.itemsize + 12 * shape[0],
        prepare=lambda: work_CW.copy_(logits_CW),
    )  # fmt: skip


def _attention(case: _Case) -> Iterator[OpRow]:
    """Over whole sequences (under cp, as if the other ranks' keys had arrived); five products in the backward."""
    (heads, kv_heads), dim, length = case.heads, case.model.head_dim, case.whole_sequence
    rows = case.random(case.batch, case.sequence, heads + 2 * kv_heads, dim).transpose(1, 2)
    q, k, v = rows.split([heads, kv_heads, kv_heads], dim=1)
    if case.cp.size > 1:
        k, v = (case.random(case.batch, kv_heads, length, dim) for _ in range(2))
    chunks = case.cp.chunks(length)
    size = len(chunks[0])
    parts = [
        (slice(place * size, (place + 1) * size), slice(0, chunk.stop), chunk.start)
        for place, chunk in enumerate(chunks)
    ]
    seen = sum(chunk.stop * (chunk.stop + 1) - chunk.start * (chunk.start + 1) for chunk in chunks) / 2
    product = 2.0 * dim * seen * case.batch * heads

    def forward() -> list[tuple[Tensor, Tensor]]:
        return [
            attention_forward(q[:, :, own], k[:, :, keys], v[:, :, keys], query_start=start)
            for own, keys, start in parts
        ]

    results = forward()
    grads = [torch.randn_like(out) for out, _ in results]

    def backward() -> None:
        for (own, keys, start), (out, lse), grad in zip(parts, results, grads, strict=True):
            attention_backward(grad, q[:, :, own], k[:, :, keys], v[:, :, keys], out, lse, query_start=start)

    shape = (case.batch, heads, case.sequence, dim)
    yield case.row("attention forward", shape, forward, flops=2 * product)
    yield case.row("attention backward", shape, backward, flops=5 * product)


def _linear(case: _Case) -> Iterator[OpRow]:
    """The four matrix products of a layer, one after the other."""
    (heads, kv_heads), dim = case.heads, case.model.head_dim
    hidden, tokens = case.model.hidden_size, case.tokens
    sizes = [  # (O, I)
        ((heads + 2 * kv_heads) * dim, hidden), (hidden, heads * dim), (2 * case.width, hidden), (hidden, case.width),
    ]  # fmt: skip
    layers = [(case.random(tokens, i), case.random(o, i), case.random(tokens, o)) for o, i in sizes]
    sums = [torch.zeros(size, device=case.device) for size in sizes]

    def forward() -> None:
        for x_TI, weight_OI, _ in layers:
            x_TI @ weight_OI.t()

    def input_gradients() -> None:
        for _, weight_OI, grad_TO in layers:
            grad_TO @ weight_OI

    def weight_gradients() -> None:
        for (x_TI, _, grad_TO), sum_OI in zip(layers, sums, strict=True):
            accumulate_weight_grad(sum_OI, grad_TO, x_TI)

    flops, shape = 2.0 * tokens * sum(o * i for o, i in sizes), (tokens, hidden)
    yield case.row("a layer's linears forward", shape, forward, flops=flops)
    yield case.row("  input gradients", shape, input_gradients, flops=flops)
    yield case.row("  weight gradients", shape, weight_gradients, flops=flops)


def _optimizer(case: _Case, size: int) -> Iterator[OpRow]:
    """In fp32 the weights are their own master copy, as where one rank holds them; in bf16 see `Zero1AdamW`."""
    grad, exp_avg, exp_avg_sq, weight = (case.random(size, dtype=torch.float32) for _ in range(4))
    exp_avg_sq.square_()
    master, moved = weight, 7 * 4 * size  # read the gradient, read and write the rest
    if case.dtype != torch.float32:
        weight = master.to(case.dtype)
        if case.device.type == "cpu":
            master, moved = torch.zeros_like(weight, dtype=torch.int16), moved + (2 * 2 + 2 * 2 - 2 * 4) * size
        else:
            moved += size * weight.itemsize
    state, config = (weight, master, exp_avg, exp_avg_sq, grad), AdamWConfig()
    update = partial(adamw_, *state, config=config, lr=1e-4, step=100, grad_scale=1e-3, decayed=True)
    if scalars_stay_on_device(weight):  # as a step does it
        scalars, _ = update_scalars(
            sum_of_squares(grad), config=config, lr=1e-4, num_updates=100, num_tokens=1000, max_grad_norm=1.0,
            skip_above=math.inf,
        )  # fmt: skip
        update = partial(adamw_with_scalars_, *state, config=config, scalars=scalars, decayed=True)
    yield case.row("adamw", (size,), update, moved=moved)
    yield case.row("gradient norm", (size,), lambda: sum_of_squares(grad), moved=4 * size)
