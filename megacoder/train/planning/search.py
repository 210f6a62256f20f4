"""Every layout of a job on a number of devices: those that fit, the fastest first, and why the others are rejected.

All layouts are checked against a lower bound of their memory and ordered by a quick estimate of their time. The
schedules of the first are simulated, action by action. Then their memory is counted rank by rank, which takes several
times as long: from the fastest on, until one way to run each layout fits. Ways that differ only in what they recompute
count as one: less recomputation is faster and needs more memory, so more of it is tried only where less does not fit.
Tensor parallel groups stay within a node: across nodes they are slower than any alternative.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from heapq import heappop, heappush
from itertools import count
from typing import get_args

from megacoder.core.errors import ConfigError
from megacoder.model.config import ModelConfig
from megacoder.model.kept import Recompute
from megacoder.parallel.context import ContextParallel
from megacoder.parallel.dims import Axis, ParallelDims
from megacoder.parallel.schedules.generators import SCHEDULES
from megacoder.train.layout import limited_share
from megacoder.train.planning.devices import Device, Shares
from megacoder.train.planning.job import Job, Variant
from megacoder.train.planning.memory import Memory, least_memory, memory_by_rank, most_loaded
from megacoder.train.planning.pipelines import Pipeline, pipeline
from megacoder.train.planning.step_time import StepTime, Throughput, quick_seconds, step_time, throughput

__all__ = ["RECOMPUTES", "Estimate", "Found", "SearchSpace", "estimate", "search", "variant_pipeline"]

RECOMPUTES: tuple[Recompute, ...] = get_args(Recompute)
"""From the fastest to the one that keeps least."""
_CHOSEN: tuple[Axis, ...] = ("tp", "cp", "pp")
_SIMULATED = 72
"""Ways to run a layout that are simulated; a quick estimate has ordered all of them before."""
_SIMULATED_FIRST = 2
"""Of each layout with each schedule, before more ways to run one are: the estimate errs more between those than within,
and all the numbers of chunks of `interleaved` would crowd out the others."""


@dataclass(frozen=True, kw_only=True)
class SearchSpace:
    """What is tried."""

    schedules: tuple[str, ...] = ("1f1b", "interleaved", "zb-h1", "zbv", "dualpipev")
    """`gpipe` is not among them: it has 1f1b's bubble and needs more memory"""
    micro_batch_sizes: tuple[int, ...] = (1, 2, 4, 8, 16)
    recomputes: tuple[Recompute, ...] = RECOMPUTES
    chunks: tuple[int, ...] = (2, 4, 6, 8, 12, 16)
    """of interleaved"""
    dims: ParallelDims | None = None
    """only this layout"""
    tp: int | None = None
    """only layouts with this size; so with the next two"""
    cp: int | None = None
    pp: int | None = None
    fp8: bool = False
    overlaps_exchange: bool = False
    stage_per_node: bool = False


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a layout needs and how fast it is."""

    variant: Variant
    memory: tuple[Memory, ...]
    """by pipeline rank"""
    step: StepTime
    throughput: Throughput

    @property
    def largest(self) -> Memory:
        """Of the rank that needs most."""
        return most_loaded(self.memory)


@dataclass(kw_only=True)
class Found:
    """What a search found."""

    fits: list[Estimate] = field(default_factory=list)
    """the fastest of each layout (tp, cp, pp) that was simulated, fastest first"""
    num_fitting: int = 0
    """of all that were tried"""
    num_tried: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    """why layouts are rejected, and how many for each reason"""
    examples: dict[str, str] = field(default_factory=dict)
    """one rejected layout for each reason; where memory is short, the nearest miss"""
    least_needed: float = float("inf")
    """bytes of that nearest miss"""


def search(job: Job, device: Device, shares: Shares, *, num_devices: int, space: SearchSpace) -> Found:
    """All layouts on `num_devices` ranks."""
    found = Found()
    promising: list[tuple[float, Variant]] = []
    for variant in _variants(job, device, found, num_devices, space):
        found.num_tried += 1
        least = least_memory(job, variant, device_type=device.device_type)
        if least > device.room:
            _too_large(found, variant, least, device.room, "at least ")
        else:
            promising.append((quick_seconds(job, variant, device, shares), variant))
    found.num_fitting = len(promising)
    ways = _few_of_each_kind_first(promising)
    for start in range(0, len(ways), _SIMULATED):
        if not found.fits:
            _simulate(job, device, shares, ways[start : start + _SIMULATED], found)
    return found


def _simulate(job: Job, device: Device, shares: Shares, ways: Iterable[Iterable[Variant]], found: Found) -> None:
    """Adds the fastest variants that fit, one of each layout. A way lists variants, each faster than the next."""
    queue: list[tuple[float, int, StepTime, Iterator[Variant], Variant]] = []
    order = count()  # of equally fast ones

    def simulate_next(rest: Iterator[Variant]) -> None:
        if (variant := next(rest, None)) is not None:
            step = step_time(job, variant, variant_pipeline(job, variant), device, shares)
            heappush(queue, (step.total, next(order), step, rest, variant))

    for way in ways:
        simulate_next(iter(way))
    fitting = set[ParallelDims]()
    while queue:
        _, _, step, rest, variant = heappop(queue)
        if variant.dims in fitting:
            continue
        estimated = _estimate(job, variant, device, step)
        if estimated.largest.total <= device.room:
            fitting.add(variant.dims)
            found.fits.append(estimated)
            continue
        found.num_fitting -= 1
        _too_large(found, variant, estimated.largest.total, device.room)
        simulate_next(rest)


def estimate(job: Job, variant: Variant, device: Device, shares: Shares) -> Estimate:
    """Of one variant, whether or not it fits; ConfigError if its stages cannot hold the layers."""
    step = step_time(job, variant, variant_pipeline(job, variant), device, shares)
    return _estimate(job, variant, device, step)


def _estimate(job: Job, variant: Variant, device: Device, step: StepTime) -> Estimate:
    memory = memory_by_rank(job, variant, variant_pipeline(job, variant), device_type=device.device_type)
    return Estimate(
        variant=variant, memory=memory, step=step, throughput=throughput(job, variant, device, step.total)
    )  # fmt: skip


def _few_of_each_kind_first(promising: list[tuple[float, Variant]]) -> list[list[Variant]]:
    """Variants that differ only in what they recompute, together; from the fastest estimate on."""
    ways: dict[Variant, list[Variant]] = {}
    for _, variant in sorted(promising, key=lambda entry: entry[0]):
        ways.setdefault(replace(variant, recompute="none"), []).append(variant)
    seen, first, rest = Counter[tuple[ParallelDims, str]](), list[list[Variant]](), list[list[Variant]]()
    for way in ways.values():
        kind = way[0].dims, way[0].schedule
        (first if seen[kind] < _SIMULATED_FIRST else rest).append(way)
        seen[kind] += 1
    return first + rest


def _too_large(found: Found, variant: Variant, needed: float, room: float, about: str = "") -> None:
    reason = "does not fit into memory"
    found.reasons[reason] += 1
    if needed < found.least_needed:
        found.least_needed = needed
        found.examples[reason] = f"{variant} needs {about}{needed / 1e9:.2f} GB of {room / 1e9:.2f}"


def variant_pipeline(job: Job, variant: Variant) -> Pipeline:
    """Its schedule with its layers."""
    share = None
    if SCHEDULES[variant.schedule].postpones:
        share = limited_share(job.model, variant.recompute, tp=variant.tp, fp8=variant.fp8)
    return pipeline(
        variant.schedule, ranks=variant.dims.pp, chunks=variant.chunks, microbatches=variant.microbatches(job),
        model=job.model, seq_length=job.seq_length, limited_share=share, layers_per_stage=variant.layers_per_stage,
    )  # fmt: skip


def _variants(job: Job, device: Device, found: Found, num_devices: int, space: SearchSpace) -> Iterator[Variant]:
    layouts = [space.dims] if space.dims is not None else _layouts(job, device, num_devices)
    for dims in layouts:
        if any(getattr(space, axis) not in (None, dims.size(axis)) for axis in _CHOSEN):
            continue
        reason = _why_not(job, device, dims)
        if reason is not None:
            found.num_tried += 1
            _reject(found, *reason)
            continue
        per_replica, stages = job.global_batch_size // dims.dp, job.model.num_hidden_layers + 2
        for micro in space.micro_batch_sizes:
            if per_replica % micro:
                continue
            if dims.tp > 1 and micro * (job.seq_length // dims.cp) % dims.tp:
                found.num_tried += 1
                _reject(found, "a microbatch's tokens do not divide by tp", f"{dims}, micro batch {micro}")
                continue
            for schedule, chunks in _schedules(dims.pp, per_replica // micro, space, most_stages=stages):
                for recompute in space.recomputes:
                    yield Variant(
                        dims=dims, schedule=schedule, chunks=chunks, micro_batch_size=micro, recompute=recompute,
                        fp8=space.fp8, overlaps_exchange=space.overlaps_exchange,
                        stage_per_node=space.stage_per_node,
                    )  # fmt: skip


def _schedules(pp: int, microbatches: int, space: SearchSpace, *, most_stages: int) -> Iterator[tuple[str, int]]:
    if pp == 1:
        yield "1f1b", 1
        return
    for schedule in space.schedules:
        fixed = SCHEDULES[schedule].num_chunks
        if fixed is None and microbatches % pp:  # interleaved's visits would be uneven, and it would hold more
            continue
        for chunks in space.chunks if fixed is None else (fixed,):
            if chunks * pp <= most_stages:
                yield schedule, chunks


def _layouts(job: Job, device: Device, num_devices: int) -> Iterator[ParallelDims]:
    """All ways to divide `num_devices`, except for sizes that are out of the question for any model."""
    sizes = [size for size in range(1, num_devices + 1) if num_devices % size == 0]
    for tp in (size for size in sizes if size <= max(64, device.devices_per_node)):
        for cp in (size for size in sizes if num_devices % (tp * size) == 0 and size <= 64):
            for pp in (size for size in sizes if num_devices % (tp * cp * size) == 0):
                if pp <= 2 * (job.model.num_hidden_layers + 2):
                    yield ParallelDims(tp=tp, cp=cp, pp=pp, dp=num_devices // (tp * cp * pp))


def _why_not(job: Job, device: Device, dims: ParallelDims) -> tuple[str, str] | None:
    """(reason, what it is in this layout)."""
    model: ModelConfig = job.model
    if dims.tp > device.devices_per_node:
        return "tp spans nodes", f"tp = {dims.tp}, a node has {device.devices_per_node} devices"
    try:
        model.check_tensor_parallel(dims.tp)
    except ConfigError as error:
        return "tp does not divide the model", str(error)
    try:
        ContextParallel(size=dims.cp).check_length(job.seq_length)
    except ConfigError as error:
        return "cp does not divide the sequence", str(error)
    if job.seq_length // dims.cp < 1024 and dims.cp > 1:
        return "cp leaves a rank fewer than 1,024 tokens of a sequence", f"{dims}: {job.seq_length // dims.cp}"
    if job.global_batch_size % dims.dp:
        return "dp does not divide the batch", f"{dims}: {job.global_batch_size} sequences"
    if dims.pp > model.num_hidden_layers + 2:
        return "more pipeline stages than layers for them", f"{dims}: {model.num_hidden_layers} layers"
    return None


def _reject(found: Found, reason: str, example: str) -> None:
    found.reasons[reason] += 1
    found.examples.setdefault(reason, example)
