"""`megacoder eval perplexity`: held-out bits per byte."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from megacoder.cli.loading import Loading
from megacoder.cli.model_folder import load_model, share_model
from megacoder.core.config import parse_args
from megacoder.core.console import table
from megacoder.data.indexed import IndexedDataset
from megacoder.evaluate.bits_per_byte import HeldOutScore, measure_bits_per_byte, training_token_counts
from megacoder.evaluate.held_out import read_texts

__all__ = ["main", "print_score"]


@dataclass(frozen=True, kw_only=True)
class EvalPerplexityArgs:
    """Bits per byte of held-out text, beside those of xz and of a unigram model."""

    model: Path
    """Hugging Face folder, run or checkpoint"""
    data: tuple[Path, ...]
    """held-out Parquet or JSONL files (also .gz, .zst), or folders of them"""
    text_key: str = "content"
    """column or JSON key of the text"""
    document_key: str | None = None
    """column or JSON key that is equal in consecutive rows of one document; if unset, `sample` in Parquet, and in
    JSONL each row is a document"""
    train: Path | None = None
    """prefix of the training .bin/.idx, for the unigram model"""
    window: int | None = None
    """most tokens that a prediction sees; if unset, the model's longest context"""
    json: bool = False
    """print the result as JSON"""
    loading: Loading = field(default_factory=Loading)


def main(argv: Sequence[str]) -> None:
    """Prints the bits per byte."""
    args = parse_args(EvalPerplexityArgs, argv, prog="megacoder eval perplexity", flat=True)
    documents = read_texts(args.data, text_key=args.text_key, document_key=args.document_key)
    tp = share_model(args.loading.tp, ["eval", "perplexity", *argv])
    if tp is None:
        return
    model, tokenizer = load_model(args.model, args.loading, tp=tp)
    counts = None if args.train is None else training_token_counts(IndexedDataset(args.train), tokenizer)
    score = measure_bits_per_byte(
        model, tokenizer, documents, window=args.window, token_counts=counts, quiet=tp.rank > 0
    )
    if args.json:
        print(json.dumps(asdict(score) | {"perplexity": score.perplexity}))
    else:
        print_score(score)


def print_score(score: HeldOutScore) -> None:
    """The bits per byte as a table on stdout."""
    rows = [["model", f"{score.model:.4f}"], ["xz -9", f"{score.xz:.4f}"]]
    if score.unigram is not None:
        rows.append(["unigram tokens", f"{score.unigram:.4f}"])
    table("Held-out text", ["", "bits per byte"], rows)
    print(
        f"{score.num_documents:,} documents, {score.num_bytes:,} bytes, {score.num_tokens:,} tokens in windows of "
        f"{score.window:,}; perplexity per token {score.perplexity:.3f}"
    )
