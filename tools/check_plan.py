"""Validates `megacoder plan`: its memory against real allocations, its time against published throughput.

    python tools/check_plan.py                # memory, 30 layouts on this machine
    python tools/check_plan.py --published    # throughput, 21 published rows

`--published` predicts each row with shares (`megacoder.train.planning.devices.Shares`) fitted to all the other rows but
not to itself. The data sheets' figures are fixed; the same few shares serve every device. What a row's source does not
tell (micro batch, schedule, recomputation) is set to what the planner finds best for that layout, and is shown.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from bench_common import machine, run_tool, write_record
from plan_memory import check_memory
from plan_published import check_published

from megacoder.core.config import parse_args


@dataclass(frozen=True, kw_only=True)
class Options:
    """Predictions of `megacoder plan`, held against what is."""

    published: bool = False
    """throughput against published rows, instead of memory"""
    out: Path | None = None
    """JSON file to write"""
    json: bool = False
    """print JSON instead of a table"""


def main() -> None:
    options = parse_args(Options, None, prog="tools/check_plan.py")
    check = check_published if options.published else check_memory
    results = check(quiet=options.json)
    if options.json:
        print(json.dumps(results, indent=2))
    if options.out is not None:
        write_record(options.out, machine=machine(), options=options, results=results)
    if not results["holds"]:
        raise SystemExit(1)


if __name__ == "__main__":
    run_tool(main)
