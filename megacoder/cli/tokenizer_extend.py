"""`megacoder tokenizer extend`: control tokens for the tokenizer of a model that has none."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from megacoder.core.config import parse_args

__all__ = ["ExtendArgs", "main"]


@dataclass(frozen=True, kw_only=True)
class ExtendArgs:
    """Copies a tokenizer and appends the control tokens of fill-in-the-middle and chat that it lacks.

    The ids of its tokens and of ordinary text stay as they are.
    """

    base: Positional[Path]
    """folder with tokenizer.json: a tokenizer's, or a model's"""
    output: Path
    """tokenizer folder to write"""
    add: tuple[str, ...] = ()
    """further control tokens to append"""


def main(argv: Sequence[str]) -> None:
    """Writes one folder."""
    args = parse_args(ExtendArgs, argv, prog="megacoder tokenizer extend")
    from megacoder.data.tokenizer_extending import extend_tokenizer

    extend_tokenizer(args.base, args.output, args.add)
