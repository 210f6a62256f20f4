"""`megacoder profile RUN.toml`: where the time and memory of a run's steps go, on the ranks that `train` would use."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megacoder.cli.run_words import RankOptions, read_run
from megacoder.core.console import say, table
from megacoder.core.files import write_json
from megacoder.train.launch import launch_workers
from megacoder.train.memory_table import ACTIVATIONS
from megacoder.train.op_table import OpRow
from megacoder.train.phases import COMMUNICATION
from megacoder.train.profile import Profile, ProfileConfig, profile

__all__ = ["main", "show"]

PROG = "megacoder profile RUN.toml [--nproc N] [any setting of the run, as in megacoder train]"


@dataclass(frozen=True, kw_only=True)
class ProfileOptions(ProfileConfig, RankOptions):
    __doc__ = ProfileConfig.__doc__

    def __post_init__(self) -> None:
        ProfileConfig.__post_init__(self)
        RankOptions.__post_init__(self)


def main(argv: Sequence[str]) -> None:
    """RUN.toml first, then the profile's own options and dotted overrides of the run's settings."""
    run = read_run(ProfileOptions, argv, prog=PROG, absent=_absent, lists_settings=False)
    options = run.options
    if (nproc := options.ranks_to_start) is not None:
        run.config.layout(nproc)  # what cannot work is refused before any process starts
        launch_workers(["profile", *argv], nproc=nproc)
        return
    measured, is_first = profile(run.config, options)
    if is_first:
        _report(measured, options)


def _absent(options: ProfileOptions) -> dict[str, Any]:
    """A profile writes no folder, and with random tokens needs no data: the file may leave their names out."""
    return {"output": "profile", **({"data": {"train": "none", "tokenizer": "none"}} if options.synthetic else {})}


def _report(measured: Profile, options: ProfileConfig) -> None:
    if options.out is not None:
        write_json(options.out, measured.to_json())
    if options.json:
        print(json.dumps(measured.to_json(), indent=2))
    else:
        show(measured)
    if options.out is not None:
        say(f"wrote {options.out}")
    if measured.traces:
        say(f"wrote {', '.join(measured.traces)}; open it at https://ui.perfetto.dev or in chrome://tracing")


def show(measured: Profile) -> None:
    """Prints tables for a person, at most 100 columns wide."""
    run = measured.run
    schedule = f" ({run['schedule']})" if run["schedule"] is not None else ""
    blocks = f"{run['block']} blocks{' from a CUDA graph' if run['cuda_graph'] else ''}"
    print(
        f"{_count(run['parameters'])} parameters, {run['dtype']}{' and fp8' if run['fp8'] else ''}, {blocks}, "
        f"recompute {run['recompute']}\n{run['layout']}{schedule} on {run['device']}\n"
        f"{run['global_batch_size']} sequences of {run['seq_length']:,} tokens a step, {run['micro_batch_size']} at a "
        f"time, of {run['data']}; mean of {measured.steps} steps"
    )
    _show_phases(measured)
    _show_rates(measured)
    _show_memory(measured)
    if measured.ops:
        _show_ops(measured)


def _show_phases(measured: Profile) -> None:
    several, whole = measured.run["ranks"] > 1, measured.mean_step_seconds
    rows = []
    for phase in measured.phases:
        rows.append([phase.name, *_milliseconds(phase.seconds, phase.seconds / whole)])
        rows[-1] += [f"{phase.slowest_seconds * 1e3:,.2f}"] * several
        if phase.name == COMMUNICATION:
            for name, seconds in measured.operations.items():
                rows.append([f"  {name}", *_milliseconds(seconds, seconds / whole), *[""] * several])
    rows.append(["step", *_milliseconds(whole, 1.0), *[f"{measured.step_seconds * 1e3:,.2f}"] * several])
    table(
        "Time of a step" + (", mean of ranks" if several else ""),
        ["phase", "ms", "share", *["slowest rank, ms"] * several],
        rows,
    )
    print("The head's gradients count as forward; communication is the time waited, not what overlaps.")
    if measured.run["cuda_graph"]:
        print("A graph's replay is forward and backward in one and counts as forward.")


def _milliseconds(seconds: float, share: float) -> list[str]:
    return [f"{seconds * 1e3:,.2f}", f"{share:.1%}"]


def _show_rates(measured: Profile) -> None:
    rates = ", ".join(f"{_flops(use.device_flops)} {use.convention}" for use in measured.utilization)
    mfu = ", ".join(f"{use.mfu:.1%} {use.convention}" for use in measured.utilization)
    print(
        f"\n{measured.tokens_per_second:,.0f} tokens/s\n"
        f"of each device: {rates}\n"
        f"MFU: {mfu}\n"
        f"     of {_flops(measured.peak.flops / measured.run['ranks'])}, {measured.peak.source}\n"
    )


def _show_memory(measured: Profile) -> None:
    several = measured.run["ranks"] > 1
    rows = []
    for row in measured.memory:
        rows.append([row.kind, _size(row.num_bytes), row.how])
        if row.kind == ACTIVATIONS and measured.kept_by_formula is not None:
            rows.append(["  kept for backwards", _size(measured.kept_by_formula), "by formula"])
    table("Memory" + (", of the rank with most" if several else ""), ["kind", "", "what the figure is"], rows)


def _show_ops(measured: Profile) -> None:
    table(
        f"Ops at this run's shapes; a copy reaches {measured.copy_bytes / 1e9:,.1f} GB/s here, a large matrix product "
        f"{_flops(measured.matrix_flops)}",
        ["op", "shape", "moved", "ms", "rate", "share"],
        [_op_row(op, measured) for op in measured.ops],
    )
    print("Moved: the least that must be read and written. Over 100%: it came from caches.")


def _op_row(op: OpRow, measured: Profile) -> list[str]:
    milliseconds = f"{op.seconds * 1e3:,.3f}"
    if op.moved_bytes is None:
        share = op.rate / measured.matrix_flops
        return [op.name, op.shape, "", milliseconds, _flops(op.rate), f"{share:.0%} of product"]
    share = op.rate / measured.copy_bytes
    return [
        op.name,
        op.shape,
        _size(op.moved_bytes),
        milliseconds,
        f"{op.rate / 1e9:,.1f} GB/s",
        f"{share:.0%} of copy",
    ]


def _flops(rate: float) -> str:
    """In the unit that suits a CPU or a GPU."""
    return f"{rate / 1e12:,.1f} TFLOP/s" if rate >= 1e12 else f"{rate / 1e9:,.1f} GFLOP/s"


def _count(number: int) -> str:
    return next(
        (f"{number / unit:,.2f}{name}" for unit, name in ((1e9, "B"), (1e6, "M")) if number >= unit), f"{number:,}"
    )


def _size(num_bytes: int) -> str:
    unit, name = next(((u, n) for u, n in ((1e9, "GB"), (1e6, "MB")) if num_bytes >= u), (1e3, "kB"))
    return f"{num_bytes / unit:,.1f} {name}"
