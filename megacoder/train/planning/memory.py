"""Bytes that each rank of a pipeline needs, by kind.

Weights, gradients and optimizer state are exact: the model's own parameters, made without memory, cut into buckets as
the flat buffers are. Activations are what layers keep under `megacoder.model.kept.Recompute`, times the most
microbatches that the schedule holds on this rank. Buffers are the temporaries of one layer's backward or a chunk of
logits, and what travels between stages: the peak of everything together less the peak of the activations, which may be
at another moment.
"""

from collections.abc import Iterable
from dataclasses import dataclass, fields
from functools import lru_cache
from itertools import groupby
from typing import Self

import torch

from megacoder.model.config import ModelConfig
from megacoder.model.copies import late_parameters
from megacoder.model.kept import kept_bytes_per_token, kept_weight_bytes, waiting_bytes_per_token
from megacoder.model.stage import kept_head_bytes_per_row
from megacoder.model.transformer import TransformerPart
from megacoder.parallel.context import UNCUT
from megacoder.parallel.flat import cut_buckets
from megacoder.parallel.schedules.placement import Placement
from megacoder.parallel.tensor import TensorParallel
from megacoder.parallel.zero import master_dtype
from megacoder.train.planning.job import Job, Variant
from megacoder.train.planning.pipelines import Held, Pipeline
from megacoder.train.planning.workspace import Workspace

__all__ = [
    "Memory",
    "elements_of",
    "kept_for_backwards",
    "least_memory",
    "local_elements",
    "memory_by_rank",
    "most_loaded",
    "rank_memory",
]


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one rank."""

    weights: int
    gradients: int
    """fp32"""
    optimizer: int
    """this rank's share of fp32 master weights and moments; on a CPU the bf16 weights are half of the master weights"""
    activations: int
    """kept for backwards, at the peak"""
    buffers: int
    """temporaries: of a layer's backward with its fp8 casts, a chunk of logits, what travels between stages"""

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))


def memory_by_rank(job: Job, variant: Variant, pipe: Pipeline, *, device_type: str = "cuda") -> tuple[Memory, ...]:
    """Of every pipeline rank."""
    return tuple(rank_memory(job, variant, pipe, rank, device_type=device_type) for rank in range(variant.dims.pp))


def most_loaded(memories: Iterable[Memory]) -> Memory:
    """Of the rank that needs most."""
    return max(memories, key=lambda memory: memory.total)


def rank_memory(
    job: Job, variant: Variant, pipe: Pipeline, rank: int, *, device_type: str = "cuda", cp_rank: int = 0
) -> Memory:
    """Of pipeline rank `rank`; its tensor and data parallel peers need the same, other context parallel ones less."""
    elements, shards = elements_of(job, variant, pipe, rank), variant.dims.dp * variant.dims.cp
    space = Workspace(job=job, variant=variant, device_type=device_type, cp_rank=cp_rank)
    kept = kept_for_backwards(job, variant, pipe, rank)
    largest = _largest(_Units.of(job, variant), pipe, rank, space)
    return Memory(
        weights=elements * job.itemsize, gradients=elements * 4,
        optimizer=elements // shards * (8 + _master_itemsize(job, shards, device_type)),
        activations=kept, buffers=largest - kept,
    )  # fmt: skip


def kept_for_backwards(job: Job, variant: Variant, pipe: Pipeline, rank: int) -> int:
    """The most that pipeline rank `rank` keeps for backwards at a time."""
    return int(max(map(_Units.of(job, variant).kept, pipe.held[rank])))


def least_memory(job: Job, variant: Variant, *, device_type: str = "cuda") -> float:
    """A lower bound for the rank that needs most, in bytes; it needs no schedule, and so rules out many quickly."""
    model, dims = job.model, variant.dims
    elements = model.num_params / (dims.tp * dims.pp)
    shards = dims.dp * dims.cp
    state = 8 + _master_itemsize(job, shards, device_type)
    standing = elements * (job.itemsize + 4 + state / shards)
    microbatches, p, v = variant.microbatches(job), dims.pp, variant.chunks
    live = {"interleaved": (2 * (p - 1) + (v - 1) * p + 1) / v}.get(variant.schedule, float(p))
    kept = kept_bytes_per_token(model, variant.recompute, itemsize=job.itemsize, tp=variant.tp, fp8=variant.fp8)
    return standing + min(live, microbatches) * model.num_hidden_layers / p * variant.tokens(job) * kept


def elements_of(job: Job, variant: Variant, pipe: Pipeline, rank: int) -> int:
    """Elements of the flat buffers of pipeline rank `rank`, padding included."""
    stages, placement = pipe.schedule.stage_map.stages[rank], pipe.placement
    return local_elements(
        job.model, variant, layers=sum(len(placement.layers(stage)) for stage in stages),
        embedding=any(map(placement.has_embedding, stages)), head=any(map(placement.has_head, stages)),
    )  # fmt: skip


def local_elements(model: ModelConfig, variant: Variant, *, layers: int, embedding: bool, head: bool) -> int:
    """Elements of the flat buffers of a rank with so many layers, padding included."""
    parameters = [
        entry
        for is_layer, group in _parameters(model, variant.tp, embedding=embedding, head=head)
        for entry in group * (layers if is_layer else 1)
    ]
    shards = variant.dims.dp * variant.dims.cp
    return sum(
        elements
        for is_late in (False, True)
        for _, elements in cut_buckets(
            [size for size, late in parameters if late == is_late],
            num_shards=shards, bucket_elements=variant.bucket_elements,
        )
    )  # fmt: skip


@lru_cache(maxsize=256)
def _parameters(
    model: ModelConfig, tp: TensorParallel, *, embedding: bool, head: bool
) -> tuple[tuple[bool, tuple[tuple[int, bool], ...]], ...]:
    """(elements, whether its gradient is late) of the parameters in order, those of a layer once, beside True."""
    with torch.device("meta"):
        part = TransformerPart(model, tp, cp=UNCUT, layers=(0,), embedding=embedding, head=head)
    late = {id(param) for param in late_parameters(part)}
    grouped = groupby(part.named_parameters(), key=lambda named: named[0].startswith("layers."))
    return tuple(
        (is_layer, tuple((param.numel(), id(param) in late) for _, param in group)) for is_layer, group in grouped
    )


@dataclass(frozen=True)
class _Units:
    """Bytes of what `Held` counts."""

    whole: float
    waiting: float
    head: int

    @classmethod
    def of(cls, job: Job, variant: Variant) -> Self:
        model, tokens = job.model, variant.tokens(job)
        per_token = kept_bytes_per_token(
            model, variant.recompute, itemsize=job.itemsize, tp=variant.tp, fp8=variant.fp8
        )  # fmt: skip
        waiting = waiting_bytes_per_token(model, itemsize=job.itemsize, tp=variant.tp, fp8=variant.fp8)
        casts = kept_weight_bytes(model, variant.recompute, tp=variant.tp, fp8=variant.fp8)
        return cls(
            whole=tokens * per_token + casts, waiting=tokens * waiting,
            head=variant.rows(job) * kept_head_bytes_per_row(model, itemsize=job.itemsize),
        )  # fmt: skip

    def kept(self, held: Held) -> float:
        """For backwards."""
        return held.whole * self.whole + held.waiting * self.waiting + held.heads * self.head


def _largest(units: _Units, pipe: Pipeline, rank: int, space: Workspace) -> int:
    """The peak of what is kept for backwards and all temporaries together."""
    return int(max(
        units.kept(held) + held.boundaries * space.stream + _during(held, units, pipe.placement, space)
        for held in pipe.held[rank]
    ))  # fmt: skip


def _during(held: Held, units: _Units, placement: Placement, space: Workspace) -> float:
    """The peak within an action, beyond what is held when it begins."""
    if held.op == "W":
        return space.weight_gradients
    layers, stream, has_head = len(placement.layers(held.stage)), space.stream, placement.has_head(held.stage)
    if held.op == "F":
        left = stream * (2 if space.variant.recompute == "full" else 1)  # by a layer: its output, in two parts
        most = (layers - 1) * units.whole + (left if layers > 1 else 0) + space.forward if layers else stream
        return max(most, layers * units.whole + (left if layers else 0) + space.head) if has_head else most
    step = space.backward_input if held.op == "I" else space.backward
    freed = units.whole - (units.waiting if held.op == "I" else 0)  # by each finished layer
    before = -units.head if has_head else 0  # freed once its gradient has been through the norm
    moments = [float(stream if has_head else 0)]
    if layers:
        moments.append(before + (stream if has_head else 0) + step)  # a gradient from another stage is in `boundaries`
    moments += [before + stream - done * freed + step for done in {1, layers - 1} if 0 < done < layers]
    if placement.has_embedding(held.stage):
        moments.append(before + stream - layers * freed + space.embedding_backward)
    return max(moments)


def _master_itemsize(job: Job, shards: int, device_type: str) -> int:
    """Bytes of a master weight beside the weights."""
    dtype = master_dtype(torch.float32 if job.itemsize == 4 else torch.bfloat16, shards, device_type)
    return 0 if dtype is None else dtype.itemsize
