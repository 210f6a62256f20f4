"""Prompts within the model's context: what does not fit is cut at line borders, the lines farthest from the gap first.

Every line break is a token of its own, so that lines tokenize independently: without some of its lines, a text has its
old tokens less those of these lines.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from megacoder.core.console import counted
from megacoder.core.errors import DataError
from megacoder.data.tokenizer import Tokenizer

__all__ = ["SHORTEST_COMPLETION", "SHORTEST_INFILL", "Prompt", "completion_prompt", "infill_prompt"]

SHORTEST_COMPLETION = 2
"""Tokens of the shortest prompt: BOS and one of the text."""
SHORTEST_INFILL = 4
"""Tokens of the shortest infilling prompt: BOS and the marks of prefix, hole and end."""


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """What a model continues."""

    tokens: list[int]
    num_dropped_lines: int
    """lines of the text that did not fit"""


def completion_prompt(tokenizer: Tokenizer, text: str, *, max_tokens: int) -> Prompt:
    """BOS and the last lines of `text`. Raises DataError if not even the last line fits."""
    lines = _encode_lines(tokenizer, text)
    kept = _take(reversed(lines), max_tokens - 1)
    if lines and not kept:
        size = counted(len(lines[-1]), "token", "tokens")
        raise DataError(f"the last line of the prompt has {size}; there is room for {max_tokens - 1}")
    return Prompt(
        tokens=[tokenizer.bos_id, *(token for line in reversed(kept) for token in line)],
        num_dropped_lines=len(lines) - len(kept),
    )


def infill_prompt(tokenizer: Tokenizer, prefix: str, suffix: str, *, max_tokens: int) -> Prompt:
    """BOS, `<fim_begin> prefix <fim_hole> suffix <fim_end>`; the model continues with the middle and EOS.

    This is the paper's PSM order, as trained. Where both sides are too long each gets half of the room; room that one
    side does not need goes to the other. Raises DataError if `max_tokens` cannot hold the four control tokens.
    """
    room = max_tokens - SHORTEST_INFILL
    if room < 0:
        size = counted(max_tokens, "token", "tokens")
        raise DataError(f"a prompt of {size} cannot hold the {SHORTEST_INFILL} control tokens of an infilling prompt")
    before, after = _encode_lines(tokenizer, prefix), _encode_lines(tokenizer, suffix)
    suffix_lines = _take(after, max(room // 2, room - sum(map(len, before))))
    prefix_lines = _take(reversed(before), room - sum(map(len, suffix_lines)))[::-1]
    return Prompt(
        tokens=[
            tokenizer.bos_id,
            tokenizer.fim_begin_id, *(token for line in prefix_lines for token in line),
            tokenizer.fim_hole_id, *(token for line in suffix_lines for token in line),
            tokenizer.fim_end_id,
        ],
        num_dropped_lines=len(before) + len(after) - len(prefix_lines) - len(suffix_lines),
    )  # fmt: skip


def _encode_lines(tokenizer: Tokenizer, text: str) -> list[list[int]]:
    lines = [line + "\n" for line in text.split("\n")]
    lines[-1] = lines[-1][:-1]  # what follows the last line break, perhaps nothing
    return [tokens for tokens in tokenizer.encode_batch(lines) if tokens]


def _take(lines: Iterable[list[int]], room: int) -> list[list[int]]:
    """The first of `lines` that fit into `room` tokens together."""
    taken = []
    for line in lines:
        room -= len(line)
        if room < 0:
            break
        taken.append(line)
    return taken
