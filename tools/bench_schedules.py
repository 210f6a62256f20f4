"""How long the ranks of each pipeline schedule idle: measured, predicted, published.

    python tools/bench_schedules.py --out tools/results/schedules_cpu.json

Stages sleep instead of computing, so that four ranks run at full speed on two cores; the program, the runner and
gloo are real. Each stage sleeps 20 ms for F, I and W of a microbatch, and half of that where a rank has two chunks, so
that every schedule has the same work. A rank's idle time is the step, from the first rank's start to the last one's
end, less its own sleep.

Predicted is the simulation without transfer times. Published is the formula of the paper, named in
`megacoder.parallel.schedules.generators`; DualPipeV's counts a pair of forward and backward as one block that delivers
at its end, which the runner does not wait for.
"""

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from bench_common import machine, write_record
from ranks import RankPool

from megacoder.core.config import parse_args
from megacoder.core.console import say, table
from megacoder.parallel.collectives import barrier
from megacoder.parallel.pipeline import PipelineRunner
from megacoder.parallel.schedules.generators import SCHEDULES, build_schedule
from megacoder.parallel.schedules.program import build_program
from megacoder.parallel.schedules.schedule import Schedule
from megacoder.parallel.schedules.simulate import Costs, simulate
from megacoder.parallel.world import World


@dataclass(frozen=True, kw_only=True)
class Options:
    """Idle time of pipeline schedules on ranks that sleep."""

    schedules: tuple[str, ...] = tuple(SCHEDULES)
    """by the names that `parallel.schedule` takes"""
    ranks: int = 4
    """pipeline ranks"""
    microbatches: tuple[int, ...] = (8, 16)
    """per step"""
    milliseconds: float = 20.0
    """of F, of I and of W, of all that a rank holds"""
    rounds: int = 5
    """steps of each schedule, in turns"""
    out: Path | None = None
    """JSON file to write"""
    json: bool = False
    """print JSON instead of a table"""


class SleepingStage:
    """Takes time, and passes on a tensor of a few kilobytes."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.slept = 0.0

    def new_boundary(self, microbatch: Any) -> torch.Tensor:
        return torch.empty(1024)

    def forward(self, x: torch.Tensor | None, microbatch: Any) -> tuple[torch.Tensor, None]:
        self._sleep(1)
        return torch.zeros(1024), None

    def backward(self, grad: torch.Tensor | None, saved: Any) -> torch.Tensor:
        self._sleep(2)
        return torch.zeros(1024)

    def backward_input(self, grad: torch.Tensor | None, saved: Any) -> tuple[torch.Tensor, Callable[[], None]]:
        self._sleep(1)
        return torch.zeros(1024), lambda: self._sleep(1)

    def _sleep(self, times: int) -> None:
        begin = time.perf_counter()
        time.sleep(times * self.seconds)
        self.slept += time.perf_counter() - begin


def run_on_rank(world: World, names: tuple[str, ...], options: Options, count: int) -> dict[str, list[Any]]:
    """(begin, end, slept) of every step, by schedule; schedules take turns."""
    runs: dict[str, tuple[PipelineRunner, list[SleepingStage]]] = {}
    for name in names:
        schedule = build_schedule(name, num_ranks=world.size, num_microbatches=count)
        stages = [SleepingStage(_seconds(schedule, options)) for _ in range(schedule.num_chunks)]
        runs[name] = PipelineRunner(build_program(schedule), stages, world.group), stages
    found: dict[str, list[Any]] = {name: [] for name in names}
    for _ in range(options.rounds):
        for name, (runner, stages) in runs.items():
            before = sum(stage.slept for stage in stages)
            barrier(world.group)
            begin = time.perf_counter()
            runner.run(range(count))
            end = time.perf_counter()
            found[name].append((begin, end, sum(stage.slept for stage in stages) - before))
    return found


def _seconds(schedule: Schedule, options: Options) -> float:
    return options.milliseconds / 1000 / schedule.num_chunks


def published_idle(name: str, ranks: int) -> float:
    """Of every rank, in units of the F (= I = W) of all that a rank holds."""
    forward = input_grad = weight_grad = 1.0
    backward, both = input_grad + weight_grad, forward + input_grad + weight_grad
    chunks = build_schedule(name, num_ranks=ranks, num_microbatches=1).num_chunks
    times = {
        "gpipe": forward + backward,
        "1f1b": forward + backward,
        "interleaved": forward + backward,
        "zb-h1": forward + input_grad - weight_grad,
        "zbv": forward,
        "dualpipev": both + backward - 3 * weight_grad,
    }
    return (ranks - 1) * times[name] / chunks


def rows_of(pool: RankPool, options: Options, count: int) -> list[dict[str, Any]]:
    """One row by schedule."""
    steps = 3 * options.milliseconds / 1000 * count * options.rounds * len(options.schedules)
    by_rank = pool.run(options.ranks, run_on_rank, options.schedules, options, count, timeout_seconds=60 + 10 * steps)
    rows = []
    for name in options.schedules:
        schedule = build_schedule(name, num_ranks=options.ranks, num_microbatches=count)
        line = simulate(schedule, Costs.uniform(schedule.stage_map.num_stages))
        shares, seconds = [], []
        for step in zip(*(found[name] for found in by_rank), strict=True):
            seconds.append(max(end for _, end, _ in step) - min(begin for begin, _, _ in step))
            shares.append(1 - statistics.mean(slept for _, _, slept in step) / seconds[-1])
        published = published_idle(name, options.ranks)
        rows.append(
            {
                "schedule": name,
                "microbatches": count,
                "seconds": round(statistics.median(seconds), 4),
                "idle": round(statistics.median(shares), 4),
                "predicted": round(statistics.mean(map(line.idle, range(options.ranks))) / line.makespan, 4),
                "published": round(published / (3 * count + published), 4),
            }
        )
    return rows


def main() -> None:
    """Measures, prints a table, writes one JSON file."""
    options = parse_args(Options, None, prog="bench_schedules.py")
    rows = []
    with RankPool() as pool:
        for count in options.microbatches:
            say(f"{count} microbatches")
            rows += rows_of(pool, options, count)
    if options.json:
        print(json.dumps(rows, indent=2))
    else:
        table(
            f"share of a step that {options.ranks} ranks idle, F = I = W = {options.milliseconds:g} ms",
            ["schedule", "microbatches", "measured", "predicted", "published"],
            [
                [row["schedule"], str(row["microbatches"])]
                + [f"{row[key]:.1%}" for key in ("idle", "predicted", "published")]
                for row in rows
            ],
        )  # fmt: skip
    if options.out is not None:
        write_record(options.out, machine=machine(), options=options, results=rows)


if __name__ == "__main__":
    main()
