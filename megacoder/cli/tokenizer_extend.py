"""`megacoder tokenizer extend`: control tokens for the tokenizer of a model that has none."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from megacoder.core.config import parse_args
from megacoder.core.errors import ConfigError

__all__ = ["ExtendArgs", "main"]


@dataclass(frozen=True, kw_only=True)
class ExtendArgs:
    """Copies a tokenizer and appends the control tokens of fill-in-the-middle and chat that it lacks.

    The ids of its tokens and of ordinary text stay as they are.
    """

    base: Positional[Path]
    """a tokenizer's folder, a model's, a run or a checkpoint"""
    output: Path
    """tokenizer folder to write"""
    add: tuple[str, ...] = ()
    """further control tokens to append"""


def main(argv: Sequence[str]) -> None:
    """Writes one folder."""
    args = parse_args(ExtendArgs, argv, prog="megacoder tokenizer extend")
    from megacoder.data.tokenizer_extending import extend_tokenizer

    tokenizer, rows = _tokenizer_and_rows(args.base)
    extend_tokenizer(tokenizer, args.output, args.add, rows=rows)


def _tokenizer_and_rows(base: Path) -> tuple[Path, int | None]:
    """Where the tokenizer of `base` lies, and the rows of its model if a checkpoint says so.

    The tokenizer beside an imported model's checkpoints, which its train.toml names, is of that model, too.
    """
    from megacoder.checkpoint.folders import CHECKPOINTS
    from megacoder.checkpoint.reader import CheckpointReader
    from megacoder.cli.model_folder import is_checkpoint, tokenizer_of
    from megacoder.model.conversion import TOKENIZER, model_of

    if is_checkpoint(base):
        reader = CheckpointReader(base)
        tokenizer = tokenizer_of(reader)
        if tokenizer is None:
            raise ConfigError(f"{reader.folder}: no tokenizer beside this checkpoint; name the tokenizer's folder")
        return tokenizer, model_of(reader).vocab_size
    folder = (base if base.is_dir() else base.parent).resolve()
    beside = folder.name == TOKENIZER and (folder.parent / CHECKPOINTS).is_dir()
    return base, model_of(CheckpointReader(folder.parent)).vocab_size if beside else None
