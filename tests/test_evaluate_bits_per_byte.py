"""Bits per byte: every text token is counted once, with context; xz and a unigram model on the same bytes."""

import lzma
import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from data_samples import write_dataset, write_texts
from evaluation_samples import make_model, make_tokenizer, overfit, source_files, write_shard
from hypothesis import given
from hypothesis import strategies as st

from megacoder.core.errors import ConfigError, DataError, FormatError
from megacoder.evaluate.bits_per_byte import measure_bits_per_byte, training_token_counts, unigram_bits, windows
from megacoder.evaluate.held_out import SourceFile, read_source_files, sample_texts
from megacoder.model.huggingface import export_model, import_model
from megacoder.parallel.tensor import TensorParallel

TOKENIZER = make_tokenizer()
DOCUMENTS = sample_texts(source_files())


@torch.no_grad()
def bits_in_one_pass(model, tokens, *, counted=1):
    """Of the tokens from `counted` on."""
    tokens = torch.tensor(tokens)
    log_probabilities = model.logits(model(tokens[None, :-1]))[0].log_softmax(-1)
    return -float(log_probabilities.gather(-1, tokens[1:, None])[counted - 1 :].sum()) / math.log(2)


def with_bos(document):
    return [TOKENIZER.bos_id, *TOKENIZER.encode(document)]


def test_documents_within_the_window_are_read_in_one_pass():
    model = make_model(TOKENIZER, max_position_embeddings=1024)
    result = measure_bits_per_byte(model, TOKENIZER, DOCUMENTS, quiet=True)
    num_bytes = sum(len(document.encode()) for document in DOCUMENTS)
    expected = sum(bits_in_one_pass(model, with_bos(document)) for document in DOCUMENTS)
    assert result.model == pytest.approx(expected / num_bytes, rel=1e-5)
    assert (result.num_documents, result.num_bytes, result.window) == (2, num_bytes, 1024)
    assert result.num_tokens == sum(len(TOKENIZER.encode(document)) for document in DOCUMENTS)
    assert result.perplexity == pytest.approx(2 ** (expected / result.num_tokens), rel=1e-5)
    xz = lzma.compress("".join(DOCUMENTS).encode(), preset=9)
    assert result.xz == 8 * len(xz) / num_bytes
    assert result.unigram is None


def test_overlapping_windows_count_every_token_once():
    model, expected = make_model(TOKENIZER), 0.0
    for ids in map(with_bos, DOCUMENTS):
        for start, stop, counted in windows(len(ids), 32):
            expected += bits_in_one_pass(model, ids[start : stop + 1], counted=counted - start)
    result = measure_bits_per_byte(model, TOKENIZER, DOCUMENTS, window=32, quiet=True)
    assert result.model * result.num_bytes == pytest.approx(expected, rel=1e-5)


def test_longer_windows_use_their_context():
    model, ids = make_model(TOKENIZER), TOKENIZER.encode(DOCUMENTS[0])
    overfit(model, [([TOKENIZER.bos_id], ids[:120])], steps=40)
    text = [TOKENIZER.decode(ids[:120])]
    long, short = (measure_bits_per_byte(model, TOKENIZER, text, window=size, quiet=True) for size in (320, 16))
    assert long.model < 0.5 < long.xz
    assert short.model > long.model
    assert (long.num_tokens, long.xz) == (short.num_tokens, short.xz)


@given(st.integers(1, 70), st.integers(2, 20))
def test_windows_count_every_token_but_the_first_once(num_tokens, window):
    counted_all = []
    for start, stop, counted in windows(num_tokens, window):
        assert 0 <= start < stop <= num_tokens - 1
        assert stop - start <= window
        assert start < counted <= stop
        assert start == 0 or counted - start >= window - window // 2  # half a window of context
        counted_all += range(counted, stop + 1)
    assert counted_all == list(range(1, num_tokens))


def test_unigram_bits_by_hand():
    counts = np.array([2, 0, 1])
    assert unigram_bits(np.array([0, 1, 1]), counts) == pytest.approx(math.log2(6 / 3) + 2 * math.log2(6 / 1))


def test_the_unigram_model_counts_training_text(tmp_path):
    documents = [[*TOKENIZER.encode(text), TOKENIZER.eos_id] for text in DOCUMENTS]
    counts = training_token_counts(write_texts(tmp_path / "corpus", DOCUMENTS, TOKENIZER), TOKENIZER)
    assert counts.sum() == sum(map(len, documents)) - 2
    assert counts[TOKENIZER.eos_id] == 0
    result = measure_bits_per_byte(make_model(TOKENIZER), TOKENIZER, DOCUMENTS, token_counts=counts, quiet=True)
    text_ids = np.concatenate([document[:-1] for document in documents])
    assert result.unigram == unigram_bits(text_ids, counts) / result.num_bytes
    assert result.unigram < result.num_tokens * math.log2(TOKENIZER.vocab_size) / result.num_bytes


def test_token_counts_of_another_tokenizer_are_refused(tmp_path):
    dataset = write_dataset(tmp_path / "corpus", [[[TOKENIZER.vocab_size]]])
    with pytest.raises(DataError, match=f"token {TOKENIZER.vocab_size}, but the tokenizer has"):
        training_token_counts(dataset, TOKENIZER)


@pytest.mark.parametrize("window", [1, 321])
def test_windows_that_the_model_cannot_have(window):
    with pytest.raises(ConfigError, match=f"window = {window}: from 2 to the model's 320"):
        measure_bits_per_byte(make_model(TOKENIZER), TOKENIZER, DOCUMENTS, window=window)


@pytest.mark.parametrize("documents", [[], [""]])
def test_no_text(documents):
    with pytest.raises(DataError, match="no held-out text"):
        measure_bits_per_byte(make_model(TOKENIZER), TOKENIZER, documents)


def score_on_rank(world, folder: str) -> float:
    model = import_model(Path(folder), tp=TensorParallel(rank=world.rank, size=world.size, group=world.group))
    return measure_bits_per_byte(model, TOKENIZER, DOCUMENTS, window=64, quiet=True).model


def test_two_ranks_that_share_a_model_measure_the_same_as_one(ranks, tmp_path):
    model = make_model(TOKENIZER)
    export_model(model, tmp_path / "hf")
    alone = measure_bits_per_byte(model, TOKENIZER, DOCUMENTS, window=64, quiet=True).model
    assert ranks.run(2, score_on_rank, str(tmp_path / "hf")) == [pytest.approx(alone, rel=1e-6)] * 2


def test_shards_are_read_in_order(tmp_path):
    files = source_files()
    write_shard(tmp_path / "b.parquet", files[2:])
    write_shard(tmp_path / "a.parquet", files[:2])
    assert list(read_source_files([tmp_path])) == files
    assert list(read_source_files([tmp_path / "b.parquet"])) == files[2:]
    assert [files[0].content + files[1].content, files[2].content] == DOCUMENTS


def test_shards_that_cannot_be_read(tmp_path):
    with pytest.raises(DataError, match="nowhere: no such file"):
        list(read_source_files([tmp_path / "nowhere"]))
    with pytest.raises(DataError, match=r"no \.parquet files in this folder"):
        list(read_source_files([tmp_path]))
    (tmp_path / "a.parquet").write_text("text")
    with pytest.raises(FormatError, match=r"a\.parquet: not readable as Parquet"):
        list(read_source_files([tmp_path]))
    pq.write_table(pa.table({"text": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(FormatError, match="no column 'sample'"):
        list(read_source_files([tmp_path]))
    broken = pa.array([b"fine", b"\xff"]).view(pa.string())
    pq.write_table(pa.table(dict.fromkeys(SourceFile.__dataclass_fields__, broken)), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet: row 1: a text that is not UTF-8"):
        list(read_source_files([tmp_path]))
