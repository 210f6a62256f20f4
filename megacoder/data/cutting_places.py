"""Where a text can be cut so that its parts, each encoded by itself, have the ids of the whole.

A pre-tokenizer splits text into words that are encoded separately, but where it splits depends on the text around. At
three kinds of places it does not: the two characters there decide. They are before and after a line break, after a
digit, and between an ASCII letter and ASCII that is not a letter. Which of them a tokenizer splits at is tried here;
none may be inside an added token that a text can hold, such as Qwen's <tool_call>. In source text such a place is never
far.

So a text of any length is encoded in bounded memory, where `tokenizers` takes 260 bytes a character, and a cut through
encoded text changes few ids.
"""

import itertools
import re
import string

import numpy as np

from megacoder.core.errors import DataError
from megacoder.data.tokenizer import Tokenizer

__all__ = ["CuttingPlaces"]

_PART_CHARACTERS = 1 << 20
_LONGEST_RUN = 1 << 24  # characters without a place; 2 GB in `tokenizers`
_LINE_BREAKS = "\r\n"
_MAY_FOLLOW_A_LETTER = string.digits + string.punctuation + " \t"
_AROUND = ("", " ", ".", "1", "é")
_AFTER = (*_AROUND, "s")  # "'s" may belong to the word, as with o200k's split
_BEHIND, _BETWEEN, _BEFORE = 1, 2, 4  # the text to the left decides, both sides, the text to the right


class CuttingPlaces:
    """The places of one tokenizer. Matches of `pattern` in text end at them, except at those before line breaks."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        behind = line_breaks = _LINE_BREAKS if tokenizer.splits_lines else ""
        inside = {pair for text in tokenizer.added_texts for pair in itertools.pairwise(text)}
        if tokenizer.splits("a12=3 4") == ["a", "1", "2", "=", "3", " ", "4"]:
            behind += "".join(digit for digit in string.digits if all(left != digit for left, _ in inside))
        held = {right for left, right in inside if left in string.ascii_letters}
        followers = "".join(one for one in _splitting_followers(tokenizer) if one not in held)
        kinds = [f"[{behind}]"] if behind else []
        kinds += [f"[A-Za-z](?=[{re.escape(followers)}])"] if followers else []
        self.pattern = re.compile("|".join(kinds) or "(?!)")
        left = {byte.encode(): _BEHIND for byte in behind} | {byte.encode(): _BETWEEN for byte in string.ascii_letters}
        right = {byte.encode(): _BETWEEN for byte in followers} | {byte.encode(): _BEFORE for byte in line_breaks}
        ends = [left.get(token[-1:], 0) | _BEFORE for token in tokenizer.token_bytes]
        begins = [right.get(token[:1], 0) | _BEHIND for token in tokenizer.token_bytes]
        self._sides = np.array(ends, dtype=np.uint8) | np.array(begins, dtype=np.uint8) << 4

    def borders(self, ids: np.ndarray) -> np.ndarray:
        """int64, rising: the tokens of an encoded text before which it can be cut, 0 and len(ids) among them."""
        can_be_cut = np.empty(len(ids) + 1, dtype=bool)
        can_be_cut[0] = can_be_cut[-1] = True
        sides = self._sides[ids]
        np.not_equal(sides[:-1] & (sides[1:] >> 4), 0, out=can_be_cut[1:-1])
        return np.flatnonzero(can_be_cut)

    def cut(self, text: str) -> list[str]:
        """`text` in parts of about a million characters.

        Raises DataError where 16 million characters have no place to cut, which no source text has.
        """
        if len(text) <= _PART_CHARACTERS:
            return [text]
        bounds = [0]
        while len(text) - bounds[-1] > _PART_CHARACTERS:
            place = self.pattern.search(text, bounds[-1] + _PART_CHARACTERS - 1, bounds[-1] + _LONGEST_RUN)
            if place is None:
                break
            bounds.append(place.end())
        if len(text) - bounds[-1] > _LONGEST_RUN:
            start = text[bounds[-1] : bounds[-1] + 20]
            raise DataError(
                f"{_LONGEST_RUN:,} characters without a line break, digit or end of a word, from {start!r} on"
            )
        return [text[start:end] for start, end in itertools.pairwise([*bounds, len(text)])]


def _splitting_followers(tokenizer: Tokenizer) -> str:
    """The characters before which a word of ASCII letters ends in every probe, whatever is around the two."""
    probes = [
        (follower, f"{before}ab", f"{follower}{after}\n")
        for follower in _MAY_FOLLOW_A_LETTER
        for before in _AROUND
        for after in (*_AFTER, follower)
    ]
    splits = tokenizer.splits("".join(word + rest for _, word, rest in probes))
    places = set(itertools.accumulate(map(len, splits)))
    starts = itertools.accumulate((len(word) + len(rest) for _, word, rest in probes), initial=0)
    inside = {probe[0] for probe, start in zip(probes, starts, strict=False) if start + len(probe[1]) not in places}
    return "".join(follower for follower in _MAY_FOLLOW_A_LETTER if follower not in inside)
