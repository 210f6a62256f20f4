"""The time of a step: its pipeline's makespan, the data parallel exchanges that it does not hide, and the update.

The head is all in the last stage's forward, and stages hold the layers that the run would give them. Gradients are sent
during the last microbatch's backward and weights arrive during the first one's forward (see
`megacoder.parallel.buckets`); only what those do not cover is waited for.
"""

from dataclasses import dataclass

from megacoder.parallel.schedules.simulate import Costs
from megacoder.train.layout import limited_share
from megacoder.train.planning.devices import Device, Shares
from megacoder.train.planning.job import Job, Variant
from megacoder.train.planning.memory import elements_of
from megacoder.train.planning.pipelines import Pipeline
from megacoder.train.planning.work import boundary_seconds, head_seconds, layer_times, shard_link

__all__ = ["StepTime", "Throughput", "quick_seconds", "step_time", "throughput"]


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds."""

    pipeline: float
    """forwards and backwards, waiting among stages included"""
    exchange: float
    """gradients and weights among data parallel ranks, the part that nothing hides"""
    update: float
    """AdamW, the norm and clearing the gradient"""

    @property
    def total(self) -> float:
        return self.pipeline + self.exchange + self.update


@dataclass(frozen=True, kw_only=True)
class Throughput:
    """A step's time as rates."""

    tokens_per_second: float
    """of all devices"""
    tokens_per_second_per_device: float
    mfu_full: float
    """attention counted in full (PaLM)"""
    mfu_causal: float
    """attention counted under its causal mask"""


def stage_costs(job: Job, variant: Variant, pipe: Pipeline, device: Device, shares: Shares) -> Costs:
    """Seconds of each stage, as the simulator takes them."""
    layer = layer_times(job, variant, device, shares)
    head = head_seconds(job, variant, device, shares)
    layers = pipe.placement.layers_per_stage
    least = 1e-9  # a stage with no layer still takes time
    last = len(layers) - 1
    return Costs(
        forward=tuple(max(least, n * layer.forward) + (stage == last) * head for stage, n in enumerate(layers)),
        input_grad=tuple(max(least, n * layer.input_grad) for n in layers),
        weight_grad=tuple(max(least, n * layer.weight_grad) for n in layers),
        latency=boundary_seconds(job, variant, device, shares) if variant.dims.pp > 1 else 0.0,
    )


def step_time(job: Job, variant: Variant, pipe: Pipeline, device: Device, shares: Shares) -> StepTime:
    """Of an update on all ranks of `variant`."""
    costs = stage_costs(job, variant, pipe, device, shares)
    return _whole(job, variant, pipe, device, shares, costs, pipe.seconds(costs))


def quick_seconds(job: Job, variant: Variant, device: Device, shares: Shares) -> float:
    """An estimate of `step_time`, for layers split evenly and without simulating the schedule: to order many."""
    layer = layer_times(job, variant, device, shares)
    head = head_seconds(job, variant, device, shares)
    work = job.model.num_hidden_layers * (layer.forward + layer.input_grad + layer.weight_grad) + head
    p, microbatches = variant.dims.pp, variant.microbatches(job)
    hops = 2 * variant.chunks * (p - 1) * (boundary_seconds(job, variant, device, shares) if p > 1 else 0.0)
    return (microbatches + (p - 1) * _fill(job, variant)) * work / p + hops


def _fill(job: Job, variant: Variant) -> float:
    """Idle time per pipeline rank but one, in microbatches."""
    ends = {"zb-h1": (1 / 3, 1.0), "zbv": (1 / 6, 2 / 3), "dualpipev": (1 / 6, 2 / 3)}
    if variant.schedule not in ends:
        return 1 / variant.chunks
    postponed, at_once = ends[variant.schedule]  # all weight gradients
    share = limited_share(job.model, variant.recompute, tp=variant.tp, fp8=variant.fp8)
    return postponed if share is None else postponed + (at_once - postponed) * max(0.0, 1 - 1 / share)


def throughput(job: Job, variant: Variant, device: Device, seconds: float) -> Throughput:
    """Of steps that take `seconds`."""
    devices = variant.dims.world_size
    tokens = job.tokens_per_step / seconds
    peak = device.matrix_tflops * 1e12
    full, causal = (
        job.model.training_flops_per_token(job.seq_length, causal=causal) * tokens / devices / peak
        for causal in (False, True)
    )
    return Throughput(
        tokens_per_second=tokens, tokens_per_second_per_device=tokens / devices, mfu_full=full, mfu_causal=causal
    )


def _whole(
    job: Job, variant: Variant, pipe: Pipeline, device: Device, shares: Shares, costs: Costs, seconds: float
) -> StepTime:
    """Adds the longest exchange and the longest update of any rank."""
    dims = variant.dims
    shards = dims.dp * dims.cp
    link = shard_link(variant, device, shares)
    copy = device.memory_gb_per_s * 1e9 * shares.copies
    exchange = update = 0.0
    for rank, stages in enumerate(pipe.schedule.stage_map.stages):
        elements = elements_of(job, variant, pipe, rank)
        share = (shards - 1) / shards
        backward = sum(costs.input_grad[stage] + costs.weight_grad[stage] for stage in stages)
        forward = sum(costs.forward[stage] for stage in stages)
        if shards > 1:
            gradients, weights = (link.seconds(size * elements * share) for size in (4, job.itemsize))
            exchange = max(exchange, max(0.0, gradients - backward) + max(0.0, weights - forward))
        moved = elements * 4 + elements / shards * (4 + 4 + 3 * 8 + job.itemsize)
        update = max(update, moved / copy)
    return StepTime(pipeline=seconds, exchange=exchange, update=update)
