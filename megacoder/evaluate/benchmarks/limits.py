"""What of a task a model is given: within the published limits on tokens, and within its own.

Pieces of other files are given whole or not at all, a prompt loses its first lines. Every source of completions asks
here and counts by its model's tokenizer, so that the same task is the same question for all of them.
"""

from collections.abc import Sequence

from megacoder.core.console import say_once
from megacoder.evaluate.benchmarks.base import Task
from megacoder.evaluate.benchmarks.completions import Request
from megacoder.evaluate.prompts import CountTokens, last_lines, num_that_fit

__all__ = ["certainly_fits", "limited_texts", "num_bytes"]

_CONTEXT_TOKENS = 512
"""Most tokens of other files' code in front of a prompt (CrossCodeEval's `cfc_seq_length`)."""


def limited_texts(requests: Sequence[Request], *, count: CountTokens, frame: int, room: int | None = None) -> list[str]:
    """Context and prompt of each request, in at most its own limit and `room` tokens, less the `frame` around them.

    Says how many prompts did not fit. DataError where not even the last line of one does.
    """
    texts, num_cut = [], 0
    for request in requests:
        limits = [limit - frame for limit in (request.max_prompt_tokens, room) if limit is not None]
        text, num_dropped = _limited(request.task, min(limits) if limits else None, count)
        texts.append(text)
        num_cut += num_dropped > 0
    if num_cut:
        say_once(f"prompts without their first lines, which did not fit: {num_cut:,} of {len(texts):,}")
    return texts


def certainly_fits(request: Request, *, frame: int) -> bool:
    """Whether nothing has to be left out, whatever the tokenizer."""
    if request.max_prompt_tokens is None:
        return True
    task, room = request.task, request.max_prompt_tokens - frame
    context, prompt = num_bytes([task.context_title + "".join(task.context), task.prompt])
    return context <= min(_CONTEXT_TOKENS, room // 2) and context + prompt <= room


def num_bytes(texts: Sequence[str]) -> list[int]:
    """An upper bound on the tokens of each text, for any tokenizer."""
    return [len(text.encode()) for text in texts]


def _limited(task: Task, max_tokens: int | None, count: CountTokens) -> tuple[str, int]:
    """The text, and how many of the prompt's lines did not fit."""
    context = _context(task, _CONTEXT_TOKENS if max_tokens is None else min(_CONTEXT_TOKENS, max_tokens // 2), count)
    if max_tokens is None:
        return context + task.prompt, 0
    prompt, num_dropped = last_lines(task.prompt, max_tokens=max_tokens - sum(count([context])), count=count)
    return context + prompt, num_dropped


def _context(task: Task, room: int, count: CountTokens) -> str:
    """The title and the first pieces that fit into `room` tokens; nothing where not even one does."""
    if not task.context:
        return ""
    title, *sizes = count([task.context_title, *task.context])
    taken = task.context[: num_that_fit(sizes, room - title)]
    return task.context_title + "".join(taken) if taken else ""
