"""`megacoder tokenizer train`: a sample of the corpus -> a tokenizer folder."""

from collections.abc import Sequence

from megacoder.core.config import parse_args
from megacoder.data.tokenizer_training import TrainTokenizerConfig, train_from_files

__all__ = ["main"]


def main(argv: Sequence[str]) -> None:
    train_from_files(parse_args(TrainTokenizerConfig, argv, prog="megacoder tokenizer train"))
