"""A step's windows as text: where documents begin, every control token by its name, and which parts are trained.

A batch does not say where documents begin if they are not masked from each other. They begin at BOS, and where the
token before is not trained to predict the next one.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from megacoder.data.stream import Batch
from megacoder.data.tokenizer import Tokenizer
from megacoder.ops.cross_entropy import IGNORE_INDEX

__all__ = ["Part", "ShownDocument", "show_windows"]


@dataclass(frozen=True)
class Part:
    """Consecutive tokens, all of them labels or none."""

    text: str
    trained: bool


@dataclass(frozen=True)
class ShownDocument:
    """What a window holds of a document, or its padding."""

    first: int
    """place of its first token in the window"""
    tokens: int
    parts: list[Part]
    """none of padding"""

    @property
    def text(self) -> str:
        """All of it."""
        return "".join(part.text for part in self.parts)


def show_windows(batch: Batch, tokenizer: Tokenizer) -> Iterator[list[ShownDocument]]:
    """The documents of each of the batch's windows."""
    for row, (tokens, labels) in enumerate(zip(batch.tokens, batch.labels, strict=True)):
        begins = _beginnings(tokens, labels, tokenizer) if batch.starts is None else batch.starts[row]
        trained = torch.zeros_like(begins)
        trained[1:] = labels[:-1] != IGNORE_INDEX  # a token is trained as the label of the one before
        edges = [0, *(begins[1:].nonzero().flatten() + 1).tolist(), len(tokens)]
        yield [
            _document(first, tokens[first:stop], trained[first:stop], tokenizer)
            for first, stop in itertools.pairwise(edges)
        ]


def _beginnings(tokens: Tensor, labels: Tensor, tokenizer: Tokenizer) -> Tensor:
    begins = torch.zeros(len(tokens), dtype=torch.bool)
    begins[1:] = (labels[:-1] == IGNORE_INDEX) | (tokens[1:] == tokenizer.bos_id)
    if not begins.any():  # trained across documents, which have no BOS
        begins[1:] = tokens[:-1] == tokenizer.eos_id
    return begins


def _document(first: int, tokens: Tensor, trained: Tensor, tokenizer: Tokenizer) -> ShownDocument:
    if bool((tokens == tokenizer.pad_id).all()) and not trained.any():
        return ShownDocument(first, len(tokens), [])
    edges = [0, *(trained.diff().nonzero().flatten() + 1).tolist(), len(tokens)]
    parts = [
        Part(tokenizer.decode(tokens[start:stop].tolist()), bool(trained[start]))
        for start, stop in itertools.pairwise(edges)
    ]
    return ShownDocument(first, len(tokens), parts)
