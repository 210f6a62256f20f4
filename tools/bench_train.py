"""Tokens/s and memory of the training step, compared with transformers' Llama and with the GEMMs alone.

    python tools/bench_train.py --out tools/results/train_cpu.json

Same shape, dtype, batch and threads. Each contender is a process of its own; they alternate step by step, so that a
change in the machine's speed affects all of them, and medians are compared; ratios are medians of each round's ratio.
Memory is a process's peak less what it held when everything was imported; for a compiled model that includes the
compiler. Peers: `transformers.LlamaForCausalLM` with torch's fused AdamW, eager and compiled. In bf16 the peers
hold bf16 weights and state; ours keeps fp32 master weights and moments, which is more work for more precision. The
limit is every matrix product of the step's layers and head, forward and both gradients, timed alone at the same shapes.

Runs of one shape and dtype at a time (`--shapes`, `--dtypes`) are merged into one record if commit, machine and options
are the same.
"""

import json
import statistics
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import transformers
from bench_common import CPU_SHAPES, machine, write_record
from bench_ranks import Answer, ContenderFailed, Ranks
from contenders.one_process import COMPILED, EAGER, OURS, PRODUCTS

from megacoder.core.config import parse_args, to_dict
from megacoder.core.console import say, table


@dataclass(frozen=True, kw_only=True)
class Options:
    """Training-step throughput and memory compared with peers and with the GEMMs alone."""

    shapes: tuple[str, ...] = ("101M", "58M", "4M")
    """which of the built-in shapes"""
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    """float32, bfloat16"""
    batch: int = 4
    """sequences per step"""
    sequence: int = 512
    """tokens per sequence"""
    threads: int = 2
    """intra-op threads"""
    rounds: int = 7
    """timed steps of each contender, after one warm-up"""
    compile: bool = True
    """also time transformers under torch.compile"""
    out: Path | None = None
    """JSON file to write"""


def bench(shape: str, dtype: str, options: Options) -> dict[str, dict[str, Any]]:
    """Rows by contender: median seconds, tokens/s, peak memory, share of the matrix products' rate."""
    names = [OURS, EAGER, *([COMPILED] if options.compile else []), PRODUCTS]
    job = {
        "model": to_dict(CPU_SHAPES[shape]), "dtype": dtype, "batch": options.batch, "sequence": options.sequence,
    }  # fmt: skip
    answers: dict[str, list[Answer]] = {name: [] for name in names}
    failed: dict[str, str] = {}
    with ExitStack() as stack:
        running: dict[str, Ranks] = {}
        for name in names:
            ranks = Ranks("contenders.one_process", {**job, "name": name}, size=1, threads=options.threads)
            running[name] = stack.enter_context(ranks)
        for number in range(options.rounds + 1):
            say(f"{shape} {dtype}: {f'round {number} of {options.rounds}' if number else 'warming up'}")
            for name in [name for name in names if name not in failed]:
                try:
                    answer = running[name].call()
                except ContenderFailed as error:
                    failed[name] = str(error)
                    continue
                if number:
                    answers[name].append(answer)
    return {name: _row(answers, name, options) if answers[name] else {"failed": failed[name]} for name in names}


def _row(answers: dict[str, list[Answer]], name: str, options: Options) -> dict[str, Any]:
    seconds = {other: [answer.seconds for answer in those] for other, those in answers.items()}
    median = statistics.median(seconds[name])
    return {
        "seconds": round(median, 5),
        "tokens_per_second": round(options.batch * options.sequence / median, 1),
        "share_of_matrix_rate": _ratio(seconds[PRODUCTS], seconds[name]),
        "speed_of_megacoder": _ratio(seconds[name], seconds[OURS]),
        "peak_mb": round(answers[name][-1].peak_bytes_by_rank[0] / 2**20, 1),
    }


def _ratio(numerators: list[float], denominators: list[float]) -> float:
    return round(statistics.median(a / b for a, b in zip(numerators, denominators, strict=False)), 4)


def show(title: str, rows: dict[str, dict[str, Any]]) -> None:
    """The table for people."""
    cells = [
        [f"{name}: {row['failed']}", "", "", "", ""] if "failed" in row else
        [name, f"{row['tokens_per_second']:,.0f}", f"{row['share_of_matrix_rate']:.0%}",
         f"{row['speed_of_megacoder']:.2f}", f"{row['peak_mb']:,.0f}"]
        for name, row in rows.items()
    ]  # fmt: skip
    table(title, ["step", "tokens/s", "share of matrix rate", "megacoder is x times as fast", "peak MB"], cells)


def main() -> None:
    """Runs every shape and dtype, prints a table each, writes one JSON file."""
    options = parse_args(Options, None, prog="bench_train.py")
    here = machine(transformers=transformers.__version__)
    results = {} if options.out is None else _recorded(options.out, here, options)
    for shape in options.shapes:
        for dtype in options.dtypes:
            rows = results[f"{shape} {dtype}"] = bench(shape, dtype, options)
            title = f"{shape}, {dtype}, {options.batch} x {options.sequence} tokens, {options.threads} threads"
            show(title, rows)
            if options.out is not None:
                shapes, dtypes = (tuple(dict.fromkeys(words)) for words in zip(*map(str.split, results), strict=True))
                whole = replace(options, shapes=shapes, dtypes=dtypes)
                write_record(options.out, machine=here, options=whole, results=results)


def _recorded(path: Path, here: dict[str, Any], options: Options) -> dict[str, Any]:
    """What an earlier call of the same commit, on the same machine, with the same options, has measured into `path`."""
    if not path.exists():
        return {}
    record = json.loads(path.read_text())
    same = all(
        record["options"].get(name) == str(value)
        for name, value in asdict(options).items() if name not in ("shapes", "dtypes", "out")
    )  # fmt: skip
    return record["results"] if same and record["machine"] == here else {}


if __name__ == "__main__":
    main()
