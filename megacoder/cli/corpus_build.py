"""`megacoder corpus build`: repositories -> filtered, deduplicated, ordered documents in Parquet."""

from collections.abc import Sequence
from pathlib import Path

from megacoder.cli.corpus_report import print_report
from megacoder.core.config import load_toml, parse_args
from megacoder.core.errors import ConfigError
from megacoder.corpus.build import build_corpus
from megacoder.corpus.config import CorpusConfig

__all__ = ["main"]

PROG = "megacoder corpus build [--config CORPUS.toml]"


_NO_OUT = "\0"  # no folder can have this name


def main(argv: Sequence[str]) -> None:
    """Builds a corpus, or resumes one, and prints what was kept and what was dropped and why."""
    words = list(argv)
    default = None
    if "--config" in words:
        index = words.index("--config")
        if index + 1 == len(words):
            raise ConfigError("--config: give the TOML file")
        path = Path(words[index + 1])
        del words[index : index + 2]
        default = load_toml(CorpusConfig, path, absent={"out": _NO_OUT})
    config = parse_args(CorpusConfig, words, prog=PROG, default=default)
    if str(config.out) == _NO_OUT:
        raise ConfigError("neither the TOML file nor the command line says where to write; give --out")
    print_report(build_corpus(config))
