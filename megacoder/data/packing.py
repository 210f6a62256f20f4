"""Documents into windows of S tokens, as the paper does (concatenate and cut) or whole where they fit (best fit).

A packer is one stream of one dataset: a cursor over the documents dealt to it that fills one window after another.
Its state is three integers.

Concatenated: documents follow each other and are cut every S tokens; a window begins where the last one ended.

Best fit: documents are taken until they would fill some windows (`BEST_FIT_WINDOWS`), longer ones than S are cut into
pieces of S and a rest, and all pieces are laid into windows, the longest first, each into the fullest window that has
room (best-fit decreasing; Ding et al., arXiv:2404.10830). Windows come in a keyed order, as those with long pieces are
made first. What stays free is padded, a document of its own without labels. Groups do not depend on each other, so that
a packer can be taken up inside one without the ones before; it keeps the group's tokens, which is why their number is
small.

Legend: S tokens of a window.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from megacoder.core.errors import DataError
from megacoder.data.endless import Deal, EndlessDocuments
from megacoder.data.permutation import permute
from megacoder.ops.cross_entropy import IGNORE_INDEX

__all__ = ["BEST_FIT_WINDOWS", "BestFit", "Concatenated", "Packer", "best_fit"]

BEST_FIT_WINDOWS = 16
"""Windows that a best-fit packer fills together, at least."""


class Packer(Protocol):
    """One stream of one dataset."""

    deal: Deal
    """which documents come"""

    def fill(self, tokens: np.ndarray, labels: np.ndarray, starts: np.ndarray) -> None:
        """Writes the next window into rows of S, int64, int64 and bool.

        Labels are the next token, or IGNORE_INDEX at the end of a document; `starts` is True at first tokens of
        documents and of the window, and False on entry.
        """

    def position(self) -> list[int]:
        """Three integers, the first of them the index of a document of the deal."""

    def move(self, *position: int) -> None:
        """Back or forth to a `position`."""


class Concatenated:
    """Concatenate and cut. Its position: document of the deal, file in it, token of the file."""

    def __init__(self, source: EndlessDocuments, stream: int, *, across_documents: bool) -> None:
        """With `across_documents` the last token of a document has the next one's first as its label."""
        self._source, self._across_documents = source, across_documents
        self.deal = Deal(source, stream)
        self.move(0, 0, 0)

    def position(self) -> list[int]:
        return [self._document, self._file, self._offset]

    def move(self, *position: int) -> None:
        self._document, self._file, self._offset = position
        self._ids: np.ndarray | None = None
        self._opens = False  # whether the file under the cursor holds its document's first token

    def fill(self, tokens: np.ndarray, labels: np.ndarray, starts: np.ndarray) -> None:
        filled, size = 0, len(tokens)
        starts[0] = True
        while True:
            ids, offset = self._current(), self._offset
            at_edge = self._opens and offset == 0
            if filled:  # what the token before was waiting for
                labels[filled - 1] = IGNORE_INDEX if at_edge and not self._across_documents else ids[offset]
            if filled == size:
                return
            taken = min(len(ids) - offset, size - filled)
            stop = filled + taken
            tokens[filled:stop] = ids[offset : offset + taken]
            labels[filled : stop - 1] = tokens[filled + 1 : stop]
            if at_edge:
                starts[filled] = True
            self._offset, filled = offset + taken, stop

    def _current(self) -> np.ndarray:
        """The ids of the file under the cursor, after moving to the next one that has any left."""
        ids = self._ids
        while ids is None or self._offset == len(ids):
            number, epoch = self.deal[self._document]
            files = self._source.dataset.document_sequences(number)
            if ids is not None:
                self._file, self._offset, ids = self._file + 1, 0, None
            if self._file >= len(files):
                self._document, self._file, self._offset = self._document + 1, 0, 0
                continue
            ids = self._source.read(files[self._file], epoch=epoch, opens_document=self._file == 0)
            self._opens = self._file == 0 or not (self._source.add_bos or self._any_tokens(files[: self._file]))
            if self._offset > len(ids):
                raise DataError(
                    f"{self._source.dataset.prefix}: the data position is token {self._offset} of sequence "
                    f"{files[self._file]}, which has {len(ids)}; another dataset?"
                )
        self._ids = ids
        return ids

    def _any_tokens(self, files: range) -> bool:
        return any(len(self._source.dataset.sequence(file)) for file in files)


class BestFit:
    """Best-fit decreasing. Its position: document of the deal that a group begins with, window in the group, and 0."""

    def __init__(self, source: EndlessDocuments, stream: int, *, pad_id: int) -> None:
        self._source, self._pad_id = source, pad_id
        self.deal = Deal(source, stream)
        self.move(0, 0, 0)

    def position(self) -> list[int]:
        return [self._first, self._window, 0]

    def move(self, *position: int) -> None:
        self._first, self._window, _ = position
        self._windows: list[list[tuple[np.ndarray, int, int]]] = []  # pieces: ids of a document, and a range of them

    def fill(self, tokens: np.ndarray, labels: np.ndarray, starts: np.ndarray) -> None:
        if not self._windows:
            self._next, self._windows = self._group(len(tokens))
            if self._window >= len(self._windows):
                raise DataError(
                    f"{self._source.dataset.prefix}: the data position is window {self._window} of a group of "
                    f"{len(self._windows)}; another dataset?"
                )
        filled = 0
        for ids, start, stop in self._windows[self._window]:
            end = filled + stop - start
            tokens[filled:end] = ids[start:stop]
            labels[filled : end - 1] = tokens[filled + 1 : end]
            labels[end - 1] = ids[stop] if stop < len(ids) else IGNORE_INDEX
            starts[filled] = True
            filled = end
        if filled < len(tokens):
            tokens[filled:], labels[filled:] = self._pad_id, IGNORE_INDEX
            starts[filled] = True
        self._window += 1
        if self._window == len(self._windows):
            self.move(self._next, 0, 0)

    def _group(self, size: int) -> tuple[int, list[list[tuple[np.ndarray, int, int]]]]:
        """The document after the group, and its windows as pieces."""
        pieces: list[tuple[np.ndarray, int, int]] = []
        index, total = self._first, 0
        while total < BEST_FIT_WINDOWS * size:
            number, epoch = self.deal[index]
            ids = self._source.document(number, epoch=epoch)
            pieces += [(ids, start, min(start + size, len(ids))) for start in range(0, len(ids), size)]
            index, total = index + 1, total + len(ids)
        windows = best_fit([stop - start for _, start, stop in pieces], size)
        order = permute(np.arange(len(windows)), len(windows), seed=self._source.seed + self.deal.stream, epoch=index)
        return index, [[pieces[piece] for piece in windows[window]] for window in order.tolist()]


def best_fit(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Windows of at most `size` as lists of pieces, for pieces of these lengths, each from 1 to `size`."""
    windows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free tokens, window), in rising order
    for piece in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        fullest = bisect_left(room, (lengths[piece], 0))
        if fullest < len(room):
            free, window = room.pop(fullest)
        else:
            free, window = size, len(windows)
            windows.append([])
        windows[window].append(piece)
        if free > lengths[piece]:
            insort(room, (free - lengths[piece], window))
    return windows
