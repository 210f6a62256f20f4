"""`megacoder eval infill`: single-line infilling on held-out files, or (--data FILE.jsonl) on a published set."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path

from megacoder.cli.eval_benchmark import infill as run_benchmark
from megacoder.cli.eval_inputs import answers_of, settings_of, texts_content
from megacoder.cli.follow import follow
from megacoder.cli.loading import Following, Loading
from megacoder.cli.model_folder import load_model, prompt_room, share_model
from megacoder.core.config import parse_args
from megacoder.core.console import table
from megacoder.core.errors import ConfigError
from megacoder.core.files import write_text
from megacoder.evaluate.held_out import read_source_files
from megacoder.evaluate.infill import (
    MAX_NEW_TOKENS,
    PROTOCOL,
    InfillResult,
    InfillScore,
    InfillSummary,
    InfillTask,
    choose_tasks,
    fill_lines,
    most_frequent_line,
    summarize,
)
from megacoder.evaluate.prompts import SHORTEST_INFILL
from megacoder.parallel.tensor import ALONE, TensorParallel

__all__ = ["main", "print_summary"]


@dataclass(frozen=True, kw_only=True)
class EvalInfillArgs:
    """Remove lines from held-out files and let the model fill them in.

    With --data FILE.jsonl a published infilling set is scored instead, like any benchmark: see
    `megacoder eval infill --data FILE.jsonl --help` for its options.
    """

    model: Path
    """Hugging Face folder, run or checkpoint"""
    data: tuple[Path, ...]
    """held-out Parquet files, or folders of them, as `corpus build` writes them; or the .jsonl of a published set"""
    train: tuple[Path, ...] = ()
    """Parquet files or folders of the training corpus, for the baseline of its most frequent line"""
    num_tasks: int = 200
    """lines to fill in, from as many files as possible"""
    seed: int = 0
    """seed for the choice of lines"""
    max_new_tokens: int = MAX_NEW_TOKENS
    """longest answer in tokens"""
    max_prompt_tokens: int | None = None
    """longest prompt in tokens, for a model trained on parts of files (data.stream.fim.context_tokens)"""
    spm: bool = False
    """ask with the suffix first, for a model trained in that order (data.stream.fim.spm_rate)"""
    batch_size: int = 32
    """answers generated at a time; in bf16 another number rounds otherwise, which changes some answers"""
    out: Path | None = None
    """JSONL file to write every line, its truth and the answer to; with --follow, a folder for a file per
    checkpoint"""
    json: bool = False
    """print the summary as JSON, with --follow a line per checkpoint"""
    loading: Loading = field(default_factory=Loading)
    following: Following = field(default_factory=Following)

    def __post_init__(self) -> None:
        for name in ("num_tasks", "batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be at least 1")
        self.following.check(self.model, self.loading, train=self.train)


def main(argv: Sequence[str]) -> None:
    """Prints the scores beside the baselines."""
    if _is_published_set(argv):
        run_benchmark(argv)
        return
    args = parse_args(EvalInfillArgs, argv, prog="megacoder eval infill", flat=True)
    tasks = choose_tasks(read_source_files(args.data), num_tasks=args.num_tasks, seed=args.seed)
    if args.following.follow:
        _follow(args, tasks)
        return
    frequent_line = most_frequent_line(read_source_files(args.train)) if args.train else None
    tp = share_model(args.loading.tp, ["eval", "infill", *argv])
    if tp is None:
        return
    summary = summarize(_fill(args, tasks, args.model, tp, out=args.out), frequent_line=frequent_line)
    if args.json:
        print(json.dumps(asdict(summary)))
    else:
        print_summary(summary)


def _fill(
    args: EvalInfillArgs, tasks: Sequence[InfillTask], folder: Path, tp: TensorParallel, *, out: Path | None
) -> list[InfillResult]:
    model, tokenizer = load_model(folder, args.loading, tp=tp)
    prompt_room(model, args.max_new_tokens, shortest=SHORTEST_INFILL)
    results = fill_lines(
        model,
        tokenizer,
        tasks,
        max_new_tokens=args.max_new_tokens,
        max_prompt_tokens=args.max_prompt_tokens,
        spm=args.spm,
        batch_size=args.batch_size,
        quiet=tp.rank > 0,
    )
    if out is not None and tp.rank == 0:
        write_text(out, "".join(json.dumps(result.row(), ensure_ascii=False) + "\n" for result in results))
    return results


def _follow(args: EvalInfillArgs, tasks: Sequence[InfillTask]) -> None:
    """Scores the checkpoints of the run `args.model`."""

    def score(checkpoint: Path) -> dict[str, float]:
        out = None if args.out is None else args.out / f"{answers_of(checkpoint)}.jsonl"
        return asdict(summarize(_fill(args, tasks, checkpoint, ALONE, out=out), frequent_line=None).model)

    asked = texts_content(text for task in tasks for text in (task.prefix, task.truth, task.suffix))
    settings = settings_of("infill", args, {"data": asked}, protocol=PROTOCOL)
    follow(args.model, args.following.follow_as or "infill", score, settings=settings, as_json=args.json)


def _is_published_set(argv: Sequence[str]) -> bool:
    """Whether --data is a JSONL file, which held-out files never are."""
    given = [word for option, word in pairwise(argv) if option == "--data"]
    given += [word for word in argv if word.startswith("--data=")]
    return any(word.removesuffix(".gz").removesuffix(".zst").endswith(".jsonl") for word in given)


def print_summary(summary: InfillSummary) -> None:
    """The scores as a table on stdout."""
    rows = [("model", summary.model), ("the line above, repeated", summary.line_above)]
    if summary.most_frequent_line is not None:
        rows.append(("the most frequent line", summary.most_frequent_line))
    table(
        "Single-line infilling",
        ["", "exact match", "edit similarity"],
        [[name, *_cells(score)] for name, score in rows],
    )
    print(f"{summary.num_tasks:,} lines of {summary.num_files:,} held-out files")


def _cells(score: InfillScore) -> list[str]:
    return [f"{score.exact_match:.1%}", f"{score.edit_similarity:.1%}"]
