"""`megacoder eval perplexity`: held-out bits per byte."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from megacoder.cli.eval_inputs import settings_of, texts_content
from megacoder.cli.follow import follow
from megacoder.cli.loading import Following, Loading
from megacoder.cli.model_folder import load_model, share_model
from megacoder.core.config import parse_args
from megacoder.core.console import table
from megacoder.data.indexed import IndexedDataset
from megacoder.evaluate.bits_per_byte import PROTOCOL, HeldOutScore, measure_bits_per_byte, training_token_counts
from megacoder.evaluate.held_out import read_texts
from megacoder.parallel.tensor import ALONE, TensorParallel

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
    """print the result as JSON, with --follow a line per checkpoint"""
    loading: Loading = field(default_factory=Loading)
    following: Following = field(default_factory=Following)

    def __post_init__(self) -> None:
        self.following.check(self.model, self.loading, train=() if self.train is None else (self.train,))


def main(argv: Sequence[str]) -> None:
    """Prints the bits per byte."""
    args = parse_args(EvalPerplexityArgs, argv, prog="megacoder eval perplexity", flat=True)
    documents = read_texts(args.data, text_key=args.text_key, document_key=args.document_key)
    if args.following.follow:
        _follow(args, documents)
        return
    tp = share_model(args.loading.tp, ["eval", "perplexity", *argv])
    if tp is None:
        return
    score = _measure(args, documents, args.model, tp, baselines=tp.rank == 0)
    if args.json:
        print(json.dumps(asdict(score) | {"perplexity": score.perplexity}))
    else:
        print_score(score)


def _measure(
    args: EvalPerplexityArgs, documents: Sequence[str], folder: Path, tp: TensorParallel, *, baselines: bool
) -> HeldOutScore:
    model, tokenizer = load_model(folder, args.loading, tp=tp)
    counts = None
    if baselines and args.train is not None:
        counts = training_token_counts(IndexedDataset(args.train), tokenizer)
    return measure_bits_per_byte(
        model, tokenizer, documents, window=args.window, xz=baselines, token_counts=counts, quiet=tp.rank > 0
    )


def _follow(args: EvalPerplexityArgs, documents: Sequence[str]) -> None:
    """Scores the checkpoints of the run `args.model`."""

    def score(checkpoint: Path) -> dict[str, float]:
        measured = _measure(args, documents, checkpoint, ALONE, baselines=False)
        return {"bits_per_byte": measured.model, "perplexity": measured.perplexity}

    settings = settings_of("perplexity", args, {"data": texts_content(documents)}, protocol=PROTOCOL)
    follow(args.model, args.following.follow_as or "perplexity", score, settings=settings, as_json=args.json)


def print_score(score: HeldOutScore) -> None:
    """The bits per byte as a table on stdout."""
    rows = [("model", score.model), ("xz -9", score.xz), ("unigram tokens", score.unigram)]
    table("Held-out text", ["", "bits per byte"], [[name, f"{bits:.4f}"] for name, bits in rows if bits is not None])
    print(
        f"{score.num_documents:,} documents, {score.num_bytes:,} bytes, {score.num_tokens:,} tokens in windows of "
        f"{score.window:,}; perplexity per token {score.perplexity:.3f}"
    )
