"""Every layout of a job on a number of devices: those that fit, the fastest first, and why the others are rejected.

All layouts are checked against memory and ordered by a quick estimate of their time; the first of those that fit are
then simulated, action by action, and their memory counted rank by rank. Tensor parallel groups stay within a node:
across nodes they are slower than any alternative.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from megacoder.core.errors import ConfigError
from megacoder.model.config import ModelConfig
from megacoder.model.scheduled import Recompute
from megacoder.parallel.context import ContextParallel
from megacoder.parallel.dims import Axis, ParallelDims
from megacoder.train.layout import limited_share
from megacoder.train.planning.devices import Device, Shares
from megacoder.train.planning.job import Job, Variant
from megacoder.train.planning.memory import Memory, least_memory, rank_memory
from megacoder.train.planning.pipelines import Pipeline, pipeline
from megacoder.train.planning.step_time import StepTime, Throughput, quick_seconds, step_time, throughput

__all__ = ["RECOMPUTES", "Fit", "Found", "Limits", "search", "variant_pipeline"]

RECOMPUTES: tuple[Recompute, ...] = ("none", "selective", "full")
"""What is tried. "norms" is not: between "none" and "selective", it seldom is what makes a layout fit."""
_CHOSEN: tuple[Axis, ...] = ("tp", "cp", "pp")
_SIMULATED = 36
"""Variants that are simulated; a quick estimate has ordered all of them before."""
_SIMULATED_FIRST = 3
"""Of each layout, before more variants of one are: the estimate errs more between layouts than within one."""


@dataclass(frozen=True, kw_only=True)
class Limits:
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
class Fit:
    """A layout that fits."""

    variant: Variant
    memory: tuple[Memory, ...]
    """by pipeline rank"""
    step: StepTime
    throughput: Throughput

    @property
    def largest(self) -> Memory:
        """Of the rank that needs most."""
        return max(self.memory, key=lambda memory: memory.total)


@dataclass(kw_only=True)
class Found:
    """What a search found."""

    fits: list[Fit] = field(default_factory=list)
    """simulated ones, fastest first"""
    num_fitting: int = 0
    """of all that were tried"""
    num_tried: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    """why layouts are rejected, and how many for each reason"""
    examples: dict[str, str] = field(default_factory=dict)
    """one rejected layout for each reason; where memory is short, the nearest miss"""
    least_needed: float = float("inf")
    """bytes of that nearest miss"""

    def best(self, count: int) -> list[Fit]:
        """The fastest variants of the `count` fastest layouts (tp, cp, pp)."""
        chosen: dict[ParallelDims, Fit] = {}
        for fit in self.fits:
            chosen.setdefault(fit.variant.dims, fit)
        return list(chosen.values())[:count]


def search(job: Job, device: Device, shares: Shares, *, num_devices: int, limits: Limits) -> Found:
    """All layouts on `num_devices` ranks."""
    found = Found()
    room = (device.memory_gb - device.reserved_gb) * 1e9
    promising: list[tuple[float, Variant]] = []
    for variant in _variants(job, device, found, num_devices, limits):
        found.num_tried += 1
        least = least_memory(job, variant, device_type=device.device_type)
        if least > room:
            _too_large(found, variant, least, room, "at least ")
        else:
            promising.append((quick_seconds(job, variant, device, shares), variant))
    found.num_fitting = len(promising)
    for variant in _few_of_each_layout_first(promising):
        if len(found.fits) == _SIMULATED:
            break
        pipe = variant_pipeline(job, variant)
        memory = tuple(
            rank_memory(job, variant, pipe, rank, device_type=device.device_type) for rank in range(variant.dims.pp)
        )
        most = max(part.total for part in memory)
        if most > room:
            found.num_fitting -= 1
            _too_large(found, variant, most, room)
            continue
        step = step_time(job, variant, pipe, device, shares)
        reached = throughput(job, variant, device, step.total)
        found.fits.append(Fit(variant=variant, memory=memory, step=step, throughput=reached))
    found.fits.sort(key=lambda fit: fit.step.total)
    return found


def _few_of_each_layout_first(promising: list[tuple[float, Variant]]) -> list[Variant]:
    """From the fastest estimate on."""
    seen, first, rest = Counter[ParallelDims](), list[Variant](), list[Variant]()
    for _, variant in sorted(promising, key=lambda entry: entry[0]):
        (first if seen[variant.dims] < _SIMULATED_FIRST else rest).append(variant)
        seen[variant.dims] += 1
    return first + rest


def _too_large(found: Found, variant: Variant, needed: float, room: float, about: str = "") -> None:
    reason = "does not fit into memory"
    found.reasons[reason] += 1
    if needed < found.least_needed:
        found.least_needed = needed
        found.examples[reason] = f"{variant} needs {about}{needed / 1e9:.2f} GB of {room / 1e9:.2f}"


def variant_pipeline(job: Job, variant: Variant) -> Pipeline:
    """Its schedule with its layers."""
    return pipeline(
        variant.schedule, ranks=variant.dims.pp, chunks=variant.chunks, microbatches=variant.microbatches(job),
        model=job.model, seq_length=job.seq_length,
        limited_share=limited_share(job.model, variant.recompute, tp=variant.tp, fp8=variant.fp8),
    )  # fmt: skip


def _variants(job: Job, device: Device, found: Found, num_devices: int, limits: Limits) -> Iterator[Variant]:
    layouts = [limits.dims] if limits.dims is not None else _layouts(job, device, num_devices)
    for dims in layouts:
        if any(getattr(limits, axis) not in (None, dims.size(axis)) for axis in _CHOSEN):
            continue
        reason = _why_not(job, device, dims)
        if reason is not None:
            found.num_tried += 1
            _reject(found, *reason)
            continue
        per_replica, stages = job.global_batch_size // dims.dp, job.model.num_hidden_layers + 2
        for micro in limits.micro_batch_sizes:
            if per_replica % micro:
                continue
            if dims.tp > 1 and micro * (job.seq_length // dims.cp) % dims.tp:
                found.num_tried += 1
                _reject(found, "a microbatch's tokens do not divide by tp", f"{dims}, micro batch {micro}")
                continue
            for schedule, chunks in _schedules(dims.pp, per_replica // micro, limits, most_stages=stages):
                for recompute in limits.recomputes:
                    yield Variant(
                        dims=dims, schedule=schedule, chunks=chunks, micro_batch_size=micro, recompute=recompute,
                        fp8=limits.fp8, overlaps_exchange=limits.overlaps_exchange,
                        stage_per_node=limits.stage_per_node,
                    )  # fmt: skip


def _schedules(pp: int, microbatches: int, limits: Limits, *, most_stages: int) -> Iterator[tuple[str, int]]:
    if pp == 1:
        yield "1f1b", 1
        return
    for schedule in limits.schedules:
        if schedule == "interleaved":
            if microbatches % pp == 0:  # else its visits are uneven, and it holds more
                yield from ((schedule, chunks) for chunks in limits.chunks if chunks * pp <= most_stages)
        elif schedule not in ("zbv", "dualpipev"):
            yield schedule, 1
        elif 2 * pp <= most_stages:
            yield schedule, 2


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
