"""Tokens/s of two ranks on one CPU, compared with the peers that run there and with the machine's limit.

    python tools/bench_parallel.py --peers-python PEERS/bin/python --picotron CHECKOUT --out tools/results/parallel_cpu.json
    python tools/bench_parallel.py --only pp --dtypes bfloat16
    python tools/bench_parallel.py --host

Three rows: tensor, pipeline and data parallelism alone, on two ranks with one thread each. All contenders of a row
train the same 58.3M Llama on the same tokens, clipping and AdamW included. Each is a pair of processes of its own; the
pairs alternate step by step while the others idle, so that a change in the machine's speed affects all of them. A step
lasts from the first rank's start to the last one's end. Medians are shown; shares and ratios are medians of those of
each round.

The limit is the same arithmetic in independent processes: ours on a process group whose collectives are over when they
begin (see `contenders.limit`). Where its ranks have unequal work, as pipeline stages do, it ends with the slower; the
limit `evenly` is the mean of the two, as if work could be divided at will.

Peers: torch's own need nothing. Megatron-Core comes from an environment of its own, made by `pip install numpy einops
packaging torch==2.13.0` and `pip install --no-deps "megatron-core==0.16.*"`; picotron from a checkout. Peers that cannot run
are listed with the reason.
"""  # noqa: E501

import json
import statistics
import subprocess
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from bench_common import machine, write_record
from bench_ranks import Answer, ContenderFailed, Ranks
from contenders.entries import CONTENDERS, Contender, Row
from contenders.host_time import host_times

from megacoder.core.config import parse_args
from megacoder.core.console import say, table

SHAPE = {"vocab_size": 32256, "hidden_size": 512, "intermediate_size": 1376, "num_layers": 8, "num_heads": 8}


@dataclass(frozen=True, kw_only=True)
class Options:
    """Two ranks of one machine: ours, the peers', the limit."""

    only: tuple[Row, ...] = ("tp", "pp", "dp")
    """rows to measure"""
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    """float32, bfloat16"""
    names: tuple[str, ...] = ()
    """only contenders whose names begin with one of these"""
    rounds: int = 5
    """timed steps of each contender, after one to warm up"""
    batch: int = 4
    """sequences of a microbatch"""
    sequence: int = 512
    """tokens of a sequence; fewer where products take long, as those in bf16 do on a CPU without units for them"""
    tp_microbatches: int = 2
    """microbatches of a step, all ranks together"""
    pp_microbatches: int = 8
    """likewise"""
    dp_microbatches: int = 4
    """likewise"""
    peers_python: Path | None = None
    """interpreter of an environment with Megatron-Core"""
    picotron: Path | None = None
    """a checkout of picotron"""
    host: bool = False
    """measure the host's time per layer instead"""
    out: Path | None = None
    """JSON file to write"""
    json: bool = False
    """print JSON instead of tables"""


@dataclass
class Record:
    """What became of a contender."""

    contender: Contender
    ranks: Ranks | None = None
    failed: str | None = None
    """why it could not run, or run on"""
    answers: list[Answer] = field(default_factory=list)
    """of the timed rounds"""
    losses: list[float] = field(default_factory=list)
    """of every step"""

    def step(self, *, timed: bool) -> None:
        """One turn, if it still runs."""
        if self.ranks is None:
            return
        try:
            answer = self.ranks.call()
        except ContenderFailed as error:
            self.ranks, self.failed = None, str(error)
            return
        self.losses += [loss for loss in answer.results if loss is not None][:1]
        if timed:
            self.answers.append(answer)

    @property
    def seconds(self) -> list[float]:
        return [answer.seconds for answer in self.answers]


def measure(row: Row, dtype: str, options: Options) -> list[Record]:
    """All contenders of a row, in turns; ours first."""
    chosen = [entry for entry in CONTENDERS if entry.row == row and entry.only_dtype in (None, dtype)]
    if options.names:
        chosen = [entry for entry in chosen if entry.name.startswith(options.names)]
    records = [Record(entry) for entry in chosen]
    with ExitStack() as stack:
        for record in records:
            say(f"{row} {dtype}: starting {record.contender.name}")
            try:
                record.ranks = stack.enter_context(_start(record.contender, dtype, options))
            except ContenderFailed as error:
                record.failed = str(error)
        for number in range(options.rounds + 1):
            say(f"{row} {dtype}: {f'round {number} of {options.rounds}' if number else 'warming up'}")
            for record in records:
                record.step(timed=number > 0)
    return records


def _start(entry: Contender, dtype: str, options: Options) -> Ranks:
    job = {
        **SHAPE, "batch": options.batch, "sequence": options.sequence,
        "row": entry.row, "dtype": dtype, "variant": entry.variant,
        "layers_per_stage": entry.layers_per_stage,
        "num_microbatches": getattr(options, f"{entry.row}_microbatches"),
    }  # fmt: skip
    python: dict[str, Any] = {}
    if entry.needs is not None:
        given = getattr(options, entry.needs)
        if given is None:
            raise ContenderFailed(f"not tried: no --{entry.needs.replace('_', '-')} was given")
        if entry.needs == "peers_python":
            python = {"python": str(given)}
        else:
            job[entry.needs] = str(given)
    return Ranks(f"contenders.{entry.module}", job, size=2, backend=entry.backend, **python)


def summary(records: Sequence[Record], num_tokens: int) -> dict[str, dict[str, Any]]:
    """Rows by contender."""
    ran = [record for record in records if record.answers]
    first = ran[0].seconds if ran else []
    limit = next((record for record in ran if record.contender.module == "limit"), None)
    rows: dict[str, dict[str, Any]] = {}
    for record in records:
        row: dict[str, Any] = {"bf16": record.contender.bf16}
        if record.failed is not None:
            row["failed"] = record.failed
        if record.answers:
            seconds = statistics.median(record.seconds)
            row |= {
                "seconds": round(seconds, 4),
                "best_seconds": round(min(record.seconds), 4),
                "tokens_per_second": round(num_tokens / seconds, 1),
                "seconds_by_rank": _by_rank([answer.by_rank for answer in record.answers]),
                "processor_seconds_by_rank": _by_rank([answer.cpu_by_rank for answer in record.answers]),
                "speed_of_first": _ratio(record.seconds, first),
                "loss": [round(loss, 4) for loss in (record.losses[:1] + record.losses[-1:])],
            }
            if limit is not None:
                row["share_of_limit"] = _ratio(limit.seconds, record.seconds)
                evenly = [statistics.mean(answer.by_rank) for answer in limit.answers]
                row["share_of_even_limit"] = _ratio(evenly, record.seconds)
        rows[record.contender.name] = row
    return rows


def _by_rank(rounds: Sequence[Sequence[float]]) -> list[float]:
    return [round(statistics.median(of_rank), 4) for of_rank in zip(*rounds, strict=True)]


def _ratio(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    """The median of the rounds' own ratios; a contender that gave up has fewer rounds."""
    return round(statistics.median(a / b for a, b in zip(numerators, denominators, strict=False)), 4)


def show(title: str, rows: dict[str, dict[str, Any]]) -> None:
    """The table for people."""
    first = next((name for name, row in rows.items() if "seconds" in row), "the first")
    in_bf16 = "bfloat16" in title
    columns = ["two ranks, one thread each", *(["bf16"] if in_bf16 else [])]
    columns += ["tokens/s", "of limit", "of even limit", f"{first} is x times as fast"]
    cells = []
    for name, row in rows.items():
        shares = [f"{row[key]:.0%}" if key in row else "" for key in ("share_of_limit", "share_of_even_limit")]
        rate = [f"{row['tokens_per_second']:,.0f}", *shares, f"{row['speed_of_first']:.2f}"] if "seconds" in row else []
        reason = f": {row['failed']}" if "failed" in row else ""
        cells.append([name + reason, *([row["bf16"]] if in_bf16 else []), *rate, *[""] * (4 - len(rate))])
    table(title, columns, cells)


def show_host(rows: dict[str, dict[str, float]]) -> None:
    """The table of `--host`."""
    table(
        "one layer, forward and backward, tiny shapes, one thread",
        ["layer", "microseconds", "times the plain layer's"],
        [[name, f"{row['microseconds']:.0f}", f"{row['times_plain']:.2f}"] for name, row in rows.items()],
    )


def peer_versions(options: Options) -> dict[str, str]:
    """Of the peers that were given."""
    commands = {}
    if options.peers_python is not None:
        ask = "import importlib.metadata as m; print(m.version('megatron-core') + ', torch ' + m.version('torch'))"
        commands["megatron-core"] = [str(options.peers_python), "-c", ask]
    if options.picotron is not None:
        commands["picotron"] = ["git", "-C", str(options.picotron), "describe", "--always"]
    ran = {name: subprocess.run(words, capture_output=True, text=True, check=False) for name, words in commands.items()}
    return {name: done.stdout.strip() or "unknown" for name, done in ran.items()}


def main() -> None:
    """Measures the rows asked for, prints a table each, writes one JSON file."""
    options = parse_args(Options, None, prog="bench_parallel.py")
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    if options.host:
        results["host"] = host_times(options.rounds)
        if not options.json:
            show_host(results["host"])
    else:
        for row in options.only:
            for dtype in options.dtypes:
                num_tokens = getattr(options, f"{row}_microbatches") * options.batch * options.sequence
                rows = results[f"{row} {dtype}"] = summary(measure(row, dtype, options), num_tokens)
                if not options.json:
                    show(f"{row} = 2, {dtype}, steps of {num_tokens:,} tokens", rows)
    if options.json:
        print(json.dumps(results, indent=2))
    if options.out is not None:
        write_record(options.out, machine=machine(**peer_versions(options)), options=options, results=results)


if __name__ == "__main__":
    main()
