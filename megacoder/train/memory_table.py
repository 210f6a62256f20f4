"""Where a rank's memory goes, by kind: what persists between steps by its tensors' sizes, the rest as measured.

Activations are in no tensor whose size could be read. On a GPU they are the allocator's peak less what persists; on a
CPU, whose allocator counts only under the profiler, the largest growth within a profiled step. Both include
temporaries, such as the logits of a chunk; the part that is kept for backwards follows from the layout, as
`megacoder plan` counts it, and is shown beside.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.profiler import profile

from megacoder.core.memory import peak_process_memory
from megacoder.train.engine import Engine
from megacoder.train.layout import Layout, LayoutRequest
from megacoder.train.planning.job import Job, Variant
from megacoder.train.planning.memory import kept_for_backwards
from megacoder.train.planning.pipelines import Pipeline

__all__ = ["ACTIVATIONS", "MemoryRow", "kept_activations", "largest_growth", "process_row", "standing_rows"]

ACTIVATIONS = "activations and workspaces"
"""The kind of memory of which a part is kept for backwards, given by a formula."""


@dataclass(frozen=True, kw_only=True)
class MemoryRow:
    """One kind of memory."""

    kind: str
    num_bytes: int
    how: str
    """what the figure is"""


def standing_rows(engine: Engine) -> list[MemoryRow]:
    """What persists between steps."""
    flat, held = engine.flat, engine.optimizer.held()
    return [
        MemoryRow(kind="weights", num_bytes=flat.weight.nbytes, how=_name(flat.weight.dtype)),
        MemoryRow(kind="gradients", num_bytes=flat.grad.nbytes, how=_name(flat.grad.dtype)),
        MemoryRow(
            kind="master weights and moments" if len(held) > 2 else "moments",
            num_bytes=sum(tensor.nbytes for tensor in held),
            how=", ".join(_described(held, flat.num_shards)),
        ),
    ]


def kept_activations(request: LayoutRequest, layout: Layout, *, pp_rank: int, itemsize: int) -> int | None:
    """Peak bytes that a rank keeps for backwards, with elements of `itemsize` bytes, as they are planned; None for
    plain blocks, where autograd decides."""
    if request.execution.block == "plain":
        return None
    job = Job(
        model=request.model, seq_length=request.seq_length, global_batch_size=request.global_batch_size,
        itemsize=itemsize,
    )  # fmt: skip
    return kept_for_backwards(job, Variant.of(request, layout.dims), Pipeline(layout), pp_rank)


def largest_growth(recorded: profile) -> int:
    """The most by which torch's CPU memory grew while a profile with `profile_memory` was recorded."""
    assert recorded.profiler is not None
    assert recorded.profiler.kineto_results is not None
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    in_order = sorted(events, key=lambda event: event.start_ns())
    changes = (event.nbytes() for event in in_order)  # type: ignore[attr-defined]
    return max(itertools.accumulate(changes, initial=0))


def process_row() -> MemoryRow:
    """The peak of the whole process so far, Python and libraries included."""
    return MemoryRow(kind="whole process", num_bytes=peak_process_memory(), how="ru_maxrss, its peak")


def _described(held: list[Tensor], num_shards: int) -> Iterator[str]:
    yield "float32"
    if held[0].dtype == torch.int16:
        yield "of master weights the 16 bits that bf16 lacks"
    if num_shards > 1:
        yield f"this rank's share of {num_shards}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
