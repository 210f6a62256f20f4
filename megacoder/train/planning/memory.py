"""Bytes that each rank of a pipeline needs, by kind.

Weights, gradients and optimizer state are the flat buffers' own arithmetic (`megacoder.parallel.flat`), to the byte but
for which parameters share a bucket. Activations are what layers keep by `megacoder.model.scheduled.Recompute`, times
the microbatches that the schedule holds on this rank at its worst moment. Buffers are what one layer's backward or a
chunk of logits needs for a moment, and what travels between stages.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

from megacoder.model.config import ModelConfig
from megacoder.model.scheduled import kept_bytes_per_token, kept_weight_bytes
from megacoder.ops.cross_entropy import CHUNK_ELEMENTS
from megacoder.parallel.flat import ALIGNMENT
from megacoder.train.planning.job import Job, Variant
from megacoder.train.planning.pipelines import Pipeline

__all__ = ["Memory", "least_memory", "local_elements", "rank_memory"]


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one rank."""

    weights: int
    gradients: int
    """fp32"""
    optimizer: int
    """this rank's share of fp32 master weights and moments"""
    activations: int
    """kept for backwards, at the most"""
    buffers: int
    """for a moment: a layer's backward, a chunk of logits, what travels between stages"""

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))


def rank_memory(job: Job, variant: Variant, pipe: Pipeline, rank: int, *, device_type: str = "cuda") -> Memory:
    """Of pipeline rank `rank`; its tensor, context and data parallel peers need the same."""
    stages, placement = pipe.schedule.stage_map.stages[rank], pipe.placement
    shards = variant.dims.dp * variant.dims.cp
    elements = local_elements(
        job.model, variant,
        layers=sum(len(placement.layers(stage)) for stage in stages),
        embedding=any(map(placement.has_embedding, stages)), head=any(map(placement.has_head, stages)),
    )  # fmt: skip
    is_own_master = job.itemsize == 4 and shards == 1
    return Memory(
        weights=elements * job.itemsize, gradients=elements * 4,
        optimizer=elements // shards * (8 if is_own_master else 12),
        activations=_activations(job, variant, pipe, rank),
        buffers=_buffers(job, variant, pipe, rank, device_type=device_type),
    )  # fmt: skip


def least_memory(job: Job, variant: Variant) -> float:
    """Bytes below which the rank that needs most cannot be, without a schedule's list: to rule many out."""
    model, dims = job.model, variant.dims
    elements = model.num_params / (dims.tp * dims.pp)
    shards = dims.dp * dims.cp
    state = 8 if job.itemsize == 4 and shards == 1 else 12
    standing = elements * (job.itemsize + 4 + state / shards)
    microbatches, p, v = variant.microbatches(job), dims.pp, variant.chunks
    live = {"interleaved": (2 * (p - 1) + (v - 1) * p + 1) / v}.get(variant.schedule, float(p))
    kept = kept_bytes_per_token(model, variant.recompute, itemsize=job.itemsize, tp=variant.tp, fp8=variant.fp8)
    return standing + min(live, microbatches) * model.num_hidden_layers / p * variant.tokens(job) * kept


def local_elements(model: ModelConfig, variant: Variant, *, layers: int, embedding: bool, head: bool) -> int:
    """Elements of the flat buffers of a rank with so many layers, padding included."""
    tp, dim = variant.dims.tp, model.hidden_size
    heads, kv_heads = model.num_attention_heads // tp, max(1, model.num_key_value_heads // tp)
    qkv = (heads + 2 * kv_heads) * model.head_dim * dim
    others = [
        heads * model.head_dim * dim,
        2 * model.intermediate_size // tp * dim,
        model.intermediate_size // tp * dim,
    ]
    table = model.padded_vocab_size // tp * dim
    shares_tokens = tp > 1 and variant.sequence_parallel
    copies_heads = model.num_key_value_heads < tp
    ready: list[int] = []
    late: list[int] = []
    if embedding or (head and model.tie_word_embeddings):
        (late if model.tie_word_embeddings and embedding != head else ready).append(table)
    for _ in range(layers):
        (late if shares_tokens else ready).append(dim)
        (late if copies_heads else ready).append(qkv)
        ready += others[:1]
        (late if shares_tokens else ready).append(dim)
        ready += others[1:]
    if head:
        (late if shares_tokens else ready).append(dim)
        ready += [] if model.tie_word_embeddings else [table]
    shards = variant.dims.dp * variant.dims.cp
    return sum(sum(_buckets(sizes, shards=shards, bucket_elements=variant.bucket_elements)) for sizes in (ready, late))


def _buckets(sizes: Sequence[int], *, shards: int, bucket_elements: int) -> Iterator[int]:
    """As `FlatParameters` cuts them."""
    filled = 0
    for index, size in enumerate(sizes):
        filled += _round_up(size, ALIGNMENT)
        if filled >= bucket_elements or index == len(sizes) - 1:
            yield _round_up(filled, ALIGNMENT * shards)
            filled = 0


def _activations(job: Job, variant: Variant, pipe: Pipeline, rank: int) -> int:
    model, itemsize, tokens = job.model, job.itemsize, variant.tokens(job)
    per_token = kept_bytes_per_token(model, variant.recompute, itemsize=itemsize, tp=variant.tp, fp8=variant.fp8)
    casts = kept_weight_bytes(model, variant.recompute, tp=variant.tp, fp8=variant.fp8)
    whole = tokens * per_token + casts
    waiting = tokens * _waiting_bytes_per_token(job, variant)
    head = variant.rows(job) * (2 * itemsize * model.hidden_size + 4)
    return int(max(held.whole * whole + held.waiting * waiting + held.heads * head for held in pipe.held[rank]))


def _waiting_bytes_per_token(job: Job, variant: Variant) -> float:
    """What a layer's four weight gradients still read: their inputs and output gradients, of all T tokens."""
    model, tp = job.model, variant.dims.tp
    heads, kv_heads = model.num_attention_heads // tp, max(1, model.num_key_value_heads // tp)
    hk, c = heads * model.head_dim, (heads + 2 * kv_heads) * model.head_dim
    return float(job.itemsize * (4 * model.hidden_size + 3 * model.intermediate_size // tp + hk + c))


def _buffers(job: Job, variant: Variant, pipe: Pipeline, rank: int, *, device_type: str) -> int:
    model, tp, itemsize, tokens = job.model, variant.dims.tp, job.itemsize, variant.tokens(job)
    stages, stage_map = pipe.schedule.stage_map.stages[rank], pipe.schedule.stage_map
    dim, rows = model.hidden_size, variant.rows(job)
    ffn = model.intermediate_size // tp
    heads = model.num_attention_heads // tp
    copies = 4 if device_type == "cuda" else 8  # of attention's operands and their gradients
    layer = tokens * itemsize * (2 * ffn + 4 * dim + copies * heads * model.head_dim)
    if device_type == "cpu":  # scores and their gradients, under context parallelism of one of a rank's two chunks
        layer += 2 * itemsize * tokens * heads * job.seq_length // (1 if variant.dims.cp == 1 else 2)
    if variant.recompute == "full":  # the layer that is run again keeps as if nothing were recomputed
        layer += int(tokens * kept_bytes_per_token(model, "none", itemsize=itemsize, tp=variant.tp))
    elif variant.recompute == "selective":
        layer += tokens * itemsize * (2 * ffn + 2 * dim)
    whole_keys = 2 * itemsize * variant.micro_batch_size * job.seq_length * model.num_key_value_heads * model.head_dim
    layer += 0 if variant.dims.cp == 1 else 3 * whole_keys // min(tp, model.num_key_value_heads)
    head = 0
    if any(map(pipe.placement.has_head, stages)):
        columns = model.padded_vocab_size // tp
        chunk = min(tokens, max(1, CHUNK_ELEMENTS[device_type] // columns))
        head = itemsize * (chunk * columns + 2 * tokens * dim)
    crossing = sum((stage > 0) + (stage < stage_map.num_stages - 1) for stage in stages)
    return max(layer, head) + 2 * crossing * rows * dim * itemsize


def _round_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple
