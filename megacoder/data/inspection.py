"""What is in a dataset: counts, how long its documents are, how a few of them begin."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from megacoder.core.config import check_at_least
from megacoder.core.errors import DataError, FormatError
from megacoder.data.indexed import IndexedDataset
from megacoder.data.sidecar import Sidecar, checksum, open_dataset
from megacoder.data.tokenizer import Tokenizer

__all__ = ["InspectConfig", "inspect"]

_PREVIEW_TOKENS = 60


@dataclass(frozen=True, kw_only=True)
class InspectConfig:
    """Shows what is in a .bin/.idx pair."""

    prefix: tyro.conf.Positional[Path]
    """path of the pair without .bin or .idx"""
    tokenizer: Path | None = None
    """tokenizer folder, to decode the beginnings of some documents"""
    documents: int = 3
    """number of documents to decode, evenly spread over the dataset"""
    verify: bool = False
    """read every byte and compare with the checksum that preprocessing recorded"""
    json: bool = False
    """print JSON"""

    def __post_init__(self) -> None:
        check_at_least(self, 0, "documents")


def inspect(config: InspectConfig) -> dict[str, Any]:
    """Counts, tokens of documents by powers of two, and decoded beginnings, as plain values."""
    tokenizer = Tokenizer.load(config.tokenizer) if config.tokenizer is not None else None
    dataset = IndexedDataset(config.prefix) if tokenizer is None else open_dataset(config.prefix, tokenizer)
    sidecar = Sidecar.read(config.prefix)
    if config.verify:
        _verify(config.prefix, sidecar)
    report: dict[str, Any] = {
        "documents": dataset.num_documents,
        "sequences": dataset.num_sequences,
        "tokens": dataset.num_tokens,
        "dtype": dataset.dtype.name,
        "bytes_of_text": sidecar.bytes if sidecar else None,
        "tokenizer": sidecar.tokenizer if sidecar else None,
        **({"checksum": "as it was written"} if config.verify else {}),
        "tokens_per_document": _histogram(dataset),
    }
    if tokenizer is not None:
        count = min(config.documents, dataset.num_documents)
        chosen = [index * dataset.num_documents // count for index in range(count)]
        report["beginnings"] = {str(index): _beginning(dataset, index, tokenizer) for index in chosen}
    return report


def _verify(prefix: Path, sidecar: Sidecar | None) -> None:
    if sidecar is None or sidecar.checksum is None:
        raise DataError(
            f"{Sidecar.path(prefix)}: no checksum to compare with; `megacoder preprocess` and `data merge` record one"
        )
    if checksum(prefix) != sidecar.checksum:
        raise FormatError(
            f"{prefix}: .bin or .idx is not as it was written (checksum {sidecar.checksum}); make it again"
        )


def _beginning(dataset: IndexedDataset, index: int, tokenizer: Tokenizer) -> str:
    ids = dataset.document(index)[:_PREVIEW_TOKENS]
    if len(ids) and not 0 <= ids.min() <= ids.max() < tokenizer.vocab_size:
        raise DataError(
            f"{dataset.prefix}: document {index} has ids from {ids.min()} to {ids.max()}, the tokenizer "
            f"{tokenizer.vocab_size:,}; give the one that it was made with"
        )
    return tokenizer.decode(ids.tolist())


def _histogram(dataset: IndexedDataset) -> dict[str, int]:
    """Documents with less than 1, 2, 4, ... tokens, each counted at the smallest of these."""
    ends = np.concatenate([[0], np.cumsum(dataset.sequence_lengths, dtype=np.int64)])[dataset.document_offsets]
    _, exponents = np.frexp(np.diff(ends).astype(np.float64))  # n < 2^exponent, and 0 for n = 0
    counts = np.bincount(exponents)
    return {f"< {1 << exponent:,}": int(count) for exponent, count in enumerate(counts) if count}
