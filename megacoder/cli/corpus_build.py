"""`megacoder corpus build`: folders of repositories -> filtered, deduplicated, ordered documents in Parquet."""

from collections.abc import Sequence

from megacoder.cli.corpus_report import print_report
from megacoder.core.config import parse_args
from megacoder.corpus.build import build_corpus
from megacoder.corpus.config import CorpusConfig

__all__ = ["main"]


def main(argv: Sequence[str]) -> None:
    """Builds a corpus, or goes on with one, and prints what was kept and what was dropped and why."""
    print_report(build_corpus(parse_args(CorpusConfig, argv, prog="megacoder corpus build")))
