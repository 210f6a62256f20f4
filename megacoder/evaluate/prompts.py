"""Prompts within the model's context: what does not fit is cut at line borders, the lines farthest from the gap first.

Where every line break is a token of its own, lines tokenize independently: without some of its lines, a text has its
old tokens less those of these lines. With another tokenizer, where a token may hold the ends of several lines, what is
kept is encoded as a whole, as in training; it is rarely longer than its lines together, and then cut at a token.
"""

import itertools
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass

from megacoder.core.console import counted
from megacoder.core.errors import ConfigError, DataError
from megacoder.data.control_tokens import sentinels_among
from megacoder.data.tokenizer import Tokenizer

__all__ = [
    "SHORTEST_COMPLETION", "SHORTEST_INFILL", "CountTokens", "Prompt", "completion_prompt", "count_with",
    "infill_prompt", "last_lines", "num_that_fit", "sentinels_in",
]  # fmt: skip

SHORTEST_COMPLETION = 2
"""Tokens of the shortest prompt: BOS and one of the text."""
SHORTEST_INFILL = 4
"""Tokens of the shortest infilling prompt: BOS and the marks of prefix, hole and end."""
CountTokens = Callable[[Sequence[str]], Sequence[int]]
"""The number of tokens of each text, without any that a tokenizer adds around it."""


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """What a model continues."""

    tokens: list[int]
    num_dropped_lines: int
    """lines of the text that did not fit"""


def completion_prompt(tokenizer: Tokenizer, text: str, *, max_tokens: int) -> Prompt:
    """BOS, if there is one, and the last lines of `text`; EOS alone where that leaves nothing to continue.

    Raises DataError if not even the last line fits.
    """
    kept, num_dropped = last_lines(text, max_tokens=max_tokens - 1, count=count_with(tokenizer))
    tokens = tokenizer.encode(kept)
    return Prompt(
        tokens=[*tokenizer.beginning, *tokens[max(0, len(tokens) - (max_tokens - 1)) :]] or [tokenizer.eos_id],
        num_dropped_lines=num_dropped,
    )


def last_lines(text: str, *, max_tokens: int, count: CountTokens) -> tuple[str, int]:
    """The last lines of `text` that fit, and how many do not. Raises DataError if not even the last line fits."""
    lines = _lines(text)
    sizes = count(lines)
    kept = num_that_fit(reversed(sizes), max_tokens)
    if lines and not kept:
        size = counted(sizes[-1], "token", "tokens")
        raise DataError(f"the last line of the prompt has {size}; there is room for {max_tokens}")
    return "".join(lines[len(lines) - kept :]), len(lines) - kept


def count_with(tokenizer: Tokenizer) -> CountTokens:
    """What counts the tokens of texts."""
    return lambda texts: [len(tokens) for tokens in tokenizer.encode_batch(texts)]


def infill_prompt(
    tokenizer: Tokenizer, prefix: str, suffix: str, *, max_tokens: int, spm: bool = False
) -> Prompt:  # fmt: skip
    """Any BOS, `<fim_begin> prefix <fim_hole> suffix <fim_end>`; the model continues with the middle and EOS.

    This is the paper's PSM order. `spm`: `<fim_begin> <fim_hole> suffix <fim_end> prefix`, for a model that was trained
    in that order (`FimConfig.spm_rate`). Where both sides are too long each gets half of the room; room that one
    side does not need goes to the other. Raises DataError if `max_tokens` cannot hold the four control tokens.
    """
    room = max_tokens - SHORTEST_INFILL
    if room < 0:
        size = counted(max_tokens, "token", "tokens")
        raise DataError(f"a prompt of {size} cannot hold the {SHORTEST_INFILL} control tokens of an infilling prompt")
    before, after = _lines(prefix), _lines(suffix)
    before_sizes, after_sizes = map(count_with(tokenizer), (before, after))
    num_after = num_that_fit(after_sizes, max(room // 2, room - sum(before_sizes)))
    num_before = num_that_fit(reversed(before_sizes), room - sum(after_sizes[:num_after]))
    behind = tokenizer.encode("".join(after[:num_after]))[:room]
    ahead = tokenizer.encode("".join(before[len(before) - num_before :]))
    ahead = ahead[max(0, len(ahead) + len(behind) - room) :]
    begin, hole, end = tokenizer.fim_begin_id, tokenizer.fim_hole_id, tokenizer.fim_end_id
    sides = [begin, hole, *behind, end, *ahead] if spm else [begin, *ahead, hole, *behind, end]
    return Prompt(
        tokens=[*tokenizer.beginning, *sides],
        num_dropped_lines=len(before) + len(after) - num_before - num_after,
    )


def sentinels_in(vocabulary: Container[str], *, whose: str) -> Mapping[str, str]:
    """The marks of fill-in-the-middle that `vocabulary` has; ConfigError where it has none: they would be text."""
    sentinels = sentinels_among(vocabulary)
    if missing := [text for text in sentinels.values() if text not in vocabulary]:
        raise ConfigError(f"{whose} has no {missing[0]}, nor marks of other models: it cannot be asked to fill in")
    return sentinels


def _lines(text: str) -> list[str]:
    """The lines with their line breaks; none is empty."""
    *lines, last = text.split("\n")
    return [*(f"{line}\n" for line in lines), *([last] if last else [])]


def num_that_fit(sizes: Iterable[int], room: int) -> int:
    """How many of the first `sizes` have at most `room` together."""
    return sum(1 for _ in itertools.takewhile(lambda total: total <= room, itertools.accumulate(sizes)))
