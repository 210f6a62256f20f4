"""`megacoder corpus report`: what a finished corpus holds, and what was dropped on the way and why."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from megacoder.core.config import parse_args
from megacoder.core.console import say, table
from megacoder.core.errors import ConfigError
from megacoder.core.files import why_not_writable
from megacoder.corpus.accounts import CorpusReport, load_report
from megacoder.corpus.report import file_rows, full_report, language_rows, repository_rows

__all__ = ["main", "print_report"]


@dataclass(frozen=True, kw_only=True)
class ReportArgs:
    """What a finished corpus holds."""

    folder: tyro.conf.Positional[Path]
    """folder that `corpus build` wrote"""
    json: bool = False
    """print the full report as JSON: accounts, near copies, contamination, a dependency graph"""
    out: Path | None = None
    """HTML file to write the full report to, with drawings"""
    repository: str | None = None
    """repository whose dependency graph to show; if unset, a large one that can be drawn completely"""


def main(argv: Sequence[str]) -> None:
    """Prints the tables of one corpus, or writes all there is to say about it."""
    args = parse_args(ReportArgs, argv, prog="megacoder corpus report")
    if not args.json and args.out is None:
        if args.repository is not None:
            raise ConfigError(f"--repository {args.repository!r}: give --out FILE.html or --json as well, to see it")
        print_report(load_report(args.folder))
        return
    if args.out is not None and (reason := why_not_writable(args.out)):
        raise ConfigError(f"--out {str(args.out)!r}: {reason}; give an HTML file to write")
    report = full_report(args.folder, repository=args.repository)
    if args.json:
        print(json.dumps(report.to_plain(), indent=2))
    else:
        print_report(report.corpus)
    if args.out is not None:
        report.write_page(args.out)
        say(f"{args.out}: written")


def print_report(report: CorpusReport, *, max_repositories: int = 20) -> None:
    """Languages as in the paper's Table 1, drops by reason, and the largest repositories, on stdout."""
    accounts, repositories = report.accounts, repository_rows(report)
    table("Kept, by language", ["language", "size", "files", "share"], language_rows(report))
    table("Files", ["", "files", "size"], file_rows(report))
    table(
        f"Repositories ({len(repositories)}; the largest {min(max_repositories, len(repositories))})",
        ["repository", "files seen", "kept", "size", "samples", "part"],
        repositories[:max_repositories],
    )
    print(
        f"{accounts.num_samples:,} samples, {accounts.multi_file_samples:,} of several files; "
        f"{accounts.written / 1e6:.1f} MB with path comments"
    )
    if accounts.separated_files:
        samples = report.config["samples"]
        advice = "; to keep their order, build with --samples.oversize cut" if samples["oversize"] == "files" else ""
        print(
            f"{accounts.separated_files:,} files are samples by themselves although they depend on others or others on "
            f"them: their groups exceed samples.max_bytes = {samples['max_bytes']:,}{advice}"
        )
