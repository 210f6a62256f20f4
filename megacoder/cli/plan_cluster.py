"""`megacoder plan --model 33b --device h800 --devices 512`: layouts that fit, how fast they are, why others do not.

Given the TOML file of a run, the layout that the file configures is shown among them, or why it does not work. With
`--tokens 2T` also the days and device-hours of the run, and what batch and learning rate the scaling law of
DeepSeek-LLM gives for it; without `--model` that advice alone, for every preset.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from megacoder.cli.plan_tables import show_advice, show_layouts
from megacoder.core.config import load_toml, parse_args
from megacoder.core.console import say
from megacoder.core.errors import ConfigError
from megacoder.model.kept import Recompute
from megacoder.model.presets import PRESETS, find_preset
from megacoder.parallel.schedules.draw import draw
from megacoder.parallel.schedules.simulate import simulate
from megacoder.train.config import RunConfig
from megacoder.train.planning.devices import Device, Shares, find_device
from megacoder.train.planning.job import Job, Variant
from megacoder.train.planning.memory import Memory, memory_by_rank, most_loaded
from megacoder.train.planning.scaling import Advice, advise, parse_count
from megacoder.train.planning.search import RECOMPUTES, Estimate, Found, SearchSpace, estimate, search, variant_pipeline
from megacoder.train.planning.step_time import stage_costs

__all__ = ["ClusterArgs", "main"]

_SECONDS_PER_DAY = 86_400
MOST_DEVICES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class ClusterArgs:
    """Layouts of a model on a cluster, which need not be at hand: memory, time, and why others are rejected."""

    model: str | None = None
    """1.3b, 5.7b, 6.7b, 33b, v1.5-7b, qwen2.5-1.5b, qwen2.5-7b, qwen3-1.7b, qwen3-8b, tiny, tiny-gqa, or the TOML file
    of a run, whose own layout is shown, too"""
    device: str = "h800"
    """h800, h100, h200, a100, cpu, or a TOML file that describes one"""
    devices: int = 8
    """number of devices"""
    seq: int | None = None
    """tokens per sequence; if unset, the model's own"""
    batch: int | None = None
    """sequences per update; if unset, the model's own, or the scaling law's for --tokens"""
    tokens: str | None = None
    """training tokens of the run, such as 2T or 500B: adds days, device-hours and the scaling law's advice"""
    tp: int | None = None
    """only layouts with this many tensor-parallel ranks"""
    pp: int | None = None
    """only layouts with this many pipeline-parallel ranks"""
    cp: int | None = None
    """only layouts with this many context-parallel ranks"""
    schedule: str | None = None
    """only layouts with this schedule: 1f1b, interleaved, zb-h1, zbv or dualpipev"""
    micro_batch: int | None = None
    """only layouts with this many sequences per microbatch"""
    recompute: Recompute | None = None
    """only layouts with this recomputation"""
    fp8: bool = False
    """compute the layers' matrix products in fp8"""
    dtype: Literal["bfloat16", "float32"] | None = None
    """dtype of weights and activations; if unset, the run's, or bfloat16"""
    top: int = 5
    """number of layouts to show"""
    draw: Path | None = None
    """write the best layout's pipeline as this .png or .svg"""
    json: bool = False
    """print JSON instead of tables"""


def main(argv: Sequence[str]) -> None:
    """Plans, or gives advice."""
    args = parse_args(ClusterArgs, argv, prog="megacoder plan")
    tokens = None if args.tokens is None else parse_count(args.tokens)
    if args.model is None:
        if tokens is None:
            raise ConfigError("--device and --devices need --model, a preset's name or the TOML file of a run")
        by_preset = {
            name: advise(preset.model, seq_length=preset.seq_length, tokens=tokens)
            for name, preset in PRESETS.items() if not name.startswith("tiny")
        }  # fmt: skip
        if args.json:
            print(json.dumps({name: asdict(advice) for name, advice in by_preset.items()}, indent=2))
        else:
            show_advice(by_preset)
        return
    if args.top < 1 or args.devices < 1:
        raise ConfigError(f"--top {args.top}, --devices {args.devices}: both must be at least 1")
    if args.devices > MOST_DEVICES:
        raise ConfigError(f"--devices {args.devices}: at most {MOST_DEVICES:,}; every layout is checked")
    device = find_device(args.device)
    if args.fp8 and device.fp8_tflops is None:
        raise ConfigError(f"--fp8: device {device.name} has no fp8_tflops, so no fp8 rate to plan with; leave it out")
    run = load_toml(RunConfig, Path(args.model)) if args.model.endswith(".toml") else None
    job, advice = _job(args, run, tokens)
    found = search(job, device, Shares(), num_devices=args.devices, space=_space(args, job))
    if args.draw is not None and found.fits:
        best = found.fits[0].variant
        pipe = variant_pipeline(job, best)
        draw(simulate(pipe.schedule, stage_costs(job, best, pipe, device, Shares())), args.draw)
        say(f"wrote {args.draw}" + (f": the first {pipe.schedule.num_microbatches} of {best.microbatches(job)} "
                                    "microbatches" if pipe.rounds_left_out else ""))  # fmt: skip
    own = None if run is None else _as_configured(args, run, job, device)
    report = {**_report(args, job, device, found, own, advice, tokens), "not_counted": _not_counted(args, run)}
    if args.json:
        print(json.dumps(report, indent=2))
    else:
        show_layouts(report)
    if not found.fits:
        raise ConfigError(f"no layout of {args.devices} x {device.name} works; {_nearest_miss(found)}")


def _not_counted(args: ClusterArgs, run: RunConfig | None) -> list[str]:
    """What the run does and the plan leaves out."""
    if run is None:
        return []
    left_out = []
    if run.execution.cuda_graph:
        left_out.append(
            "execution.cuda_graph = true: the graph keeps its memory, so what evaluation and update need comes on top; "
            "and no time is counted for launching kernels, with or without a graph"
        )
    if run.execution.block == "plain":
        left_out.append('execution.block = "plain": memory and time are those of the scheduled block')
    if run.execution.fp8 and not args.fp8:
        left_out.append("execution.fp8 = true: give --fp8 to plan with it")
    return left_out


def _as_configured(args: ClusterArgs, run: RunConfig, job: Job, device: Device) -> Estimate | str:
    """The run's own layout, or why it has none on so many devices. Options for all layouts hold for it, too."""
    request = replace(run.layout_request, seq_length=job.seq_length, global_batch_size=job.global_batch_size)
    try:
        variant = replace(Variant.of(request, request.check(args.devices)), fp8=args.fp8)
        return estimate(job, variant, device, Shares())
    except ConfigError as error:
        return str(error)


def _job(args: ClusterArgs, run: RunConfig | None, tokens: float | None) -> tuple[Job, Advice | None]:
    assert args.model is not None
    if run is not None:
        model, length, batch = run.model, run.data.stream.seq_length, run.global_batch_size
    else:
        preset = find_preset(args.model)
        model, length, batch = preset.model, preset.seq_length, preset.global_batch_size or 0
    length = args.seq if args.seq is not None else length
    advice = None if tokens is None else advise(model, seq_length=length, tokens=tokens)
    batch = args.batch if args.batch is not None else batch or (advice.batch_sequences if advice else 0)
    if not batch and args.batch is None:
        raise ConfigError(f"the batch of {args.model} is unpublished; give --batch, or --tokens for the law's")
    dtype = args.dtype or ("auto" if run is None else run.dtype)
    itemsize = 4 if dtype == "float32" else 2
    return Job(model=model, seq_length=length, global_batch_size=batch, itemsize=itemsize), advice


def _space(args: ClusterArgs, job: Job) -> SearchSpace:
    changes: dict[str, Any] = {"fp8": args.fp8, "tp": args.tp, "cp": args.cp, "pp": args.pp}
    for name in ("tp", "cp", "pp"):
        size = changes[name]
        if size is not None and (size < 1 or args.devices % size):
            raise ConfigError(f"--{name} {size}: {args.devices} devices are not a multiple of it")
    if args.schedule is not None:
        if args.schedule not in SearchSpace().schedules:
            raise ConfigError(f"--schedule {args.schedule!r}: expected one of {', '.join(SearchSpace().schedules)}")
        changes["schedules"] = (args.schedule,)
    if args.micro_batch is not None:
        if args.micro_batch < 1 or job.global_batch_size % args.micro_batch:
            raise ConfigError(
                f"--micro-batch {args.micro_batch}: the batch of {job.global_batch_size} is not a multiple of it"
            )
        changes["micro_batch_sizes"] = (args.micro_batch,)
    if args.recompute is not None:
        changes["recomputes"] = (args.recompute,)
    return SearchSpace(**changes)


def _report(
    args: ClusterArgs,
    job: Job,
    device: Device,
    found: Found,
    own: Estimate | str | None,
    advice: Advice | None,
    tokens: float | None,
) -> dict[str, Any]:
    own_variant = own.variant if isinstance(own, Estimate) else None
    return {
        "model": args.model, "parameters": job.model.num_params, "seq_length": job.seq_length,
        "global_batch_size": job.global_batch_size, "device": device.name, "devices": args.devices,
        "dtype": "float32" if job.itemsize == 4 else "bfloat16", "memory_gb": device.room / 1e9,
        "tried": found.num_tried, "fitting": found.num_fitting,
        "layouts": [
            {**_layout(job, fit, tokens, device), "as_configured": fit.variant == own_variant}
            for fit in found.fits[: args.top]
        ],
        "configured": None if own is None else _configured(job, own, tokens, device),
        "rejected": [
            {"reason": reason, "layouts": count, "example": found.examples[reason]}
            for reason, count in found.reasons.most_common()
        ],
        "advice": None if advice is None else asdict(advice),
    }  # fmt: skip


def _configured(job: Job, own: Estimate | str, tokens: float | None, device: Device) -> dict[str, Any]:
    """The run's own layout, or the reason why it does not work, or both if it does not fit."""
    if isinstance(own, str):
        return {"fits": False, "reason": own, "layout": None}
    needed, reason = own.largest.total, None
    if needed > device.room:
        reason = f"does not fit into memory, {needed / 1e9:.2f} GB of {device.room / 1e9:.2f} on its most loaded rank"
    layout = {**_layout(job, own, tokens, device), "as_configured": True}
    return {"fits": reason is None, "reason": reason, "layout": layout}


def _layout(job: Job, fit: Estimate, tokens: float | None, device: Device) -> dict[str, Any]:
    variant, reached, dims = fit.variant, fit.throughput, fit.variant.dims
    seconds = None if tokens is None else tokens / reached.tokens_per_second
    pipe = variant_pipeline(job, variant)
    by_recompute = {recompute: _activations(job, replace(variant, recompute=recompute), device)
                    for recompute in RECOMPUTES}  # fmt: skip
    return {
        "tp": dims.tp, "cp": dims.cp, "pp": dims.pp, "dp": dims.dp, "schedule": variant.schedule,
        "chunks": variant.chunks, "micro_batch_size": variant.micro_batch_size, "recompute": variant.recompute,
        "microbatches": variant.microbatches(job), "layers_per_stage": list(pipe.placement.layers_per_stage),
        "memory": {**_bytes(fit.largest), "activations_by_recompute": by_recompute},
        "memory_by_pipeline_rank": [_bytes(memory) for memory in fit.memory],
        "step_seconds": fit.step.total, "pipeline_seconds": fit.step.pipeline,
        "exchange_seconds": fit.step.exchange, "update_seconds": fit.step.update, **asdict(reached),
        "days": None if seconds is None else seconds / _SECONDS_PER_DAY,
        "device_hours": None if seconds is None else seconds / 3600 * dims.world_size,
    }  # fmt: skip


def _activations(job: Job, variant: Variant, device: Device) -> int:
    """Of the most loaded rank."""
    pipe = variant_pipeline(job, variant)
    return most_loaded(memory_by_rank(job, variant, pipe, device_type=device.device_type)).activations


def _bytes(memory: Memory) -> dict[str, int]:
    return {**{field.name: getattr(memory, field.name) for field in fields(memory)}, "total": memory.total}


def _nearest_miss(found: Found) -> str:
    reason = "does not fit into memory"
    if reason in found.examples:
        return f"the nearest: {found.examples[reason]}"
    return "; ".join(f"{reason} ({example})" for reason, example in list(found.examples.items())[:2]) or "see --help"
