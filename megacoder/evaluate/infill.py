"""Single-line infilling: a line of a held-out file is removed, and the model fills it in from both sides.

The hole is a whole line, indentation included but not the line break, as in the single-line task of Fried et al.
(arXiv:2204.05999) and SantaCoder's benchmark (arXiv:2301.03988); the sentinels are around it, so that no token of the
prompt straddles it. Only lines with something to get right are asked for (`is_worth_asking`). The model decodes
greedily to EOS or the end of the line.

Two scores, both after trailing whitespace is stripped; indentation counts. *Exact match*: the line is the same.
*Edit similarity*: 1 - Levenshtein distance / length of the longer line. Two baselines that know no code show what the
scores are worth: the most frequent line of the training corpus, and a copy of the line above the hole.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from megacoder.core.console import progress
from megacoder.core.errors import DataError
from megacoder.corpus.languages import LANGUAGES
from megacoder.data.tokenizer import Tokenizer
from megacoder.evaluate.generate import generate
from megacoder.evaluate.held_out import SourceFile
from megacoder.evaluate.prompts import infill_prompt
from megacoder.evaluate.similarity import edit_similarity
from megacoder.evaluate.stops import StopStrings
from megacoder.model.transformer import Transformer

__all__ = [
    "PROTOCOL", "InfillResult", "InfillScore", "InfillSummary", "InfillTask", "choose_tasks", "fill_lines",
    "is_worth_asking", "line_above", "most_frequent_line", "score", "summarize",
]  # fmt: skip

MIN_CHARACTERS = 10
"""Characters other than whitespace that a line must have to be asked for."""
PROTOCOL = 1
"""Raised when what is asked or how it is judged changes, so that scores of one run's checkpoints are not mixed."""
MAX_NEW_TOKENS = 64
"""Room for an answer; a line that needs more cannot be matched, and counts as missed."""


@dataclass(frozen=True, kw_only=True)
class InfillTask:
    """A line to fill in; prefix + truth + suffix is the file."""

    repo: str
    path: str
    line: int
    """from 1, in the file as the corpus holds it: line 1 is the path comment"""
    prefix: str
    truth: str
    suffix: str


@dataclass(frozen=True, kw_only=True)
class InfillResult:
    """What was filled in, and how good it is."""

    task: InfillTask
    completion: str
    exact_match: bool
    edit_similarity: float
    """0 to 1"""

    def row(self) -> dict[str, Any]:
        """The row of a JSONL file: everything but the rest of the source file."""
        row = asdict(self)
        task = row.pop("task")
        return {key: task[key] for key in ("repo", "path", "line", "truth")} | row


@dataclass(frozen=True, kw_only=True)
class InfillScore:
    """Means over the tasks."""

    exact_match: float
    """share of lines that are the same, 0 to 1"""
    edit_similarity: float
    """0 to 1"""


@dataclass(frozen=True, kw_only=True)
class InfillSummary:
    """The model beside the baselines, on the same lines."""

    num_tasks: int
    num_files: int
    """files that the lines were taken from"""
    model: InfillScore
    line_above: InfillScore
    """the nearest line above that is not blank, repeated"""
    most_frequent_line: InfillScore | None
    """the training corpus's most frequent line that is worth asking for; None where no training corpus was given"""


def choose_tasks(files: Iterable[SourceFile], *, num_tasks: int, seed: int = 0) -> list[InfillTask]:
    """At most `num_tasks` lines, from as many files as possible, in an order that depends on the seed alone.

    Every line has a key, a hash of seed, repository, path and line number; each file offers its lines in the order of
    their keys, and lines are taken in the order of (place in the file's offer, key). So adding or reordering a file
    does not change the order of other files' lines. Raises DataError if there is no line to ask for.
    """
    offers: list[tuple[int, bytes, SourceFile, int]] = []
    for file in files:
        lines = file.content.split("\n")
        numbers = [number for number in range(1, len(lines)) if is_worth_asking(lines[number], file.language)]
        keyed = sorted((_key(seed, file, number), number) for number in numbers)[:num_tasks]
        offers += [(place, key, file, number) for place, (key, number) in enumerate(keyed)]
    if not offers:
        raise DataError(
            f"no line to fill in: the held-out files hold no code line of {MIN_CHARACTERS} characters or more"
        )
    offers.sort(key=lambda offer: offer[:2])
    return [_task(file, number) for _, _, file, number in offers[:num_tasks]]


def is_worth_asking(line: str, language: str) -> bool:
    """Whether `line` is more than a comment and has at least MIN_CHARACTERS characters besides whitespace."""
    opening = LANGUAGES[language].comment[0].strip() if language in LANGUAGES else "#"
    openings = ("//", "/*", "* ", "*/") if opening in ("//", "/*") else (opening,)
    return len("".join(line.split())) >= MIN_CHARACTERS and not line.lstrip().startswith(openings)


def fill_lines(
    model: Transformer,
    tokenizer: Tokenizer,
    tasks: Sequence[InfillTask],
    *,
    max_new_tokens: int = MAX_NEW_TOKENS,
    max_prompt_tokens: int | None = None,
    spm: bool = False,
    batch_size: int = 32,
    quiet: bool = False,
) -> list[InfillResult]:
    """The model's answer to each task, scored; files too long for the model lose the lines farthest from the hole.

    `max_prompt_tokens` keeps prompts within the length that the model was trained to fill in
    (`FimConfig.context_tokens`); `spm` asks in suffix-prefix-middle order.
    """
    room = model.config.max_position_embeddings - max_new_tokens
    room = room if max_prompt_tokens is None else min(room, max_prompt_tokens)
    prompts = [infill_prompt(tokenizer, task.prefix, task.suffix, max_tokens=room, spm=spm).tokens for task in tasks]
    results: dict[int, InfillResult] = {}
    order = sorted(range(len(tasks)), key=lambda index: len(prompts[index]))
    with progress("infill", len(tasks), quiet=quiet) as bar:
        for first in range(0, len(order), batch_size):
            batch = order[first : first + batch_size]
            watching = [StopStrings(tokenizer, ["\n"]) for _ in batch]
            generate(
                model, [prompts[index] for index in batch], max_new_tokens=max_new_tokens, stop_ids=tokenizer.end_ids,
                num_ids=tokenizer.vocab_size,
                watcher=lambda place, tokens, watching=watching: watching[place].add(tokens[-1]),  # type: ignore[misc]
            )  # fmt: skip
            for index, watched in zip(batch, watching, strict=True):
                results[index] = score(tasks[index], watched.finish())
            bar.update(len(results))
    return [results[index] for index in range(len(tasks))]


def summarize(results: Sequence[InfillResult], *, frequent_line: str | None = None) -> InfillSummary:
    """The means, and those of the baselines on the same tasks; DataError where there is no result."""
    if not results:
        raise DataError("no infilling results to summarize")
    tasks = [result.task for result in results]
    return InfillSummary(
        num_tasks=len(tasks),
        num_files=len({(task.repo, task.path) for task in tasks}),
        model=_mean(results),
        line_above=_mean([score(task, line_above(task)) for task in tasks]),
        most_frequent_line=None if frequent_line is None else _mean([score(task, frequent_line) for task in tasks]),
    )


def line_above(task: InfillTask) -> str:
    """The nearest line above the hole that is not blank, empty where there is none."""
    return next((line for line in reversed(task.prefix.split("\n")) if line.strip()), "")


def most_frequent_line(files: Iterable[SourceFile]) -> str | None:
    """The line worth asking for that occurs most often, the first of them at a tie; None without any."""
    counts: Counter[str] = Counter()
    for file in files:
        counts.update(line for line in file.content.split("\n")[1:] if is_worth_asking(line, file.language))
    return counts.most_common(1)[0][0] if counts else None


def score(task: InfillTask, completion: str) -> InfillResult:
    """Compares `completion` with the truth."""
    answer, truth = completion.rstrip(), task.truth.rstrip()
    return InfillResult(
        task=task,
        completion=completion,
        exact_match=answer == truth,
        edit_similarity=edit_similarity(answer, truth),
    )


def _mean(results: Sequence[InfillResult]) -> InfillScore:
    return InfillScore(
        exact_match=sum(result.exact_match for result in results) / len(results),
        edit_similarity=sum(result.edit_similarity for result in results) / len(results),
    )


def _task(file: SourceFile, number: int) -> InfillTask:
    lines = file.content.split("\n")
    return InfillTask(
        repo=file.repo,
        path=file.path,
        line=number + 1,
        prefix="".join(line + "\n" for line in lines[:number]),
        truth=lines[number],
        suffix="".join("\n" + line for line in lines[number + 1 :]),
    )


def _key(seed: int, file: SourceFile, number: int) -> bytes:
    return hashlib.blake2b(f"{seed}\0{file.repo}\0{file.path}\0{number}".encode(), digest_size=16).digest()
