"""`megacoder corpus report`: what a finished corpus holds, and what was dropped on the way and why."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from megacoder.core.config import parse_args
from megacoder.core.console import table
from megacoder.corpus.accounts import REPORT_NAME, CorpusReport, load_report

__all__ = ["main", "print_report"]


@dataclass(frozen=True, kw_only=True)
class ReportArgs:
    """What a finished corpus holds."""

    folder: tyro.conf.Positional[Path]
    """folder that `corpus build` wrote"""
    json: bool = False
    """print corpus.json as it is"""


def main(argv: Sequence[str]) -> None:
    """Prints the tables of one corpus."""
    args = parse_args(ReportArgs, argv, prog="megacoder corpus report")
    report = load_report(args.folder)
    if args.json:
        print((args.folder / REPORT_NAME).read_text(encoding="utf-8"), end="")
    else:
        print_report(report)


def print_report(report: CorpusReport, *, max_repositories: int = 20) -> None:
    """Languages as in the paper's Table 1, drops by reason, and the largest repositories, on stdout."""
    accounts = report.accounts
    languages = sorted(accounts.languages.items(), key=lambda item: -item[1].bytes)
    table(
        "Kept, by language",
        ["language", "size", "files", "share"],
        [
            [name, count.megabytes, f"{count.files:,}", f"{count.bytes / accounts.kept.bytes:.2%}"]
            for name, count in languages
        ],
    )
    rows = [[name, f"{count.files:,}", count.megabytes] for name, count in accounts.rows(report.split_unit)]
    table("Files", ["", "files", "size"], rows)
    largest = sorted(accounts.repositories.items(), key=lambda item: -item[1].kept.bytes)
    table(
        f"Repositories ({len(largest)}; the largest {min(max_repositories, len(largest))})",
        ["repository", "files seen", "kept", "size", "samples", "part"],
        [
            [
                name, f"{row.seen.files:,}", f"{row.kept.files:,}", row.kept.megabytes, f"{row.samples:,}",
                "" if not row.heldout.files else "held out" if row.heldout == row.kept else "split",
            ]
            for name, row in largest[:max_repositories]
        ],
    )  # fmt: skip
    print(
        f"{accounts.num_samples:,} samples, {accounts.multi_file_samples:,} of several files; "
        f"{accounts.written / 1e6:.1f} MB with path comments"
    )
