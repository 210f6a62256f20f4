"""Texts to `.bin/.idx`: the whole command compared with the bare encoders and with the recipe of Megatron's script.

Ours reads the JSONL shards, or the Parquet file, of the whole corpus; so does the bare fastokens, in one batch of
texts that are in memory. The slow contenders get the first shard: their speed does not depend on how much they have.
The recipe: a pool of processes that decode and encode lines of JSON one by one, and megatron-core's own writer in the
parent. It gets `tokenizers` itself rather than the slower classes around it.
"""

import json
import multiprocessing
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from data_parts.corpus import Corpus
from data_parts.megatron import indexed_dataset
from megacoder.core.errors import DataError
from megacoder.data.documents import DocumentReader
from megacoder.data.encoders import BatchEncoder, EncoderName, fast_encoder, reference_encoder
from megacoder.data.indexed import bin_path, idx_path
from megacoder.data.preprocess import PreprocessConfig, preprocess
from megacoder.data.tokenizer import Tokenizer

if TYPE_CHECKING:
    from bench_data import Options

__all__ = ["measure"]

MEGATRONS_CHUNK = 32  # lines that a process of the pool takes at once


def measure(options: "Options", corpus: Corpus) -> dict[str, dict[str, float | str]]:
    """MB of text a second by contender, and ratios to the bare encoders and to Megatron's recipe."""
    tokenizer = Tokenizer.load(corpus.tokenizer)
    texts, shard = corpus.texts(), corpus.jsonl[0]
    first = [text for document in DocumentReader(shard, text_key="content") for text in document]
    size, first_size = (sum(len(text.encode()) for text in some) for some in (texts, first))
    folder = corpus.folder / "preprocess"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    fast, reference = fast_encoder("fastokens", tokenizer, threads=options.threads), reference_encoder(tokenizer)
    assert fast is not None  # as it was asked for by name

    def ours(inputs: list[Path], encoder: EncoderName, name: str) -> Callable[[], None]:
        def run() -> None:
            for path in folder.glob(f"{name}.*"):
                path.unlink()
            config = PreprocessConfig(
                input=tuple(inputs), tokenizer=corpus.tokenizer, output=folder / name, workers=options.threads,
                encoder=encoder,
            )  # fmt: skip
            preprocess(config)

        return run

    contenders: dict[str, tuple[Callable[[], object], int]] = {
        "bare fastokens": (lambda: fast(texts), size),
        "megacoder, JSONL": (ours(corpus.jsonl, "fastokens", "jsonl"), size),
        "megacoder, Parquet": (ours([corpus.parquet], "fastokens", "parquet"), size),
        "bare tokenizers": (lambda: reference(first), first_size),
        "megacoder, JSONL, tokenizers": (ours([shard], "tokenizers", "reference"), first_size),
        "Megatron's recipe": (lambda: _recipe(shard, corpus.tokenizer, folder / "recipe", options.threads), first_size),
    }
    speeds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(options.rounds):
        for name, (run, amount) in contenders.items():
            start = time.perf_counter()
            run()
            speeds[name].append(amount / 1e6 / (time.perf_counter() - start))
    _check(folder, fast, reference, first)
    shutil.rmtree(folder)
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    return {
        name: {
            "MB_per_second": round(speed, 3),
            "of_bare_fastokens": round(speed / medians["bare fastokens"], 3),
            "of_bare_tokenizers": round(speed / medians["bare tokenizers"], 3),
            "times_megatrons_recipe": round(speed / medians["Megatron's recipe"], 2),
        }
        for name, speed in medians.items()
    }


def _check(folder: Path, fast: BatchEncoder, reference: BatchEncoder, texts: list[str]) -> None:
    """All wrote the same: JSONL and Parquet, ours and the recipe, both encoders."""
    for one, other in (("jsonl", "parquet"), ("reference", "recipe")):
        for path in (bin_path, idx_path):
            if path(folder / one).read_bytes() != path(folder / other).read_bytes():
                raise DataError(f"{path(folder / one)} and {path(folder / other)} differ")
    if not all(map(np.array_equal, fast(texts), reference(texts))):
        raise DataError("fastokens and tokenizers give other ids")


def _recipe(lines: Path, tokenizer: Path, prefix: Path, processes: int) -> None:
    """What Megatron-LM's preprocessing script does with --append-eod, reduced to its work."""
    megatron = indexed_dataset()
    dtype = megatron.DType.optimal_dtype(Tokenizer.load(tokenizer).vocab_size)
    builder = megatron.IndexedDatasetBuilder(str(bin_path(prefix)), dtype=dtype)
    context = multiprocessing.get_context("spawn")
    with lines.open(encoding="utf-8") as file, context.Pool(processes, _Line.start, (tokenizer,)) as pool:
        for ids in pool.imap(_Line.encode, file, MEGATRONS_CHUNK):
            builder.add_document(torch.tensor(ids), [len(ids)])
    builder.finalize(str(idx_path(prefix)))


class _Line:
    """What a process of the recipe's pool keeps."""

    tokenizer: Tokenizer

    @classmethod
    def start(cls, path: Path) -> None:
        cls.tokenizer = Tokenizer.load(path)

    @classmethod
    def encode(cls, line: str) -> list[int]:
        return [*cls.tokenizer.encode(json.loads(line)["content"]), cls.tokenizer.eos_id]
