"""Cutting token ids at characters: the ids of each part, as if its text had been encoded by itself.

A cut may fall inside a token, or change how the text around it tokenizes. Decoding and re-encoding the file would cost
a hundred times the rest of the data path. But at certain places, as frequent as words, a text can be cut freely (see
`megacoder.data.cutting_places`): only the stretches between two of them that a cut falls into are decoded, cut and
encoded again. Where line breaks are tokens of their own, all pieces of a file are encoded in one call, with line breaks
between them. The result equals encoding each part in full.
"""

from itertools import pairwise

import numpy as np

from megacoder.core.errors import DataError
from megacoder.data.cutting_places import CuttingPlaces
from megacoder.data.tokenizer import Tokenizer

__all__ = ["CharacterCutter"]


class CharacterCutter:
    """Cuts the ids of one tokenizer; holds lookup tables by id and no other state."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._characters = tokenizer.characters_per_token()
        self._places = CuttingPlaces(tokenizer)
        self.breaks_line = np.array([token.endswith((b"\n", b"\r")) for token in tokenizer.token_bytes])
        """bool (vocabulary,): the ids that end a line"""
        self._line_break = tokenizer.token_bytes.index(b"\n")

    def character_ends(self, content: np.ndarray) -> np.ndarray:
        """int64 (tokens,): characters up to and including each token."""
        return np.cumsum(self._characters[content], dtype=np.int64)

    def cut(self, content: np.ndarray, ends: np.ndarray, cuts: np.ndarray | list[int]) -> list[list[np.ndarray]]:
        """The len(cuts) + 1 parts of `content`, each as consecutive runs of ids.

        `cuts` are positions in characters, in rising order, `ends` are the content's `character_ends`. Raises DataError
        where the ids around a cut are not UTF-8.
        """
        stretches = self._stretches(content, ends, np.asarray(cuts))
        texts: list[str] = []
        for stretch, inside in stretches:
            text = self._text(content[stretch])
            texts += [text[a:b] for a, b in pairwise([0, *inside, len(text)])]
        pieces = iter(self._encode_all(texts))
        parts: list[list[np.ndarray]] = [[]]
        at = 0
        for stretch, inside in stretches:
            parts[-1] += [content[at : stretch.start], next(pieces)]
            parts += [[next(pieces)] for _ in inside]
            at = stretch.stop
        parts[-1].append(content[at:])
        return parts

    def _stretches(self, content: np.ndarray, ends: np.ndarray, cuts: np.ndarray) -> list[tuple[slice, list[int]]]:
        """The tokens between the borders around each cut, and the cuts in characters from there; none at a border.

        They hold no line break that is a token of its own. The characters on either side of a border, which alone
        decide it, stay in place.
        """
        borders = self._places.borders(content)
        behind = np.searchsorted(borders, np.searchsorted(ends, cuts, side="right"), side="right")  # next border
        starts = borders[behind - 1]
        inside = cuts - np.where(starts > 0, ends[starts - 1], 0)
        stops = np.where(inside > 0, borders[np.minimum(behind, len(borders) - 1)], starts)
        stretches: list[tuple[slice, list[int]]] = []
        for start, stop, cut in zip(starts.tolist(), stops.tolist(), inside.tolist(), strict=True):
            if not stretches or stretches[-1][0] != slice(start, stop):
                stretches.append((slice(start, stop), []))
            stretches[-1][1].append(cut)
        return stretches

    def _encode_all(self, texts: list[str]) -> list[np.ndarray]:
        """The ids of each text, none of which holds a line break that is a token of its own."""
        if not self.tokenizer.splits_lines:
            return [self._encode(text) for text in texts]
        ids = self._encode("\n".join(texts))
        edges = [-1, *np.flatnonzero(ids == self._line_break).tolist(), len(ids)]
        return [ids[a + 1 : b] for a, b in pairwise(edges)]

    def _encode(self, text: str) -> np.ndarray:
        parts = self._places.cut(text)
        return np.concatenate([np.array(self.tokenizer.encode(part), dtype=np.int64) for part in parts])

    def _text(self, ids: np.ndarray) -> str:
        try:
            return self.tokenizer.decode_bytes(ids.tolist()).decode("utf-8")
        except UnicodeDecodeError:
            raise DataError("not UTF-8 in this tokenizer; was it made with a different one?") from None
