"""`megacoder data merge`: several .bin/.idx pairs as one."""

from collections.abc import Sequence

from megacoder.core.config import parse_args
from megacoder.data.merging import MergeConfig, merge

__all__ = ["main"]


def main(argv: Sequence[str]) -> None:
    merge(parse_args(MergeConfig, argv, prog="megacoder data merge"))
