"""`megacoder plan --schedule`: what a pipeline schedule costs; a table, JSON or a picture."""

import contextlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megacoder.core.config import parse_args
from megacoder.core.console import say, table
from megacoder.core.errors import ConfigError
from megacoder.parallel.schedules.draw import draw
from megacoder.parallel.schedules.generators import build_schedule
from megacoder.parallel.schedules.simulate import Costs, Timeline, simulate
from megacoder.parallel.schedules.validate import check_schedule, live_activations, peak_live

__all__ = ["ScheduleArgs", "main", "print_help"]

MOST_ACTIONS = 1 << 20
"""Ranks times microbatches: half a minute of simulation."""


@dataclass(frozen=True, kw_only=True)
class ScheduleArgs:
    """A pipeline schedule, simulated: how long ranks idle and how many activations they hold."""

    schedule: str = "1f1b"
    """gpipe, 1f1b, interleaved, zb-h1, zbv or dualpipev"""
    pp: int = 4
    """pipeline ranks"""
    microbatches: int = 8
    """microbatches per step and replica"""
    chunks: int | None = None
    """chunks of layers per rank; a choice for interleaved only, 2 if unset"""
    forward: float = 1.0
    """time of one microbatch's forward through all chunks of a rank"""
    input_grad: float = 1.0
    """time of the input-gradient backward (I) gradient"""
    weight_grad: float = 1.0
    """time of its backward for the weight gradients"""
    latency: float = 0.0
    """time to send an activation to the next rank"""
    draw: Path | None = None
    """write the timeline as this .png or .svg"""
    json: bool = False
    """print JSON instead of a table"""


def print_help() -> None:
    """The options."""
    with contextlib.suppress(SystemExit):
        parse_args(ScheduleArgs, ["--help"], prog="megacoder plan")


def main(argv: Sequence[str]) -> None:
    """Simulates one schedule."""
    config = parse_args(ScheduleArgs, argv, prog="megacoder plan")
    timeline = _simulate(config)
    if config.draw is not None:
        draw(timeline, config.draw)
        say(f"wrote {config.draw}")
    report = _report(timeline)
    if config.json:
        print(json.dumps(report, indent=2))
    else:
        _print_table(report)


def _simulate(config: ScheduleArgs) -> Timeline:
    if config.pp * config.microbatches > MOST_ACTIONS:
        raise ConfigError(
            f"--pp {config.pp} --microbatches {config.microbatches}: their product may be at most {MOST_ACTIONS:,}; "
            "every action is simulated, and beyond that the idle share hardly changes"
        )
    schedule = build_schedule(
        config.schedule, num_ranks=config.pp, num_microbatches=config.microbatches, num_chunks=config.chunks
    )
    check_schedule(schedule)
    costs = Costs.uniform(
        schedule.stage_map.num_stages,
        forward=config.forward / schedule.num_chunks,
        input_grad=config.input_grad / schedule.num_chunks,
        weight_grad=config.weight_grad / schedule.num_chunks,
        latency=config.latency,
    )
    return simulate(schedule, costs)


def _report(timeline: Timeline) -> dict[str, Any]:
    """What both outputs print. Shares are of the makespan, peaks in microbatches through all chunks of the rank."""
    schedule = timeline.schedule
    ranks = [
        {
            "rank": rank,
            "idle": timeline.idle(rank) / timeline.makespan,
            "bubble": timeline.bubble(rank) / timeline.makespan,
            "peak_activations": peak_live(actions) / schedule.num_chunks,
            "peak_waiting": max(live.waiting for live in live_activations(actions)) / schedule.num_chunks,
        }
        for rank, actions in enumerate(schedule.ranks)
    ]
    return {
        "schedule": schedule.name,
        "pp": schedule.num_ranks,
        "microbatches": schedule.num_microbatches,
        "chunks": schedule.num_chunks,
        "makespan": timeline.makespan,
        "idle": sum(rank["idle"] for rank in ranks) / len(ranks),
        "ranks": ranks,
    }


def _print_table(report: dict[str, Any]) -> None:
    table(
        f"{report['schedule']}, pp {report['pp']}, microbatches {report['microbatches']}, chunks {report['chunks']}: "
        f"makespan {report['makespan']:g}, idle {report['idle']:.1%}",
        ["rank", "idle", "inside its own span", "peak activations", "waiting for W"],
        [
            [
                str(rank["rank"]),
                f"{rank['idle']:.1%}",
                f"{rank['bubble']:.1%}",
                f"{rank['peak_activations']:g}",
                f"{rank['peak_waiting']:g}",
            ]
            for rank in report["ranks"]
        ],
    )
