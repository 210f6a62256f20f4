"""What a layer's forward and backward hold temporarily, beside what is kept: their tensors as they come and go.

The order is that of `megacoder.model.scheduled` and of the ops that it calls, line by line, since nothing else says
what is alive at a time: a tensor lives until its name is bound to another, or its function returns. Whoever changes a
tensor's lifetime there must change it here; `tools/check_plan.py` compares the two. Sizes are taken from where they are
chosen: blocks and chunks from the ops, a rank's share of a layer from the model.

CPU kernels on tiles (AMX) read and add in place. What they pack for themselves is not counted: for each thread 14 bytes
for every key and column of a head in the backward of attention, and 2 bytes for every input of a weight's 2,048 tokens.

In fp8 a layer's casts are added as if all were alive at once, which is an upper bound of about a percent of a GPU's
memory.

Legend: B sequences, S tokens of a whole one, T tokens of a microbatch on this rank, N rows of the residual stream,
D model dim, C fused QKV dim, F feed-forward dim, H query heads, G key-value heads, K head dim, P keys, e bytes an
element. All of C, F, H, G are this rank's share.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch

from megacoder.model.config import LocalSizes
from megacoder.model.kept import waiting_bytes_per_token
from megacoder.ops.attention import block_shape
from megacoder.ops.backends import candidates
from megacoder.ops.cross_entropy import chunk_tokens
from megacoder.ops.linear import WIDENED_TOKENS, partial_rows
from megacoder.parallel.context import ContextParallel
from megacoder.train.planning.job import Job, Variant

__all__ = ["Workspace"]

FP32 = 4
"""Bytes of an element of what is summed, whatever the weights' dtype."""


class _Tape:
    """Bytes held now, and the most so far."""

    def __init__(self) -> None:
        self.now = self.most = 0

    def take(self, *sizes: int) -> None:
        self.now += sum(sizes)
        self.most = max(self.most, self.now)

    def give(self, *sizes: int) -> None:
        self.now -= sum(sizes)

    def passing(self, *sizes: int) -> None:
        """Taken and given back."""
        self.take(*sizes)
        self.give(*sizes)


class _ScoreBlock(NamedTuple):
    """Queries that attention works on together, in bytes."""

    scores: int
    scores_before: int
    """those of the block before, which live until these take over their name"""
    queries: int
    """a row of K for each query"""
    keys: int
    """and for each key"""


@dataclass(frozen=True, kw_only=True)
class Workspace:
    """Of one rank's layers and one microbatch; all figures are bytes."""

    job: Job
    variant: Variant
    device_type: str = "cuda"
    cp_rank: int = 0
    """on the context axis, whose first rank has the last chunk of sequences, and so attends to the most keys"""

    @cached_property
    def stream(self) -> int:
        """The residual stream (N, D)."""
        return self.job.itemsize * self.variant.rows(self.job) * self.job.model.hidden_size

    @cached_property
    def forward(self) -> int:
        """The peak of a layer's forward, including what it keeps, without its input."""
        tape = _Tape()
        tape.take(self._casts(weights=True))
        self._attention_half(tape, adds_residual=True)
        tape.take(self._gathered, 2 * self._ffn, self._ffn)  # the input, gate and up, the activation
        self._reduce(tape)
        return tape.most

    @cached_property
    def backward(self) -> int:
        """The peak of a layer's backward, without what the forward kept and the gradient it is given."""
        return self._backward(postponed=False)

    @cached_property
    def backward_input(self) -> int:
        """The same if weight gradients are postponed: what they read stays, and they are not computed yet."""
        return self._backward(postponed=True)

    @cached_property
    def weight_gradients(self) -> int:
        """The peak while postponed weight gradients are computed."""
        dim = self.job.model.hidden_size
        return self._layer_partial(max(2 * self._local.feed_forward, self._local.qkv), dim)

    @cached_property
    def head(self) -> int:
        """The peak of norm, head and loss, including what they keep; on top of the stream that the last layer left."""
        tokens, columns = self.variant.tokens(self.job), self.job.model.padded_vocab_size // self.variant.dims.tp
        chunk = min(tokens, chunk_tokens(columns, self.device_type))
        tape = _Tape()
        tape.take(2 * self.stream, self._statistics)  # normed, and what was normed
        tape.take(self._gathered, self._tokens)  # the former of all tokens, its gradient
        tape.take(self.job.itemsize * chunk * columns)
        tape.take(self.stream if self._shares_tokens else 0)
        tape.passing(self._partial(columns, self.job.model.hidden_size))
        return tape.most

    @cached_property
    def embedding_backward(self) -> int:
        """The peak while the embedding's gradient is added, which is summed in fp32."""
        wide = FP32 * self.variant.tokens(self.job) * self.job.model.hidden_size
        copies = (self.job.itemsize != FP32) + (self.variant.dims.tp > 1)
        return self._gathered + copies * wide

    def _backward(self, *, postponed: bool) -> int:
        tape, recompute = _Tape(), self.variant.recompute
        tape.take(self._casts(weights=recompute not in ("none", "norms")))  # else the forward's are kept
        if recompute == "full":
            self._attention_half(tape, adds_residual=False)
        self._feed_forward_backward(tape, postponed=postponed)
        self._attention_half_backward(tape, postponed=postponed)
        return tape.most

    def _feed_forward_backward(self, tape: _Tape, *, postponed: bool) -> None:
        """Leaves the gradient of the stream after attention, and what postponed weight gradients read."""
        recompute = self.variant.recompute
        normed = self._normed if recompute in ("norms", "selective") else 0
        gate_up = 0 if recompute in ("none", "norms") else 2 * self._ffn
        tape.take(normed)
        tape.take(self._gathered, self._gathered)  # the output's gradient, the normed input
        tape.take(self._ffn)  # the activation's gradient
        tape.take(gate_up)
        tape.take(self._ffn)  # the activation
        self._start_reduce(tape)
        if not postponed:
            tape.passing(self._layer_partial(2 * self._local.feed_forward, self.job.model.hidden_size))
        self._end_reduce(tape)
        tape.take(self.stream)
        tape.give(self.stream, self._ffn)  # what was reduced, and the activation's gradient
        if not postponed:
            tape.give(normed, self._gathered, self._gathered, gate_up, self._ffn)

    def _attention_half_backward(self, tape: _Tape, *, postponed: bool) -> None:
        dim, local = self.job.model.hidden_size, self._local
        if self.variant.recompute in ("norms", "selective"):
            tape.take(self._normed, self._normed_qk)
        tape.take(self._gathered, self._gathered)  # the gradient of the stream, the normed input
        tape.take(self._whole_keys)  # as they arrive
        tape.take(self._per_head(self._queries))  # the gradient of attention's output
        tape.take(self._whole_keys)  # in order
        self._attention_backward(tape)
        tape.give(self._whole_keys)
        if not postponed:
            tape.passing(self._layer_partial(dim, local.attention))
        tape.take(self._qkv)
        tape.passing(self._widened_for_bias)
        self._start_reduce(tape)
        if not postponed:
            tape.passing(self._layer_partial(local.qkv, dim))
        self._end_reduce(tape)
        tape.take(self.stream)

    def _casts(self, *, weights: bool) -> int:
        """Of the inputs and output gradients of a layer's products, and of its weights, each in both layouts."""
        if not self.variant.fp8:
            return 0
        model, tp = self.job.model, self.variant.tp
        activations = waiting_bytes_per_token(model, itemsize=self.job.itemsize, tp=tp, fp8=True)
        cast = self.variant.tokens(self.job) * activations
        return int(2 * (cast + (model.local_matmul_params(tp.size) if weights else 0)))

    def _attention_half(self, tape: _Tape, *, adds_residual: bool) -> None:
        tape.take(self.stream if adds_residual else 0, self._normed)
        tape.take(self._gathered, self._qkv, self._normed_qk)
        tape.take(2 * self._whole_keys)  # as they arrive, then in order
        tape.give(self._whole_keys)
        self._attention_forward(tape)
        self._reduce(tape)
        tape.take(self.stream, self._normed)
        tape.give(self._gathered, self._whole_keys, self.stream)

    def _attention_forward(self, tape: _Tape) -> None:
        """Leaves attention's output and the log-sum-exp of its scores."""
        for queries, keys in self._spans:
            out, lse = self._per_head(queries), FP32 * self.variant.micro_batch_size * self._heads * queries
            if self.device_type == "cpu" and not self._on_tiles("attention"):
                copies, block = out + self._copied_keys(keys), self._score_block(queries, keys)
                tape.take(copies, out, lse)
                tape.passing(block.scores, block.scores_before)
                tape.take(block.scores)
                tape.passing(block.queries)
                tape.take(out)  # with heads behind tokens
                tape.give(copies, out, block.scores)
            else:
                tape.take(out, lse)
        if len(self._spans) > 1:
            tape.passing(sum(self._per_head(queries) for queries, _ in self._spans))

    def _attention_backward(self, tape: _Tape) -> None:
        """Leaves the gradients of this rank's queries, keys and values."""
        model, batch, e = self.job.model, self.variant.micro_batch_size, self.job.itemsize
        own_keys = 2 * e * self._own_key_elements
        summed = 0 if self.variant.dims.cp == 1 else 2 * FP32 * self._own_key_elements * self.variant.dims.cp
        tape.take(summed)
        before = 0
        for queries, keys in self._spans:
            query, key = self._per_head(queries), self._per_head(keys)
            shared = e * batch * self._kv_heads * keys * model.head_dim  # a gradient of keys in their own heads
            wide = FP32 * query // e
            if self.device_type == "cpu" and not self._on_tiles("attention"):
                lse, block = FP32 * batch * self._heads * queries, self._score_block(queries, keys)
                copies = query + self._copied_keys(keys) + query
                tape.take(copies)  # with heads in front of tokens
                tape.passing(wide if e == FP32 else 3 * wide)  # output times gradient
                tape.take(lse, query + 2 * key)  # the sum of that over a head, and the gradients
                tape.passing(2 * block.scores, 2 * block.scores_before)
                tape.take(2 * block.scores)
                tape.passing(block.keys)
                if self._kv_heads < self._heads:
                    for _ in ("keys", "values"):
                        tape.passing(FP32 * (key + shared) // e if e < FP32 else 0)  # summed over heads in fp32
                        tape.take(shared)
                    tape.give(2 * key)
                tape.give(copies, lse, 2 * block.scores)
            elif self.device_type == "cpu":
                tape.take(query + 2 * shared)
            else:  # kernels sum the queries' gradient in fp32
                tape.take(query + 2 * key)
                tape.passing(wide)
                tape.take(2 * shared)
                tape.give(2 * key)
            tape.give(before)
            before = 2 * shared
        if summed:
            tape.passing(sum(self._per_head(queries) for queries, _ in self._spans))  # of both chunks
            tape.take(2 * summed)  # in the order of ranks, in two steps
            tape.take(own_keys)
            tape.give(2 * summed, summed, before)

    def _on_tiles(self, op: str) -> bool:
        """Whether a CPU's kernel for it works on tiles."""
        dtype = torch.float32 if self.job.itemsize == FP32 else torch.bfloat16
        return candidates(op, "cpu", dtype)[0] == "amx"

    def _copied_keys(self, keys: int) -> int:
        """Keys and values as a CPU's attention reads them: one for each query head, heads in front of tokens."""
        is_so = self.variant.dims.cp > 1 and self._kv_heads == self._heads and keys == self.job.seq_length
        return 0 if is_so else 2 * self._per_head(keys)

    def _score_block(self, queries: int, keys: int) -> "_ScoreBlock":
        """The last block of a CPU's attention, which is the largest (see `megacoder.ops.attention`)."""
        e, together = self.job.itemsize, self.variant.micro_batch_size * self._heads
        rows, heads = block_shape(queries, keys, torch.float32 if e == FP32 else torch.bfloat16)
        heads = min(together, heads)
        keys_before = keys - rows if rows < queries else keys if heads < together else 0
        dim = self.job.model.head_dim
        return _ScoreBlock(
            e * heads * rows * keys, e * heads * rows * keys_before, e * heads * rows * dim, e * heads * keys * dim
        )

    def _reduce(self, tape: _Tape) -> None:
        self._start_reduce(tape)
        self._end_reduce(tape)

    def _start_reduce(self, tape: _Tape) -> None:
        """A product of all tokens, of which this rank gets the sum of its rows."""
        tape.take(self._tokens, self.stream if self._shares_tokens else 0)

    def _end_reduce(self, tape: _Tape) -> None:
        tape.give(self._tokens if self._shares_tokens else 0)

    @cached_property
    def _spans(self) -> tuple[tuple[int, int], ...]:
        """(queries of a sequence, keys that they may see) of each chunk that this rank holds."""
        chunks = ContextParallel(rank=self.cp_rank, size=self.variant.dims.cp).chunks(self.job.seq_length)
        return tuple((len(chunk), chunk.stop) for chunk in chunks)

    @property
    def _queries(self) -> int:
        return self.job.seq_length // self.variant.dims.cp

    def _per_head(self, tokens: int) -> int:
        """Of each query head, `tokens` of each sequence."""
        return self.job.itemsize * self.variant.micro_batch_size * self._heads * tokens * self.job.model.head_dim

    def _partial(self, rows: int, columns: int) -> int:
        """A weight gradient in bf16, where the device cannot add a product to fp32."""
        if self.device_type != "cpu" or self.job.itemsize == FP32 or self._on_tiles("weight_grad"):
            return 0
        return min(rows, partial_rows(columns)) * columns * self.job.itemsize

    def _layer_partial(self, rows: int, columns: int) -> int:
        """The same in a layer, whose fp8 products are whole and in fp32 before they are added."""
        return FP32 * rows * columns if self.variant.fp8 else self._partial(rows, columns)

    @property
    def _widened_for_bias(self) -> int:
        """Output gradients in fp32 that a CPU sums for the bias at a time."""
        if not self.job.model.qkv_bias or self.device_type != "cpu" or self.job.itemsize == FP32:
            return 0
        return FP32 * min(self.variant.tokens(self.job), WIDENED_TOKENS) * self._local.qkv

    @property
    def _shares_tokens(self) -> bool:
        return self.variant.tp.shares_tokens

    @cached_property
    def _tokens(self) -> int:
        """(T, D)."""
        return self.job.itemsize * self.variant.tokens(self.job) * self.job.model.hidden_size

    @property
    def _gathered(self) -> int:
        """The stream of all ranks' tokens, where it is gathered beside this rank's own."""
        return self._tokens if self._shares_tokens else 0

    @property
    def _statistics(self) -> int:
        return FP32 * self.variant.rows(self.job)

    @property
    def _normed(self) -> int:
        return self.stream + self._statistics

    @cached_property
    def _local(self) -> LocalSizes:
        return self.job.model.local_sizes(self.variant.dims.tp)

    @property
    def _heads(self) -> int:
        return self._local.heads

    @property
    def _kv_heads(self) -> int:
        return self._local.kv_heads

    @property
    def _qkv(self) -> int:
        return self.job.itemsize * self.variant.tokens(self.job) * self._local.qkv

    @property
    def _normed_qk(self) -> int:
        """Queries and keys, normed and rotated, where the fused rows hold them as projected."""
        return self.job.itemsize * self.variant.tokens(self.job) * self.job.model.normed_columns(self.variant.dims.tp)

    @property
    def _ffn(self) -> int:
        return self.job.itemsize * self.variant.tokens(self.job) * self._local.feed_forward

    @property
    def _own_key_elements(self) -> int:
        return self.variant.micro_batch_size * self._queries * self._kv_heads * self.job.model.head_dim

    @property
    def _whole_keys(self) -> int:
        """Keys and values of whole sequences, where ranks share sequences."""
        return 0 if self.variant.dims.cp == 1 else 2 * self.job.itemsize * self._own_key_elements * self.variant.dims.cp
