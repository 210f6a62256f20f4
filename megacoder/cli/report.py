"""`megacoder report RUN`: a training run so far, as one self-contained HTML file."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from megacoder.core.config import parse_args
from megacoder.core.console import say
from megacoder.train.report import write_run_report

__all__ = ["main"]


@dataclass(frozen=True, kw_only=True)
class ReportArgs:
    """Loss, learning rate, gradient norm, speed, memory, skipped updates, data, schedule; also while the run trains."""

    run: tyro.conf.Positional[Path]
    """output folder of a training run"""
    out: Path | None = None
    """file to write; if unset, report.html in that folder"""


def main(argv: Sequence[str]) -> None:
    """Writes the file and says where it is."""
    args = parse_args(ReportArgs, argv, prog="megacoder report")
    path = args.out or args.run / "report.html"
    step = write_run_report(args.run, path)
    say(f"{path}: as of step {step:,}")
