"""Where the time and the memory of a run's steps go: real steps, as training makes them, under a clock.

Nothing of the run is written: no folder, no checkpoint. After the steps the model is freed, and each rank measures the
limits of its device and the ops at the run's shapes. All ranks do so at the same time, so that ranks of one machine
share memory and cores as they do in a step.
"""

import gc
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch.profiler import ProfilerActivity

from megacoder.core.console import progress
from megacoder.core.errors import ConfigError
from megacoder.core.files import replacing, why_not_writable
from megacoder.core.rates import Peak, copy_rate, known_peak, matrix_rate
from megacoder.core.timing import timer_for
from megacoder.data.prefetch import Prefetcher
from megacoder.data.stream import Batch, Batches
from megacoder.data.synthetic import SyntheticStream
from megacoder.parallel.journal import Listener
from megacoder.parallel.mesh import Mesh
from megacoder.parallel.watch import Watch
from megacoder.parallel.world import World, gather_json
from megacoder.train.config import RunConfig
from megacoder.train.engine import Engine
from megacoder.train.layout import Layout
from megacoder.train.memory_table import (
    ACTIVATIONS,
    MemoryRow,
    kept_activations,
    largest_growth,
    process_row,
    standing_rows,
)
from megacoder.train.op_table import OpRow, op_table
from megacoder.train.phases import PHASES, PhaseClock, StepTimes, TraceRanges
from megacoder.train.setup import load_tokenizer, make_engine, open_stream, resolve_dtype, start_ranks
from megacoder.train.step import run_step
from megacoder.train.utilization import Utilization, device_name, utilizations

__all__ = ["Phase", "Profile", "ProfileConfig", "profile", "profile_on"]


@dataclass(frozen=True, kw_only=True)
class ProfileConfig:
    """Measured time, utilization and memory of a run's steps; further options are settings of the run."""

    steps: int = 5
    """number of steps to measure"""
    warmup: int = 2
    """steps to run first, unmeasured"""
    synthetic: bool = False
    """use random tokens instead of the run's data, which then need not exist"""
    ops: bool = True
    """also time each op at the run's shapes"""
    trace: Path | None = None
    """write a Chrome trace of one more step to this file; several ranks write one each, with the rank in its name"""
    out: Path | None = None
    """also write the result as JSON to this file"""
    json: bool = False
    """print JSON instead of tables"""

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ConfigError(f"--steps {self.steps}: must be at least 1")
        if self.warmup < 0:
            raise ConfigError(f"--warmup {self.warmup}: must be at least 0")
        for name in ("trace", "out"):
            path = getattr(self, name)
            reason = None if path is None else why_not_writable(path)
            if reason is not None:
                raise ConfigError(f"--{name} {path}: cannot be written ({reason}); name another file")


@dataclass(frozen=True, kw_only=True)
class Phase:
    """A part of the step."""

    name: str
    seconds: float
    """per step, mean over steps and ranks"""
    slowest_seconds: float
    """of the rank with the most, mean over steps"""


@dataclass(frozen=True, kw_only=True)
class Profile:
    """What was measured, the same on every rank."""

    run: dict[str, Any]
    """what ran where"""
    steps: int
    step_seconds: float
    """mean over steps; of the rank that took longest"""
    phases: list[Phase]
    """they add up to the mean over ranks of a step"""
    operations: dict[str, float]
    """communication by collective or transfer: seconds per step, mean over steps and ranks"""
    tokens_per_second: float
    peak: Peak
    """of all devices together"""
    utilization: list[Utilization]
    memory: list[MemoryRow]
    """largest of all ranks, kind by kind"""
    kept_by_formula: int | None
    """bytes of activations kept for backwards, on the rank with most; None where there is no formula"""
    matrix_flops: float
    """measured rate of a large product, mean over devices"""
    copy_bytes: float
    """measured bytes/s of a large copy, read and written, mean over devices"""
    ops: list[OpRow]
    """of the first rank"""
    loss: float
    """of the last step"""
    traces: list[str]

    @property
    def mean_step_seconds(self) -> float:
        """What the phases add up to."""
        return sum(phase.seconds for phase in self.phases)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        plain = asdict(self)
        for row, op in zip(plain["ops"], self.ops, strict=True):
            limit = self.copy_bytes if op.moved_bytes is not None else self.matrix_flops
            row |= {"per_second": op.rate, "share": op.rate / limit}
        return plain


def profile(config: RunConfig, options: ProfileConfig) -> tuple[Profile, bool]:
    """Profiles `config` on the ranks that torchrun started, or this process alone: (profile, whether to print it)."""
    world = start_ranks(config)
    with Watch(world, timeout_seconds=config.timeout_seconds, folder=config.output):
        measured = profile_on(config, options, world)
    world.close()
    return measured, world.is_first


def profile_on(config: RunConfig, options: ProfileConfig, world: World) -> Profile:
    """The same on the ranks of `world`, all of which call it."""
    config = replace(config, dtype=resolve_dtype(config, world))
    layout = config.layout(world.size)
    mesh = Mesh(world, layout.dims, sequence_parallel=config.parallel.sequence_parallel)
    with ExitStack() as open_data:
        batches = _open_batches(config, options, mesh, open_data)
        measured = _measure_steps(config, options, layout, mesh, batches)
    gc.collect()
    if world.device.type == "cuda":
        torch.cuda.empty_cache()
    ops, rates = _measure_device(config, options, mesh, num_updated=measured.pop("num_updated"))
    return _summary(config, options, layout, world, gather_json({**measured, **rates}, world), ops)


def _open_batches(config: RunConfig, options: ProfileConfig, mesh: Mesh, open_data: ExitStack) -> Batches:
    if options.synthetic:
        order = config.data.stream
        return SyntheticStream(
            vocab_size=config.model.vocab_size, seq_length=order.seq_length,
            global_batch_size=config.global_batch_size, dp_rank=mesh.place.dp, dp_size=mesh.dims.dp,
            document_masks=order.document_masks, seed=order.seed,
        )  # fmt: skip
    for name, path in (("tokenizer", config.data.tokenizer), *(("train", prefix) for prefix in config.data.train)):
        if not path.exists() and not path.with_name(path.name + ".idx").exists():
            raise ConfigError(f"data.{name} = {str(path)!r}: not there; add --synthetic to profile with random tokens")
    tokenizer = load_tokenizer(config)
    stream = open_stream(config, tokenizer, dp_rank=mesh.place.dp, dp_size=mesh.dims.dp)
    return open_data.enter_context(Prefetcher(stream, workers=config.data_workers))


def _measure_steps(
    config: RunConfig, options: ProfileConfig, layout: Layout, mesh: Mesh, batches: Batches
) -> dict[str, Any]:
    """This rank's figures, as plain values; the model is freed when it returns."""
    world = mesh.world
    engine = make_engine(config, layout, mesh)
    clock = PhaseClock(timer_for(world.device))
    total = options.warmup + options.steps
    with progress("profile", total, quiet=not world.is_first) as bar:
        for number in range(1, options.warmup + 1):
            run_step(engine, batches, config, number)
            bar.update(number, "warming up")
        if world.device.type == "cuda" and not config.execution.cuda_graph:
            torch.cuda.reset_peak_memory_stats()  # a graph allocates all its memory in the warm-up, which must count
        with _listening(world, clock):
            for number in range(options.warmup + 1, total + 1):
                clock.begin_step()
                result = run_step(engine, batches, config, number)
                bar.update(number, f"loss {result.loss:.3f}")
            clock.end()
    memory = standing_rows(engine)
    if world.device.type == "cuda":
        memory += _allocated_rows(standing_bytes=sum(row.num_bytes for row in memory))
    path = options.trace and _of_rank(options.trace, world)
    if path is not None or world.device.type == "cpu":
        growth = _trace_step(engine, batches, config, total + 1, path)
        if world.device.type == "cpu":
            how = "largest growth of torch's memory in a step"
            memory += [MemoryRow(kind=ACTIVATIONS, num_bytes=growth, how=how), process_row()]
    return {
        "steps": [asdict(step) for step in clock.steps()],
        "memory": [asdict(row) for row in memory],
        "kept": kept_activations(
            config.layout_request, layout, pp_rank=mesh.place.pp, itemsize=engine.flat.weight.itemsize
        ),
        "loss": result.loss,
        "trace": path and str(path),
        "num_updated": engine.optimizer.exp_avg.numel(),
    }


def _allocated_rows(*, standing_bytes: int) -> list[MemoryRow]:
    """What torch's GPU allocator has counted since its peak was reset."""
    peak, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    return [
        MemoryRow(kind=ACTIVATIONS, num_bytes=peak - standing_bytes, how="peak allocated, less the above"),
        MemoryRow(kind="peak allocated", num_bytes=peak, how="torch.cuda.max_memory_allocated"),
        MemoryRow(kind="reserved", num_bytes=reserved, how="by torch's allocator"),
    ]


@contextmanager
def _listening(world: World, listener: Listener) -> Iterator[None]:
    world.journal.listener = listener
    try:
        yield
    finally:
        world.journal.listener = None


class _Kept:
    """Keeps batches alive: torch's profiler complains if memory allocated before it is freed while it records."""

    def __init__(self, batches: Batches) -> None:
        self._batches = batches
        self._kept: list[Batch] = []

    def next_batch(self) -> Batch:
        self._kept.append(self._batches.next_batch())
        return self._kept[-1]


def _trace_step(engine: Engine, batches: Batches, config: RunConfig, number: int, path: Path | None) -> int:
    """One more step under torch's profiler, written to `path`; the most by which CPU memory grew in it."""
    world, batches = engine.mesh.world, _Kept(batches)
    on_gpu = world.device.type == "cuda"
    if not on_gpu:
        os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else Kineto prints on stderr when it starts and stops
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    ranges = TraceRanges()
    with torch.profiler.profile(activities=activities, profile_memory=not on_gpu) as recorded:
        with _listening(world, ranges):
            run_step(engine, batches, config, number)
            ranges.end()
        if on_gpu:
            torch.cuda.synchronize()
    if path is not None:
        with replacing(path) as temporary:
            recorded.export_chrome_trace(str(temporary))
    return 0 if on_gpu else largest_growth(recorded)


def _of_rank(path: Path, world: World) -> Path:
    """`trace.json`, or `trace-rank-3.json` where there are several."""
    stem, dot, rest = path.name.partition(".")
    return path if world.size == 1 else path.with_name(f"{stem}-rank-{world.rank}{dot}{rest}")


def _measure_device(
    config: RunConfig, options: ProfileConfig, mesh: Mesh, *, num_updated: int
) -> tuple[list[OpRow], dict[str, float]]:
    """The ops at the run's shapes and this device's rates."""
    device, dtype = mesh.world.device, getattr(torch, config.dtype)
    mesh.world.journal.at("measuring the device")
    rates = {"matrix_flops": matrix_rate(device, dtype), "copy_bytes": copy_rate(device)}
    if not options.ops:
        return [], rates
    ops = op_table(
        config.model, batch=config.micro_batch_size, sequence=config.data.stream.seq_length,
        dtype=dtype, device=device, tp=mesh.tp, cp=mesh.cp, num_updated=num_updated,
    )  # fmt: skip
    return ops, rates


def _summary(
    config: RunConfig, options: ProfileConfig, layout: Layout, world: World, ranks: list[dict[str, Any]],
    ops: list[OpRow],
) -> Profile:  # fmt: skip
    """All ranks' figures as one."""
    steps = [[StepTimes(**step) for step in rank["steps"]] for rank in ranks]
    step_seconds = max(mean(step.seconds for step in rank) for rank in steps)
    measured = mean(rank["matrix_flops"] for rank in ranks)
    peak = known_peak(device_name(world.device), getattr(torch, config.dtype))
    if peak is None:
        peak = Peak(measured, f"the {config.dtype} matrix rate measured here")
    tokens_per_second = config.global_batch_size * config.data.stream.seq_length / step_seconds
    return Profile(
        run=_describe(config, options, layout, world),
        steps=options.steps, step_seconds=step_seconds,
        phases=_phases(steps), operations=_operations(steps),
        tokens_per_second=tokens_per_second, peak=Peak(peak.flops * world.size, peak.source),
        utilization=utilizations(
            config.model, config.data.stream.seq_length, tokens_per_second=tokens_per_second,
            num_devices=world.size, device_peak=peak.flops,
        ),
        memory=[
            max((MemoryRow(**row) for row in rows), key=lambda row: row.num_bytes)
            for rows in zip(*(rank["memory"] for rank in ranks), strict=True)
        ],
        kept_by_formula=max((rank["kept"] for rank in ranks), default=None) if ranks[0]["kept"] is not None else None,
        matrix_flops=measured, copy_bytes=mean(rank["copy_bytes"] for rank in ranks), ops=ops,
        loss=ranks[0]["loss"], traces=[rank["trace"] for rank in ranks if rank["trace"] is not None],
    )  # fmt: skip


def _phases(ranks: list[list[StepTimes]]) -> list[Phase]:
    found = {phase for steps in ranks for step in steps for phase in step.phases}
    phases = []
    for name in PHASES:
        if name in found:
            means = [mean(step.phases.get(name, 0.0) for step in steps) for steps in ranks]
            phases.append(Phase(name=name, seconds=mean(means), slowest_seconds=max(means)))
    return phases


def _operations(ranks: list[list[StepTimes]]) -> dict[str, float]:
    steps = [step for rank in ranks for step in rank]
    names = sorted({name for step in steps for name in step.operations})
    return {name: mean(step.operations.get(name, 0.0) for step in steps) for name in names}


def _describe(config: RunConfig, options: ProfileConfig, layout: Layout, world: World) -> dict[str, Any]:
    return {
        "parameters": config.model.num_params,
        "layout": str(layout.dims),
        "schedule": layout.schedule.name if layout.dims.pp > 1 else None,
        "ranks": layout.dims.world_size,
        "device": device_name(world.device),
        "dtype": config.dtype,
        "block": config.execution.block,
        "recompute": config.execution.recompute,
        "fp8": config.execution.fp8,
        "cuda_graph": config.execution.cuda_graph,
        "seq_length": config.data.stream.seq_length,
        "micro_batch_size": config.micro_batch_size,
        "global_batch_size": config.global_batch_size,
        "data": "random tokens" if options.synthetic else ", ".join(map(str, config.data.train)),
        "torch": torch.__version__,
    }
