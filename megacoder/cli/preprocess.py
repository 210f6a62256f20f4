"""`megacoder preprocess`: documents -> PREFIX.bin, PREFIX.idx, PREFIX.json."""

from collections.abc import Sequence

from megacoder.core.config import parse_args
from megacoder.data.preprocess import PreprocessConfig, preprocess

__all__ = ["main"]


def main(argv: Sequence[str]) -> None:
    preprocess(parse_args(PreprocessConfig, argv, prog="megacoder preprocess"))
