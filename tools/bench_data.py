"""Throughput of each part of the data path, compared with peers and hardware limits, on source code of this machine.

    python tools/bench_data.py --corpus /tmp/bench-data --out tools/results/data_cpu.json
    python tools/bench_data.py --parts preprocess --corpus /tmp/bench-data

The corpus is made once and kept: see `data_parts.corpus`. Each part is a module of `data_parts` with a `measure`.
Parts that this run does not measure are kept in the results file, with their own machine and commit.
"""

import importlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench_common import machine, record_of
from data_parts.corpus import prepared

from megacoder.core.config import parse_args
from megacoder.core.console import say, table
from megacoder.core.errors import ConfigError

PARTS = {
    "preprocess": "data_parts.preprocess",
    "random-access": "data_parts.random_access",
    "stream": "data_parts.stream",
    "open": "data_parts.opening",
    "fim-proof": "data_parts.fim_proof",
}
"""Modules with `measure(options: Options, corpus: Corpus) -> dict[str, dict[str, float | str]]`, rows by contender."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Speed of the data path."""

    parts: tuple[str, ...] = tuple(PARTS)
    """which, by name"""
    corpus: Path = Path("/tmp/bench-data")
    """folder of the corpus; made if it is not there"""
    megabytes: int = 200
    """of text in the corpus"""
    threads: int = 2
    """that each contender uses at most"""
    rounds: int = 3
    """measurements of each contender, in turns; medians are reported"""
    out: Path | None = None
    """JSON file to write, or to add to"""

    def __post_init__(self) -> None:
        for part in self.parts:
            if part not in PARTS:
                raise ConfigError(f"parts: no {part!r}; there are {', '.join(PARTS)}")


def add_record(path: Path, part: str, record: dict[str, Any]) -> None:
    """Puts a part's record into a file of results beside those of other parts."""
    records = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(records | {part: record}, indent=2) + "\n")


def main() -> None:
    """Measures the parts, prints a table each, and writes their records."""
    options = parse_args(Options, None, prog="bench_data.py")
    corpus = prepared(options.corpus, megabytes=options.megabytes)
    say(f"{corpus.folder}: {corpus.num_documents:,} documents, {corpus.text_bytes / 1e6:.1f} MB")
    for part in options.parts:
        rows = importlib.import_module(PARTS[part]).measure(options, corpus)
        columns = list(dict.fromkeys(column for row in rows.values() for column in row))
        shown = [[name, *(_shown(row.get(column, "")) for column in columns)] for name, row in rows.items()]
        table(f"{part}, {options.threads} threads", ["", *(column.replace("_", " ") for column in columns)], shown)
        if options.out is not None:
            record = record_of(machine=machine(**corpus.described()), options=options, results=rows)
            add_record(options.out, part, record)


def _shown(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:,.3g}" if abs(value) < 1000 else f"{value:,.0f}"


if __name__ == "__main__":
    main()
