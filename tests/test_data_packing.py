"""Packing: best fit as a pure function, every token once, labels that stay in their document."""

import itertools
from collections import Counter

import numpy as np
import pytest
import torch
from data_samples import small_tokenizer, write_dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from megacoder.core.errors import ConfigError
from megacoder.data.fim import FimConfig
from megacoder.data.packing import BEST_FIT_WINDOWS, best_fit
from megacoder.data.stream import StreamConfig, TokenStream

NO_FIM = FimConfig(rate=0.0)


@pytest.mark.parametrize(
    ("lengths", "windows"),
    [
        ([], []),
        ([8], [[0]]),
        ([3, 8, 5], [[1], [2, 0]]),
        ([6, 5, 2, 3, 1], [[0, 2], [1, 3], [4]]),
        ([5, 4, 2, 1], [[0, 2, 3], [1]]),  # 2 fits both, and goes where it leaves less
        ([4, 4, 4], [[0, 1], [2]]),
    ],
)
def test_best_fit_by_hand(lengths, windows):
    assert best_fit(lengths, 8) == windows


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 50), max_size=120))
def test_best_fit_lays_every_piece_once_and_wastes_little(lengths):
    windows = best_fit(lengths, 50)
    assert sorted(itertools.chain(*windows)) == list(range(len(lengths)))
    sums = [sum(lengths[piece] for piece in window) for window in windows]
    assert all(0 < total <= 50 for total in sums)
    needed = -(-sum(lengths) // 50)
    assert len(windows) <= 11 / 9 * max(needed, sum(length > 25 for length in lengths)) + 4  # the bound of Johnson 1973


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """64 documents, most short, some of several windows; each token tells its document."""
    rng, eos = np.random.default_rng(3), small_tokenizer().eos_id
    lengths = [int(rng.integers(1, 30)) if number % 8 else int(rng.integers(64, 200)) for number in range(64)]
    documents = [[[*[number] * length, eos]] for number, length in enumerate(lengths)]
    return write_dataset(tmp_path_factory.mktemp("packing") / "set", documents)


def stream(dataset, **options):
    batch = options.pop("batch", 8)
    config = StreamConfig(**{"seq_length": 64, "num_streams": 4, "fim": NO_FIM, "document_masks": True} | options)
    return TokenStream([dataset], small_tokenizer(), config, global_batch_size=batch, dp_rank=0, dp_size=1)


def test_best_fit_serves_every_token_of_the_documents_once_and_trains_on_each(dataset):
    """Up to the end of a group, the windows hold exactly the documents so far: two epochs and some of a third."""
    tokenizer, one = small_tokenizer(), stream(dataset, packing="best_fit", num_streams=1, batch=1)
    packer, served, trained = one._packers[0][0], Counter(), Counter()
    while packer.position()[0] < 2 or packer.position()[3]:
        batch = one.next_batch()
        tokens, labels, starts = batch.tokens[0], batch.labels[0], batch.starts[0]
        edges = [*starts.nonzero().flatten().tolist(), 64]
        assert edges[0] == 0
        for a, b in itertools.pairwise(edges):
            assert torch.equal(labels[a : b - 1], tokens[a + 1 : b].where(tokens[a] != tokenizer.pad_id, -100))
        served.update(tokens[tokens != tokenizer.pad_id].tolist())
        trained.update(labels[labels >= 0].tolist())
    expected = Counter()
    epochs, place, piece, _ = packer.position()
    assert (epochs, piece) == (2, 0)
    for index in range(epochs * 64 + place):
        expected.update([tokenizer.bos_id, *dataset.document(packer.order(*divmod(index, 64))).tolist()])
    assert served == expected
    del expected[tokenizer.bos_id]  # which begins each document
    assert trained == expected


def test_best_fit_cuts_fewer_documents_than_concatenation(dataset):
    def whole(one):
        tokenizer, count = small_tokenizer(), 0
        for _ in range(20):
            for row in one.next_batch().tokens.tolist():
                text = bytes(1 if t == tokenizer.bos_id else 2 if t == tokenizer.eos_id else 0 for t in row)
                count += sum(part.endswith(b"\x02") for part in text.split(b"\x01")[1:])
        return count

    assert whole(stream(dataset, packing="best_fit")) > whole(stream(dataset))


def test_best_fit_resumes_inside_a_group(dataset):
    one = stream(dataset, packing="best_fit", batch=4)
    batches = [one.next_batch() for _ in range(3 * BEST_FIT_WINDOWS)]
    for step in (1, 5, BEST_FIT_WINDOWS, 2 * BEST_FIT_WINDOWS + 3):
        first, second = stream(dataset, packing="best_fit", batch=4), stream(dataset, packing="best_fit", batch=4)
        for _ in range(step):
            first.next_batch()
        second.load_state_dict(first.state_dict())
        for batch in batches[step : step + 4]:
            found = second.next_batch()
            for name in ("tokens", "labels", "starts"):
                assert torch.equal(getattr(found, name), getattr(batch, name)), name


def test_labels_cross_documents_on_request(dataset):
    within, across = stream(dataset), stream(dataset, train_across_documents=True)
    eos = small_tokenizer().eos_id
    for _ in range(4):
        first, second = within.next_batch(), across.next_batch()
        assert torch.equal(first.tokens, second.tokens)
        ends = first.tokens == eos
        assert (first.labels[ends] == -100).all()
        crossed = second.labels[ends] == small_tokenizer().bos_id
        assert (second.labels[ends][~crossed] == -100).all()
        assert crossed.sum() >= len(crossed) - 1, "but where a stream comes to its next stretch"
        assert torch.equal(first.labels[~ends], second.labels[~ends])


def test_documents_begin_correctly_without_bos_and_eos(tmp_path):
    """Neither BOS nor EOS, first files that are empty: documents still begin where they begin."""
    documents = write_dataset(tmp_path / "set", [[[], [number] * 2, [], [number] * 3] for number in range(8)])
    one, resumed = (stream(documents, add_bos=False, num_streams=1, seq_length=5, batch=4) for _ in range(2))
    batch = one.next_batch()
    assert (batch.starts == torch.tensor([True, False, False, False, False])).all()
    assert (batch.labels[:, -1] == -100).all()
    assert (batch.labels[:, :-1] >= 0).all()
    resumed.load_state_dict(one.state_dict())
    assert torch.equal(one.next_batch().labels, resumed.next_batch().labels)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"packing": "best_fit", "document_masks": False}, r"set data\.stream\.document_masks = true"),
        ({"packing": "best_fit", "train_across_documents": True}, "are unrelated"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(dataset, options, message):
    with pytest.raises(ConfigError, match=message):
        stream(dataset, **options)
