"""Checks on every document of the corpus that parts cut at characters equal each part's text encoded in full.

Not a matter of speed: all must be equal. Each document is transformed once as prefix, suffix, middle, and
every `MASKED_EVERY`th with masked spans too.
"""

import itertools
import time
from typing import TYPE_CHECKING

import numpy as np

from data_parts.corpus import Corpus
from megacoder.data.cuts import CharacterCutter
from megacoder.data.fim import FillInTheMiddle, FimConfig
from megacoder.data.indexed import IndexedDataset
from megacoder.data.tokenizer import Tokenizer

if TYPE_CHECKING:
    from bench_data import Options

__all__ = ["measure"]

DOCUMENTS_AT_ONCE = 64
MASKED_EVERY = 10


def measure(options: "Options", corpus: Corpus) -> dict[str, dict[str, float | str]]:
    """Documents by kind of transformation: how many, of how many parts, and how many were not as they should be."""
    dataset, tokenizer = IndexedDataset(corpus.tokens), Tokenizer.load(corpus.tokenizer)
    texts, cutter = corpus.texts(), CharacterCutter(tokenizer)
    kinds = {
        "prefix, suffix, middle": (FimConfig(rate=1.0), 1),
        "masked spans": (FimConfig(rate=1.0, msp_rate=1.0), MASKED_EVERY),
    }
    rows: dict[str, dict[str, float | str]] = {}
    for name, (config, every) in kinds.items():
        transform, start = FillInTheMiddle(config, cutter, seed=1), time.perf_counter()
        documents = parts = other_text = other_ids = 0
        chosen = range(0, dataset.num_documents, every)
        for first in range(0, len(chosen), DOCUMENTS_AT_ONCE):
            batch = chosen[first : first + DOCUMENTS_AT_ONCE]
            cut = [parts_of(transform(dataset.document(index), epoch=0, file=index), tokenizer) for index in batch]
            words = [[tokenizer.decode(part) for part in one] for one in cut]
            encoded = iter(tokenizer.encode_batch([text for one in words for text in one]))
            for index, one, found in zip(batch, words, cut, strict=True):
                other_text += "".join(one) != texts[index]
                other_ids += found != list(itertools.islice(encoded, len(found)))
                documents, parts = documents + 1, parts + len(found)
        rows[name] = {
            "documents": documents, "parts": parts, "texts_that_differ": other_text, "ids_that_differ": other_ids,
            "seconds": round(time.perf_counter() - start, 1),
        }  # fmt: skip
    return rows


def parts_of(ids: np.ndarray, tokenizer: Tokenizer) -> list[list[int]]:
    """The parts of a transformed document in the order of its text, kept and hidden ones by turns."""
    begin, hole, end = tokenizer.fim_begin_id, tokenizer.fim_hole_id, tokenizer.fim_end_id
    assert (ids[0], ids[-1]) == (begin, tokenizer.eos_id), "not transformed"
    groups = []
    middle = int(np.flatnonzero(ids == end)[0])
    for group in (ids[1:middle], ids[middle + 1 : -1]):
        groups.append([part.tolist() for part in np.split(group, np.flatnonzero(group == hole))])
        groups[-1][1:] = [part[1:] for part in groups[-1][1:]]  # each but the first begins with its hole
    kept, hidden = groups
    return [part for pair in itertools.zip_longest(kept, hidden) for part in pair if part is not None]
