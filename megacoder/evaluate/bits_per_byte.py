"""How well a model predicts held-out text: bits per byte, beside two compressors of the same bytes.

Legend: C the longest window of input tokens, V vocabulary.
Bits per byte compares across tokenizers and with any compressor: the negative log2-likelihood of all text tokens over
the UTF-8 bytes of the text. A document is BOS and its text; each text token counts once, EOS and BOS do not. A document
longer than C is read in windows that overlap by half; after the first, only a window's second half counts, so that
each of its tokens sees at least C/2 tokens, at twice the cost of disjoint windows.

For comparison, over the same bytes: `xz -9` in one stream over the concatenated documents, which may look back over all
of them, and a unigram model, -log2((count + 1) / (all counts + V)) of the training tokens.
"""

import lzma
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from megacoder.core.console import progress
from megacoder.core.errors import ConfigError, DataError
from megacoder.data.indexed import IndexedDataset
from megacoder.data.tokenizer import Tokenizer
from megacoder.model.stage import forward_loss
from megacoder.model.transformer import Transformer
from megacoder.ops.cross_entropy import IGNORE_INDEX

__all__ = [
    "PROTOCOL", "HeldOutScore", "measure_bits_per_byte", "training_token_counts", "unigram_bits", "windows",
    "xz_bits",
]  # fmt: skip

PROTOCOL = 1
"""Raised when what is measured changes, so that scores of one run's checkpoints are not mixed."""

_BATCH_TOKENS = 8192
"""Input tokens of a forward pass; more do not make it faster on a CPU."""


@dataclass(frozen=True, kw_only=True)
class HeldOutScore:
    """Bits per byte of one set of documents."""

    num_documents: int
    num_bytes: int
    """UTF-8 bytes of the text, by which all three are divided"""
    num_tokens: int
    """text tokens, each predicted once"""
    window: int
    """C, the most tokens that a prediction sees"""
    model: float
    """bits per byte of the model"""
    xz: float | None
    """bits per byte of `xz -9`; None where it was not asked for"""
    unigram: float | None
    """bits per byte of the unigram model; None where no training tokens were given"""

    @property
    def perplexity(self) -> float:
        """The model's perplexity per token, which depends on the tokenizer."""
        return 2.0 ** (self.model * self.num_bytes / self.num_tokens)


def measure_bits_per_byte(
    model: Transformer,
    tokenizer: Tokenizer,
    documents: Sequence[str],
    *,
    window: int | None = None,
    xz: bool = True,
    token_counts: np.ndarray | None = None,
    quiet: bool = False,
) -> HeldOutScore:
    """Scores `documents`; `window` is the model's longest by default. `xz` and `token_counts` (V,) of the training
    corpus ask for what is beside it.

    Raises DataError where there is no text, ConfigError for a window of less than 2 tokens or more than the model has
    positions.
    """
    longest = model.config.max_position_embeddings
    window = longest if window is None else window
    if not 2 <= window <= longest:
        raise ConfigError(
            f"window = {window}: from 2 to the model's {longest} positions{model.config.positions_advice}"
        )
    text = "".join(documents).encode()
    if not text:
        raise DataError("no held-out text to measure on")
    ids = [np.array([tokenizer.bos_id, *tokens]) for tokens in tokenizer.encode_batch(documents)]
    text_ids = np.concatenate([document[1:] for document in ids])
    return HeldOutScore(
        num_documents=len(documents),
        num_bytes=len(text),
        num_tokens=len(text_ids),
        window=window,
        model=_model_bits(model, ids, window, quiet) / len(text),
        xz=xz_bits(text) / len(text) if xz else None,
        unigram=None if token_counts is None else unigram_bits(text_ids, token_counts) / len(text),
    )


def windows(num_tokens: int, window: int) -> Iterator[tuple[int, int, int]]:
    """(start, stop, counted) of each pass over a document of `num_tokens` with BOS.

    Tokens [start, stop) are the input; of the tokens [start + 1, stop + 1) that are predicted, those from `counted` on
    count. Over all passes, every token but BOS counts once.
    """
    stop = 0
    while stop < num_tokens - 1:
        counted = stop + 1
        stop = min(stop + (window // 2 if stop else window), num_tokens - 1)
        yield max(0, stop - window), stop, counted


def xz_bits(text: bytes) -> int:
    """Size of `text` as `xz -9` writes it, in bits."""
    return 8 * len(lzma.compress(text, format=lzma.FORMAT_XZ, check=lzma.CHECK_CRC64, preset=9))


def unigram_bits(ids: np.ndarray, token_counts: np.ndarray) -> float:
    """-log2-likelihood of `ids` under the frequencies of `token_counts` (V,), one added to each."""
    smoothed = token_counts.astype(np.float64) + 1
    return float(-np.log2(smoothed / smoothed.sum())[ids].sum())


def training_token_counts(dataset: IndexedDataset, tokenizer: Tokenizer) -> np.ndarray:
    """int64 (V,): how often each token occurs in the corpus, EOS not counted since it is not text.

    Raises DataError if the dataset holds ids that the tokenizer does not have.
    """
    counts = np.zeros(tokenizer.vocab_size, dtype=np.int64)
    for index in range(dataset.num_documents):
        tokens = dataset.document(index)
        if len(tokens) and int(tokens.max()) >= len(counts):
            raise DataError(
                f"{dataset.prefix}: token {int(tokens.max())}, but the tokenizer has {len(counts)}; made with another?"
            )
        counts += np.bincount(tokens, minlength=len(counts))
    counts[tokenizer.eos_id] = 0
    return counts


@torch.no_grad()
def _model_bits(model: Transformer, documents: Sequence[np.ndarray], window: int, quiet: bool) -> float:
    passes = [(ids, *span) for ids in documents for span in windows(len(ids), window)]
    passes.sort(
        key=lambda item: item[1] - item[2]
    )  # longest first: little padding, and memory runs out at once if at all
    total = sum(stop - start for _, start, stop, _ in passes)
    nats, first, num_done = 0.0, 0, 0
    with progress("held-out bits per byte", total, quiet=quiet) as bar:
        while first < len(passes):
            _, start, stop, _ = passes[first]
            batch = passes[first : first + max(1, _BATCH_TOKENS // (stop - start))]
            nats += _batch_nats(model, batch)
            first += len(batch)
            num_done += sum(stop - start for _, start, stop, _ in batch)
            bar.update(num_done)
    return nats / float(np.log(2.0))


def _batch_nats(model: Transformer, batch: Sequence[tuple[np.ndarray, int, int, int]]) -> float:
    width = batch[0][2] - batch[0][1]
    tokens_BS = torch.zeros(len(batch), width, dtype=torch.long)
    labels_BS = torch.full_like(tokens_BS, IGNORE_INDEX)
    for row, (ids, start, stop, counted) in enumerate(batch):
        tokens_BS[row, : stop - start] = torch.from_numpy(ids[start:stop])
        labels_BS[row, counted - start - 1 : stop - start] = torch.from_numpy(ids[counted : stop + 1])
    device = model.lm_head.weight.device
    return forward_loss(model, tokens_BS.to(device), labels_BS.to(device)).total.item()
