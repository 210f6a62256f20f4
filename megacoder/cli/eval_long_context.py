"""`megacoder eval long-context`: the loss by position, and planted definitions that must be found again."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from megacoder.cli.loading import Loading
from megacoder.cli.model_folder import load_model, share_model
from megacoder.core.config import parse_args
from megacoder.core.console import counted, say, table
from megacoder.core.errors import ConfigError
from megacoder.data.sidecar import open_dataset
from megacoder.evaluate.long_context import loss_by_position, retrieval
from megacoder.parallel.tensor import TensorParallel

__all__ = ["main"]


@dataclass(frozen=True, kw_only=True)
class EvalLongContextArgs:
    """Does a model use a long context? Loss by position, and numbers that functions anywhere in the context return.

    Several models are shown side by side, such as those before and after an extension. A model with fewer positions
    than --length is measured beyond those that it was trained on: what an extension is for.
    """

    model: tuple[Path, ...]
    """Hugging Face folders, runs or checkpoints"""
    data: Path
    """prefix of held-out .bin/.idx made with their tokenizer"""
    length: int = 16_384
    """tokens of context"""
    documents: int = 20
    """number of long documents to measure the loss on"""
    trials: int = 10
    """planted definitions at each depth"""
    json: bool = False
    """print JSON instead of tables"""
    loading: Loading = field(default_factory=Loading)

    def __post_init__(self) -> None:
        if not self.model:
            raise ConfigError("--model: give at least one")
        for name in ("length", "documents", "trials"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name} {getattr(self, name)}: must be at least 1")


def main(argv: Sequence[str]) -> None:
    """Prints what was measured of each model, a column for each."""
    args = parse_args(EvalLongContextArgs, argv, prog="megacoder eval long-context", flat=True)
    tp = share_model(args.loading.tp, ["eval", "long-context", *argv])
    if tp is None:
        return
    results = {str(folder): _measured(folder, args, tp) for folder in args.model}
    if args.json:
        print(json.dumps(results))
        return
    losses, found = ([result[kind] for result in results.values()] for kind in ("loss", "found"))
    table(
        f"Loss by position, nats, {args.length:,} tokens",
        ["tokens", *results],
        [
            [f"{rows[0]['start']:,} to {rows[0]['stop']:,}", *(f"{row['loss']:.3f}" for row in rows)]
            for rows in zip(*losses, strict=True)
        ],
    )
    table(
        "Planted definitions found",
        ["depth", *results],
        [
            [f"{rows[0]['depth']:.0%}", *(f"{row['found']} of {row['trials']}" for row in rows)]
            for rows in zip(*found, strict=True)
        ],
    )


def _measured(folder: Path, args: EvalLongContextArgs, tp: TensorParallel) -> dict[str, list[dict[str, Any]]]:
    model, tokenizer = load_model(folder, args.loading, tp=tp)
    if model.config.max_position_embeddings < args.length:  # RoPE stays as it was trained
        model.config = replace(model.config, max_position_embeddings=args.length)
    dataset = open_dataset(args.data, tokenizer)
    every = map(dataset.document, range(dataset.num_documents))
    documents = list(islice((ids for ids in every if len(ids) >= args.length), args.documents))
    if tp.rank == 0:
        number = counted(len(documents), "document", "documents")
        say(f"{folder}: {number} of {args.length:,} tokens; {model.config.rope_words}")
    losses = loss_by_position(model, tokenizer, documents, length=args.length)
    found = retrieval(model, tokenizer, length=args.length, trials=args.trials)
    return {"loss": [asdict(row) for row in losses], "found": [asdict(row) for row in found]}
