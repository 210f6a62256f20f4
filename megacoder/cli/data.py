"""`megacoder data inspect`: counts, lengths and beginnings of a dataset's documents."""

import json
from collections.abc import Sequence
from typing import Any

from megacoder.core.config import parse_args
from megacoder.core.console import table
from megacoder.data.inspection import InspectConfig, inspect

__all__ = ["main"]


def main(argv: Sequence[str]) -> None:
    config = parse_args(InspectConfig, argv, prog="megacoder data inspect")
    report = inspect(config)
    if config.json:
        print(json.dumps(report, indent=2, ensure_ascii=False))
    else:
        _show(str(config.prefix), report)


def _show(prefix: str, report: dict[str, Any]) -> None:
    lengths, beginnings = report.pop("tokens_per_document"), report.pop("beginnings", {})
    rows = [[name, f"{value:,}" if isinstance(value, int) else str(value)] for name, value in report.items()]
    table(prefix, ["", "value"], [row for row in rows if row[1] != "None"])
    table("tokens per document", ["", "documents"], [[name, f"{count:,}"] for name, count in lengths.items()])
    for index, text in beginnings.items():
        print(f"\n--- document {index}\n{text}")
