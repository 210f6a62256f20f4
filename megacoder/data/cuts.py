"""Cutting token ids at characters: the ids of each part, as if its text had been encoded by itself.

A cut falls inside a token, or changes how its neighbourhood tokenises. Decoding and re-encoding the file would cost a
hundred times the rest of the data path. But every line break is a token of its own, so lines tokenise independently:
only lines that a cut falls into are decoded, cut and encoded again, all pieces of a file in one call, with line breaks
between them. The result equals encoding each part in full.
"""

from itertools import pairwise

import numpy as np

from megacoder.core.errors import DataError
from megacoder.data.tokenizer import Tokenizer

__all__ = ["CharacterCutter"]


class CharacterCutter:
    """Cuts the ids of one tokenizer; holds the tables that it looks ids up in and no other state."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._characters = tokenizer.characters_per_token()
        self.breaks_line = np.array([token in (b"\n", b"\r") for token in tokenizer.token_bytes])
        """bool (vocabulary,): the ids of line breaks"""
        self._line_break = tokenizer.token_bytes.index(b"\n")

    def character_ends(self, content: np.ndarray) -> np.ndarray:
        """int64 (tokens,): characters up to and with each token."""
        return np.cumsum(self._characters[content], dtype=np.int64)

    def cut(self, content: np.ndarray, ends: np.ndarray, cuts: np.ndarray | list[int]) -> list[list[np.ndarray]]:
        """The len(cuts) + 1 parts of `content`, each as runs of ids that follow each other.

        `cuts` are numbers of characters in rising order, `ends` are the content's `character_ends`. Raises DataError
        where the ids of a line to be cut are no UTF-8.
        """
        lines = self._cut_lines(content, ends, np.asarray(cuts))
        texts: list[str] = []
        for line, inside in lines:
            text = self._text(content[line])
            texts += [text[a:b] for a, b in pairwise([0, *inside, len(text)])]
        pieces = iter(self._encode_all(texts))
        parts: list[list[np.ndarray]] = [[]]
        at = 0
        for line, inside in lines:
            parts[-1] += [content[at : line.start], next(pieces)]
            parts += [[next(pieces)] for _ in inside]
            at = line.stop
        parts[-1].append(content[at:])
        return parts

    def _cut_lines(self, content: np.ndarray, ends: np.ndarray, cuts: np.ndarray) -> list[tuple[slice, list[int]]]:
        """The tokens of each line that a cut falls into, without line breaks, and its cuts in characters of the line.

        A cut right before a line break is at the end of the line that it closes, one right after it at the start of
        the next line, which may be empty.
        """
        breaks = np.flatnonzero(self.breaks_line[content])
        numbers = np.searchsorted(breaks, np.searchsorted(ends, cuts, side="right")).tolist()  # of lines
        first = numbers[0]
        borders = [int(breaks[first - 1]) if first else -1, *breaks[first : numbers[-1] + 1].tolist(), len(content)]
        lines: list[tuple[slice, list[int]]] = []
        for number, cut in zip(numbers, cuts.tolist(), strict=True):
            line = slice(borders[number - first] + 1, borders[number - first + 1])
            if not lines or lines[-1][0] != line:
                lines.append((line, []))
            lines[-1][1].append(cut - (int(ends[line.start - 1]) if line.start else 0))
        return lines

    def _encode_all(self, texts: list[str]) -> list[np.ndarray]:
        """The ids of each text, none of which holds a line break."""
        ids = np.array(self.tokenizer.encode("\n".join(texts)), dtype=np.int64)
        edges = [-1, *np.flatnonzero(ids == self._line_break).tolist(), len(ids)]
        return [ids[a + 1 : b] for a, b in pairwise(edges)]

    def _text(self, ids: np.ndarray) -> str:
        try:
            return self.tokenizer.decode_bytes(ids.tolist()).decode("utf-8")
        except UnicodeDecodeError:
            raise DataError("no UTF-8 in this tokenizer; made with another one?") from None
