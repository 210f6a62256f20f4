"""`megacoder tokenizer train`, `preprocess`, `data merge` and `data inspect`: a corpus to what training reads.

Each is a function of `megacoder.data` with its configuration as options, imported when the command runs.
"""

import json
from collections.abc import Sequence
from typing import Any

from megacoder.core.config import parse_args
from megacoder.core.console import table

__all__ = ["inspect", "merge", "preprocess", "train_tokenizer"]


def train_tokenizer(argv: Sequence[str]) -> None:
    """A sample of the corpus -> a tokenizer folder."""
    from megacoder.data.tokenizer_training import TrainTokenizerConfig, train_from_files

    train_from_files(parse_args(TrainTokenizerConfig, argv, prog="megacoder tokenizer train"))


def preprocess(argv: Sequence[str]) -> None:
    """Documents -> PREFIX.bin, PREFIX.idx, PREFIX.json."""
    from megacoder.data import preprocess

    preprocess.preprocess(parse_args(preprocess.PreprocessConfig, argv, prog="megacoder preprocess"))


def merge(argv: Sequence[str]) -> None:
    """Several .bin/.idx pairs as one."""
    from megacoder.data import merging

    merging.merge(parse_args(merging.MergeConfig, argv, prog="megacoder data merge"))


def inspect(argv: Sequence[str]) -> None:
    """Counts, lengths and beginnings of a dataset's documents."""
    from megacoder.data import inspection

    config = parse_args(inspection.InspectConfig, argv, prog="megacoder data inspect")
    report = inspection.inspect(config)
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
