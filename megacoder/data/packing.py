"""Packs documents into windows of S tokens, as the paper does (concatenate and cut) or whole where they fit (best fit).

A packer is one stream of one dataset: a cursor over the documents dealt to it that fills one window after another.
Its state is three integers.

Concatenated: documents follow each other and are cut every S tokens; a window begins where the last one ended. A stream
does not start at the beginning of a document. Otherwise the first windows of all streams would, the next windows would
all lie S tokens later, and a model would learn one kind of window after the other (8 layers on 373 files: after 256
beginnings the loss jumped from 5.8 nats to 7.5, the gradient norm from 0.5 to 300). Instead, a stream's first TURNED
documents are rotated: they are served from a token inside them around to the same token, as if the stream had long been
running. Each stream has a different starting place and a rotation of different length, so that from the first step on
all batches look alike. Still, every token is served once, in its epoch.

Best fit: documents are taken as a group until they would fill `BEST_FIT_WINDOWS` windows, those longer than S are cut
into pieces of S and a rest, and all pieces are packed into windows, the longest first, each into the fullest window
that has room (best-fit decreasing; Ding et al., arXiv:2404.10830). A group's windows come in a keyed order, as those
with long pieces are made first. Free space is padded, as a document of its own without labels. Groups do not depend on
each other, so that a packer can resume inside one without the ones before; it holds the group's tokens in memory, which
is why a group is small.

Legend: S tokens of a window.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple, Protocol

import numpy as np

from megacoder.core.errors import DataError
from megacoder.data.endless import Deal, EndlessDocuments
from megacoder.data.permutation import permute, stream_phase
from megacoder.ops.cross_entropy import IGNORE_INDEX

__all__ = ["BEST_FIT_WINDOWS", "TURNED", "BestFit", "Concatenated", "Packer", "best_fit"]

BEST_FIT_WINDOWS = 16
"""Least number of windows that a best-fit packer fills together."""
TURNED = 8
"""Documents that a `Concatenated` stream rotates at its start, or as many as it has in an epoch: the more there are,
the less its starting place matters."""


class Packer(Protocol):
    """One stream of one dataset."""

    deal: Deal
    """the documents dealt to the stream"""

    @property
    def next_document(self) -> int:
        """The index in the deal of the next document to read."""

    def fill(self, tokens: np.ndarray, labels: np.ndarray, starts: np.ndarray) -> None:
        """Writes the next window into rows of S, int64, int64 and bool.

        Labels are the next token, or IGNORE_INDEX at the end of a document; `starts` is True at first tokens of
        documents and of the window, and False on entry.
        """

    def position(self) -> list[int]:
        """Three integers."""

    def move(self, *position: int) -> None:
        """Moves back or forth to a `position`."""


class _Place(NamedTuple):
    document: int
    """index in the deal"""
    file: int
    offset: int
    """token in the file"""


class Concatenated:
    """Concatenate and cut. Its position: document in the order of serving, file in it, token in the file.

    That order begins inside one of the first `turned` documents of the deal, which are rotated. The rest of that
    document is number 0, its first part is number `turned`, and later documents have numbers one higher than in the
    deal. (0, 0, 0) is the starting place, wherever that is.
    """

    def __init__(self, source: EndlessDocuments, stream: int, *, across_documents: bool) -> None:
        """With `across_documents` the last token of a document has the next document's first token as its label."""
        self._source, self._across_documents = source, across_documents
        self.deal = Deal(source, stream)
        self.turned = max(1, min(TURNED, source.dataset.num_documents // source.num_streams))
        self.move(0, 0, 0)

    @cached_property
    def _beginning(self) -> _Place:
        """The starting place: a token of the rotated documents, counted in the dataset, before fill-in-the-middle."""
        dataset = self._source.dataset
        files = [dataset.document_sequences(self.deal[index][0]) for index in range(self.turned)]
        lengths = [dataset.sequence_lengths[part.start : part.stop] for part in files]
        offset = stream_phase(self.deal.stream, self._source.num_streams, int(sum(part.sum() for part in lengths)))
        for document, part in enumerate(lengths):
            for file, length in enumerate(part.tolist()):
                if offset < length:
                    return _Place(document, file, offset)
                offset -= length
        return _Place(0, 0, 0)  # none of them has a token

    @property
    def next_document(self) -> int:
        return self._document - 1 if self._document > self.turned else 0

    def position(self) -> list[int]:
        return [self._document, self._file, self._offset]

    def move(self, *position: int) -> None:
        self._document, self._file, self._offset = position
        self._ids: np.ndarray | None = None
        self._opens = False  # whether the file under the cursor holds its document's first token
        self._follows_cut = False  # whether it follows a document that is cut short

    def fill(self, tokens: np.ndarray, labels: np.ndarray, starts: np.ndarray) -> None:
        filled, size = 0, len(tokens)
        starts[0] = True
        while True:
            ids, offset = self._current(), self._offset
            at_edge = self._opens and offset == 0
            if filled:  # the label of the token before
                known = self._across_documents and not self._follows_cut
                labels[filled - 1] = ids[offset] if known or not at_edge else IGNORE_INDEX
            if filled == size:
                return
            taken = min(len(ids) - offset, size - filled)
            stop = filled + taken
            tokens[filled:stop] = ids[offset : offset + taken]
            labels[filled : stop - 1] = tokens[filled + 1 : stop]
            if at_edge:
                starts[filled] = True
            self._offset, filled, self._follows_cut = offset + taken, stop, False

    def _current(self) -> np.ndarray:
        """The ids of the file under the cursor, after moving to the next one that has any left."""
        if self.position() == [0, 0, 0]:
            _, self._file, self._offset = self._beginning
        ids = self._ids
        while ids is None or self._offset == len(ids):
            number, epoch = self.deal[self._dealt()]
            files = self._source.dataset.document_sequences(number)
            if self._document == self.turned:
                files = files[: self._beginning.file + 1]
            if ids is not None:
                self._file, self._offset, ids = self._file + 1, 0, None
            if self._file >= len(files):
                self._follows_cut |= self._document == self.turned and self._beginning[1:] != (0, 0)
                self._document, self._file, self._offset = self._document + 1, 0, 0
                continue
            ids = self._read(files, epoch)
        self._ids = ids
        return ids

    def _dealt(self) -> int:
        """The index in the deal of the document under the cursor."""
        if self._document > self.turned:
            return self._document - 1
        return (self._beginning.document + self._document) % self.turned

    def _read(self, files: range, epoch: int) -> np.ndarray:
        """The file under the cursor, of its document's `files`."""
        ids = self._source.read(files[self._file], epoch=epoch, opens_document=self._file == 0)
        self._opens = self._file == 0 or not (self._source.add_bos or self._any_tokens(files[: self._file]))
        if self._document in (0, self.turned) and self._file == self._beginning.file:
            cut = min(self._beginning.offset, len(ids))  # as a fill-in-the-middle example the file may be shorter
            if self._document == self.turned:
                ids = ids[:cut]
            elif self._offset == self._beginning.offset:
                self._offset = cut
        if self._offset > len(ids):
            raise DataError(
                f"{self._source.dataset.prefix}: the data position is token {self._offset} of sequence "
                f"{files[self._file]}, which has {len(ids)}; is this a different dataset?"
            )
        return ids

    def _any_tokens(self, files: range) -> bool:
        return any(len(self._source.dataset.sequence(file)) for file in files)


class BestFit:
    """Best-fit decreasing. Its position: the group's first document in the deal, window in the group, and 0."""

    def __init__(self, source: EndlessDocuments, stream: int, *, pad_id: int) -> None:
        self._source, self._pad_id = source, pad_id
        self.deal = Deal(source, stream)
        self.move(0, 0, 0)

    @property
    def next_document(self) -> int:
        return self._first

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
                    f"{len(self._windows)}; is this a different dataset?"
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
