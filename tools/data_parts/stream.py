"""Tokens per second and core of the training stream, from the page cache, compared with its limit and with re-encoding.

The limit is a copy of the same tokens into the two int64 arrays that a batch is. The peer transforms whole documents
in the way of Megatron's fill-in-the-middle: decode, cut at characters, encode the three parts. Both cut half of
the documents. All contenders read the documents of the corpus in random order.
"""

import os
import statistics
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch

from data_parts.corpus import Corpus
from megacoder.data.fim import FimConfig
from megacoder.data.indexed import IndexedDataset
from megacoder.data.permutation import draw_bits, key_of, permute
from megacoder.data.stream import StreamConfig, TokenStream
from megacoder.data.tokenizer import Tokenizer

if TYPE_CHECKING:
    from bench_data import Options

__all__ = ["measure"]

WINDOWS, SEQ_LENGTH = 64, 4096
"""Of a batch"""
SECONDS = 3.0
"""of processor time that a measurement takes at least"""


def measure(options: "Options", corpus: Corpus) -> dict[str, dict[str, float | str]]:
    """Million tokens a second by contender, each a share of the copy and a multiple of re-encoding."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)
    dataset, tokenizer = IndexedDataset(corpus.tokens), Tokenizer.load(corpus.tokenizer)
    dataset.tokens.max()  # into the page cache
    contenders: dict[str, Callable[[], int]] = {
        "copy alone": _copies(dataset).__next__,
        "stream": _batches(dataset, tokenizer, rate=0.0),
        "stream, best fit": _batches(dataset, tokenizer, rate=0.0, packing="best_fit"),
        "stream, FIM 0.5": _batches(dataset, tokenizer, rate=0.5),
        "stream, masked spans 0.5": _batches(dataset, tokenizer, rate=0.5, masked_spans=1.0),
        "whole documents re-encoded, FIM 0.5": _reencoded(dataset, tokenizer).__next__,
    }
    speeds: dict[str, list[float]] = {name: [] for name in contenders}
    for serve in contenders.values():
        serve()
    for _ in range(options.rounds):
        for name, serve in contenders.items():
            speeds[name].append(_tokens_per_second(serve))
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    copy, reencoding = medians["copy alone"], medians["whole documents re-encoded, FIM 0.5"]
    return {
        name: {
            "million_tokens_per_second": round(median / 1e6, 3),
            "share_of_copy": round(median / copy, 3),
            "times_reencoding": round(median / reencoding, 2),
        }
        for name, median in medians.items()
    }


def _tokens_per_second(serve: Callable[[], int]) -> float:
    """Of calls that return how many tokens they served."""
    tokens, start = 0, time.process_time()
    while (seconds := time.process_time() - start) < SECONDS:
        tokens += serve()
    return tokens / seconds


def _batches(
    dataset: IndexedDataset,
    tokenizer: Tokenizer,
    *,
    rate: float,
    masked_spans: float = 0.0,
    packing: str = "concatenate",
) -> Callable[[], int]:
    config = StreamConfig(
        seq_length=SEQ_LENGTH, num_streams=WINDOWS,
        packing="best_fit" if packing == "best_fit" else "concatenate", document_masks=packing == "best_fit",
        fim=FimConfig(rate=rate, msp_rate=masked_spans),
    )  # fmt: skip
    stream = TokenStream([dataset], tokenizer, config, global_batch_size=WINDOWS, dp_rank=0, dp_size=1)

    def serve() -> int:
        batch = stream.next_batch()
        padding = 0 if batch.starts is None else int((batch.tokens == tokenizer.pad_id).sum())
        return batch.tokens.numel() - padding

    return serve


def _documents(dataset: IndexedDataset) -> Iterator[tuple[int, np.ndarray]]:
    epoch = 0
    while True:
        order = permute(np.arange(dataset.num_documents), dataset.num_documents, seed=0, epoch=epoch)
        for document in order.tolist():
            yield document, dataset.document(document)
        epoch += 1


def _copies(dataset: IndexedDataset) -> Iterator[int]:
    documents = _documents(dataset)
    while True:
        size, filled = WINDOWS * SEQ_LENGTH, 0
        tokens, labels = np.empty(size, dtype=np.int64), np.empty(size, dtype=np.int64)
        while filled < size:
            _, ids = next(documents)
            taken = min(len(ids), size - filled)
            tokens[filled : filled + taken] = ids[:taken]
            labels[filled : filled + taken] = ids[:taken]
            filled += taken
        yield size


def _reencoded(dataset: IndexedDataset, tokenizer: Tokenizer) -> Iterator[int]:
    """One document a time: lists of ids, which is less than a batch needs."""
    begin, hole, end = tokenizer.fim_begin_id, tokenizer.fim_hole_id, tokenizer.fim_end_id
    for document, ids in _documents(dataset):
        chosen, *cuts = draw_bits(key_of(0, document), 3)
        if chosen >> 63:
            text = tokenizer.decode(ids[:-1].tolist())
            a, b = sorted(bits * (len(text) + 1) >> 64 for bits in cuts)
            prefix, middle, suffix = (tokenizer.encode(part) for part in (text[:a], text[a:b], text[b:]))
            yield len([begin, *prefix, hole, *suffix, end, *middle, tokenizer.eos_id])
        else:
            yield len(ids.tolist())
