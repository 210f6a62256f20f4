"""The token stream: one order for any number of ranks, exact epochs, resume anywhere, errors that reach the reader."""

import hashlib
import itertools
import json
from collections import Counter

import numpy as np
import pytest
import torch
from data_samples import small_tokenizer, source_texts, write_dataset

from megacoder.core.errors import ConfigError, DataError
from megacoder.data import endless
from megacoder.data.cuts import CharacterCutter
from megacoder.data.endless import EndlessDocuments
from megacoder.data.fim import FillInTheMiddle, FimConfig
from megacoder.data.permutation import permute
from megacoder.data.prefetch import Prefetcher
from megacoder.data.stream import StreamConfig, TokenStream, merge_states

NO_FIM = FimConfig(rate=0.0)


def write(prefix, documents):
    """`documents` hold lists of ids; EOS is put behind the last sequence of each, as preprocessing does."""
    eos = small_tokenizer().eos_id
    return write_dataset(prefix, [[*ids[:-1], [*ids[-1], eos]] if ids else [] for ids in documents])


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Source files as documents of one to three files."""
    ids = [small_tokenizer().encode(text[:1000]) for text in source_texts(136)]
    groups = [ids[start : start + 1 + start % 3] for start in range(0, len(ids), 2)]
    return write(tmp_path_factory.mktemp("sources") / "set", groups)


@pytest.fixture(scope="module")
def numbered(tmp_path_factory):
    """37 documents of ASCII tokens in one or two files; some files are empty, and one document has none."""
    rng = np.random.default_rng(0)
    documents = [[rng.integers(0, 90, rng.integers(0, 21)).tolist() for _ in range(1 + i % 2)] for i in range(36)]
    return write(tmp_path_factory.mktemp("numbered") / "set", [*documents[:9], [], *documents[9:]])


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """300 documents of one file each, whose lengths differ as those of repositories do; their number is every token."""
    rng = np.random.default_rng(1)
    lengths = np.minimum(rng.lognormal(3, 1.5, 300).astype(int) + 1, 5000)
    return write(tmp_path_factory.mktemp("many") / "set", [[[number] * int(n)] for number, n in enumerate(lengths)])


def stream(dataset, *, batch=8, dp_rank=0, dp_size=1, seq_length=64, weights=(), fim_rates=(), epochs=None, **config):
    config = StreamConfig(seq_length=seq_length, **config)
    return TokenStream(
        dataset if isinstance(dataset, list) else [dataset], small_tokenizer(), config,
        global_batch_size=batch, dp_rank=dp_rank, dp_size=dp_size, weights=weights, fim_rates=fim_rates, epochs=epochs,
    )  # fmt: skip


def ranks(dataset, dp_size, **options):
    return [stream(dataset, dp_rank=rank, dp_size=dp_size, **options) for rank in range(dp_size)]


def global_batch(streams):
    """Tokens and labels of one step of all ranks, ordered by the number of the window in the run."""
    batches = [one.next_batch() for one in streams]
    both = [torch.cat([batch.tokens, batch.labels], dim=1) for batch in batches]
    return torch.stack(both, dim=1).flatten(0, 1)  # the run starts at window 0, so ranks take turns


def digests(streams, steps):
    return [hashlib.sha256(global_batch(streams).numpy().tobytes()).hexdigest() for _ in range(steps)]


def go_on(first, second):
    """The ranks of `second` from where those of `first` have come to, by way of a checkpoint's JSON."""
    state = json.loads(json.dumps(merge_states([one.state_dict() for one in first])))
    for one in second:
        one.load_state_dict(state)


@pytest.mark.parametrize("num_streams", [2, 8, 1024])
@pytest.mark.parametrize("dp_size", [2, 4, 8])
def test_tokens_do_not_depend_on_the_number_of_ranks(sources, dp_size, num_streams):
    """num_streams 2 makes ranks share streams as well."""
    alone = digests(ranks(sources, 1, num_streams=num_streams), 12)
    assert digests(ranks(sources, dp_size, num_streams=num_streams), 12) == alone
    assert len(set(alone)) == 12


@pytest.mark.parametrize("dp_size", [3, 6, 12])
def test_any_number_of_ranks_that_divides_the_batch_works(sources, dp_size):
    assert digests(ranks(sources, dp_size, batch=12), 8) == digests(ranks(sources, 1, batch=12), 8)


@pytest.mark.parametrize(("before", "after"), [(1, 1), (1, 4), (4, 2), (8, 1), (2, 8)])
@pytest.mark.parametrize("steps", [0, 1, 5])
def test_a_run_stops_and_resumes_on_any_number_of_ranks(sources, before, after, steps):
    whole = digests(ranks(sources, 1), steps + 6)
    first = ranks(sources, before)
    assert digests(first, steps) == whole[:steps]
    second = ranks(sources, after)
    go_on(first, second)
    assert digests(second, 6) == whole[steps:]


def test_the_batch_size_may_change_on_resume(sources):
    small, large = ranks(sources, 1, batch=4), ranks(sources, 1, batch=12)
    taken = [global_batch(small), global_batch(small)]
    large[0].load_state_dict(small[0].state_dict())
    taken.append(global_batch(large))
    assert torch.equal(torch.cat(taken), global_batch(ranks(sources, 1, batch=20)))


def test_a_rank_reads_only_its_share_of_the_streams(many):
    state = stream(many, dp_rank=1, dp_size=4, num_streams=16).state_dict()
    assert [position[0] for position in state["streams"]] == [1, 5, 9, 13]
    with pytest.raises(DataError, match="lacks stream 0; merge"):
        stream(many, dp_rank=0, dp_size=4, num_streams=16).load_state_dict(state)


def rows_served(dataset, steps, *, num_streams, **config):
    """The tokens of each logical stream, from the windows alone."""
    one = stream(dataset, batch=num_streams, seq_length=16, num_streams=num_streams, fim=NO_FIM, **config)
    return torch.stack([one.next_batch().tokens for _ in range(steps)], dim=1).flatten(1).tolist()


def documents_served(dataset, steps, **config):
    """The documents of one stream as tuples of ids between BOS and EOS."""
    (row,) = rows_served(dataset, steps, num_streams=1, **config)
    edges = [place for place, token in enumerate(row) if token == small_tokenizer().bos_id]
    return [tuple(row[a:b]) for a, b in itertools.pairwise(edges)]


def epoch_as_served(dataset, epoch):
    """(all tokens of an epoch with BOS, where the token that is stored as the i-th of the epoch stands in them)."""
    served, places = [], []
    for number in permute(np.arange(dataset.num_documents), dataset.num_documents, seed=1234, epoch=epoch).tolist():
        first = len(served)
        for file in dataset.document_sequences(number):
            ids = dataset.sequence(file).tolist()
            places += [len(served) + token for token in range(len(ids))]
            served += [small_tokenizer().bos_id, *ids] if file == dataset.document_sequences(number).start else ids
            if ids and len(places) - len(ids) == sum(place < first for place in places):
                places[-len(ids)] = first  # a document's first token has BOS before it, and empty files
    return served, [*places, len(served)]


@pytest.mark.parametrize("num_streams", [1, 2, 4])
def test_no_token_is_lost_or_repeated_within_an_epoch(numbered, num_streams):
    """Streams are equal stretches of the tokens as they are stored, one of every epoch."""
    epochs = [epoch_as_served(numbered, epoch) for epoch in range(6)]
    size = numbered.num_tokens
    for index, row in enumerate(rows_served(numbered, 160 // num_streams, num_streams=num_streams)):
        expected = []
        for served, places in epochs:
            first, last = (stream * size // num_streams for stream in (index, index + 1))
            expected += served[places[first] : places[last]]
        assert len(row) > 3 * len(epochs[0][0]) / num_streams
        assert row == expected[: len(row)]


def test_streams_of_equal_documents_serve_each_once_per_epoch(tmp_path):
    few = write(tmp_path / "few", [[[number] * 7] for number in range(128)])
    one = stream(few, num_streams=64, seq_length=9, batch=16, fim=NO_FIM)
    for epoch in (1, 2):
        served = Counter(one.next_batch().tokens.flatten().tolist())
        for _ in range(7):
            served.update(one.next_batch().tokens.flatten().tolist())
        assert [served[number] for number in range(128)] == [7] * 128, f"epoch {epoch}"


@pytest.mark.parametrize("packing", ["concatenate", "best_fit"])
def test_an_epoch_of_tokens_serves_nearly_every_token_once(many, packing):
    """However much documents differ in length; each stream may be a window ahead, or with best fit a group."""
    one = stream(
        many, seq_length=8, batch=32, fim=NO_FIM, add_bos=False, packing=packing, document_masks=packing == "best_fit"
    )
    pad, served, count = small_tokenizer().pad_id, Counter(), 0
    assert one.num_streams >= 8
    while count < many.num_tokens:
        tokens = one.next_batch().tokens
        served.update(tokens[tokens != pad].tolist())
        count += int((tokens != pad).sum())
    expected = Counter({number: int(many.sequence_lengths[number]) - 1 for number in range(300)})
    missed = sum((expected - served).values())
    assert missed <= (0.02 if packing == "concatenate" else 0.06) * many.num_tokens


def test_stretches_of_many_documents_are_as_many_documents_each(numbered, monkeypatch):
    """As for datasets whose lengths are too many to add up: still every token once, in equal numbers of documents."""
    by_number = rows_of_epoch(numbered, monkeypatch, most=0)
    assert by_number == rows_of_epoch(numbered, monkeypatch, most=1 << 24)


@pytest.mark.parametrize("at_once", [1, 4, 36])
def test_lengths_may_be_added_up_some_at_a_time(numbered, tmp_path, monkeypatch, at_once):
    """As those of millions of documents are: the stretches are the same."""
    equal = write(tmp_path / "equal", [[[number] * 7] for number in range(64)])  # stretches end where documents do

    def ends_of_stretches(dataset):
        cutter = CharacterCutter(small_tokenizer())
        source = EndlessDocuments(dataset, cutter, NO_FIM, seed=5, add_bos=True, num_streams=8)
        return [source.stretch(epoch, one) for epoch in range(3) for one in range(8)]

    expected = [ends_of_stretches(dataset) for dataset in (numbered, equal)]
    monkeypatch.setattr(endless, "_MEASURED_AT_ONCE", at_once)
    assert [ends_of_stretches(dataset) for dataset in (numbered, equal)] == expected


def rows_of_epoch(dataset, monkeypatch, *, most):
    """How often each token was in the stretches of one epoch."""
    monkeypatch.setattr(endless, "MOST_MEASURED", most)
    one, counted = stream(dataset, num_streams=4, fim=NO_FIM), Counter()
    (packers,) = one._packers
    assert len({packer.position()[1] for packer in packers.values()}) == 4
    for packer in packers.values():
        tokens, labels, starts = np.empty(1, np.int64), np.empty(1, np.int64), np.zeros(1, bool)
        while packer.position()[0] == 0:
            packer.fill(tokens, labels, starts)
            counted.update(tokens.tolist())
    return counted


def test_the_first_batches_are_like_the_others(many):
    """Not the beginnings of as many documents, and then what comes behind them."""
    rows = torch.tensor(rows_served(many, 40, num_streams=32))
    begins = (rows.unflatten(1, (40, 16))[:, :, 0] == small_tokenizer().bos_id).sum(0).tolist()  # of 32, by window
    assert begins[0] <= max(begins[1:])


@pytest.mark.parametrize("across", [False, True])
def test_a_run_resumes_at_any_window_around_the_cut(numbered, across):
    options = {"num_streams": 4, "batch": 4, "seq_length": 11, "train_across_documents": across}
    whole = stream(numbered, **options)
    states, batches = [], []
    for _ in range(60):
        states.append(whole.state_dict())
        batches.append(whole.next_batch())
    assert all(epoch >= 3 for _, _, epoch, *_ in states[-1]["streams"])
    for state, batch in zip(states, batches, strict=True):
        resumed = stream(numbered, **options)
        resumed.load_state_dict(state)
        found = resumed.next_batch()
        assert torch.equal(found.tokens, batch.tokens)
        assert torch.equal(found.labels, batch.labels)


def test_a_stream_has_eight_documents_of_an_epoch_on_average(numbered, many):
    assert stream(numbered).num_streams == 4
    assert stream(many).num_streams == 32
    assert stream(many, num_streams=16).num_streams == 16
    assert stream(many, packing="best_fit", document_masks=True).num_streams == 1, "and eight groups of windows"


def test_a_small_dataset_of_a_blend_has_streams_of_its_own(many, numbered, tmp_path):
    """The large one keeps its own, and its order."""
    tiny = write(tmp_path / "tiny", [[[400 + number] * 50] for number in range(3)])
    options = {"weights": [0.9, 0.08, 0.02], "batch": 32, "fim": NO_FIM}
    both = stream([many, numbered, tiny], **options)
    assert both.state_dict()["order"]["streams_of_datasets"] == [32, 4, 1]
    assert len(both.state_dict()["streams"]) == 37
    whole = digests([both], 8)
    for dp_size in (2, 8, 32):
        first, second = (ranks([many, numbered, tiny], dp_size, **options) for _ in range(2))
        assert digests(first, 4) == whole[:4]
        go_on(first, second)
        assert digests(second, 4) == whole[4:]


def test_epochs_and_seeds_have_other_orders(numbered):
    first, other = (documents_served(numbered, 200, seed=seed) for seed in (1234, 1235))
    assert first[:36] != other[:36]
    assert first[:36] != first[36:72]
    assert Counter(first[:36]) == Counter(first[36:72]) == Counter(other[:36])


def test_windows_share_one_token_and_labels_are_the_next(sources):
    one = stream(sources, num_streams=1, batch=6, seq_length=50)
    batch, bos = one.next_batch(), small_tokenizer().bos_id
    tokens, labels = batch.tokens.flatten(), batch.labels.flatten()
    assert (batch.tokens.shape, batch.tokens.dtype, batch.labels.dtype) == ((6, 50), torch.int64, torch.int64)
    inside = tokens[1:] != bos
    assert torch.equal(labels[:-1][inside], tokens[1:][inside])
    assert (labels[:-1][~inside] == -100).all()


def test_documents_hold_their_files_and_one_eos_at_the_end(sources):
    """With rate 1 every file of a document is transformed in place, ends with EOS, and none is doubled."""
    tokenizer = small_tokenizer()
    one = stream(sources, num_streams=1, batch=400, fim=FimConfig(rate=1.0))
    tokens = one.next_batch().tokens.flatten().tolist()
    transform = FillInTheMiddle(FimConfig(rate=1.0), CharacterCutter(tokenizer), seed=1234)
    at, documents = 0, 0
    while at < len(tokens) - 6000:
        epoch, place = divmod(documents, sources.num_documents)
        number = one._packers[0][0].order(epoch, place)
        expected = [tokenizer.bos_id]
        for sequence in sources.document_sequences(number):
            expected += transform(sources.sequence(sequence), epoch=epoch, file=sequence).tolist()
        assert tokens[at : at + len(expected)] == expected
        at, documents = at + len(expected), documents + 1
    assert documents > 5
    pairs = set(itertools.pairwise(tokens))
    assert (tokenizer.eos_id, tokenizer.eos_id) not in pairs
    assert (tokenizer.eos_id, tokenizer.fim_begin_id) in pairs  # a further file of the same document


def test_bos_can_be_omitted(numbered):
    tokenizer = small_tokenizer()
    batch = stream(numbered, add_bos=False, fim=NO_FIM).next_batch()
    assert (batch.tokens != tokenizer.bos_id).all()
    assert (batch.labels[batch.tokens == tokenizer.eos_id] == -100).all()


def test_document_masks_say_where_documents_start_and_change_no_token(numbered):
    tokenizer = small_tokenizer()
    plain, masked = stream(numbered), stream(numbered, document_masks=True)
    masked.load_state_dict(plain.state_dict())  # which is of the same order
    for _ in range(2):
        expected, batch = plain.next_batch(), masked.next_batch()
        assert torch.equal(batch.tokens, expected.tokens)
        assert torch.equal(batch.labels, expected.labels)
        assert expected.starts is None
        starts = batch.tokens == tokenizer.bos_id
        assert 8 < starts.sum() < batch.tokens.numel()
        starts[:, 0] = True
        assert (batch.starts | ~starts).all()
        assert (batch.starts & ~starts).sum() <= masked.num_streams, "where a stream comes to its next stretch"


def test_one_document_and_long_windows_work(tmp_path):
    one = write(tmp_path / "one", [[[1, 2, 3]]])
    tokenizer = small_tokenizer()
    batch = stream(one, batch=1, seq_length=12, fim=NO_FIM).next_batch()
    cycle = [tokenizer.bos_id, 1, 2, 3, tokenizer.eos_id]
    assert batch.tokens[0].tolist() == [*cycle, *cycle, *cycle[:2]]
    assert batch.labels[0].tolist() == [*cycle[1:], -100, *cycle[1:], -100, *cycle[1:3]]


def test_a_dataset_without_tokens_is_refused(tmp_path):
    with pytest.raises(DataError, match="empty: a dataset without tokens"):
        stream(write(tmp_path / "empty", [[], []]))


def test_ids_outside_the_vocabulary_are_refused(tmp_path):
    with pytest.raises(DataError, match="sequence 0 has ids outside the tokenizer's 1,033"):
        stream(write(tmp_path / "other", [[[1, 1033]]])).next_batch()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_streams": 3}, r"data\.stream\.num_streams = 3: must be a power of two"),
        ({"num_streams": 0}, "num_streams = 0"),
        ({"seq_length": 0}, "seq_length = 0"),
        ({"batch": 9, "dp_size": 2}, "global_batch_size 9: a multiple of the 2"),
        ({"batch": 0}, "global_batch_size 0"),
        ({"dp_rank": 2, "dp_size": 2}, "dp_rank 2 of dp_size 2"),
    ],
)
def test_settings_that_cannot_work_are_refused(numbered, options, message):
    with pytest.raises(ConfigError, match=message):
        stream(numbered, **options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "seed is 1, but .* was made with 1234"),
        ({"add_bos": False}, "add_bos is False"),
        ({"fim": NO_FIM}, r"fim is \{'rate': 0.0"),
        ({"num_streams": 2}, "num_streams is 2, but .* with 4"),
    ],
)
def test_a_state_of_another_order_is_refused(numbered, change, message):
    with pytest.raises(ConfigError, match=message):
        stream(numbered, **change).load_state_dict(stream(numbered).state_dict())


def test_a_state_of_an_earlier_version_is_refused(numbered):
    state = stream(numbered).state_dict()
    del state["order"]["streams_of_datasets"]
    with pytest.raises(ConfigError, match="of an earlier version, which dealt whole documents"):
        stream(numbered).load_state_dict(state)


def test_a_state_of_another_dataset_is_refused(numbered, sources):
    with pytest.raises(
        ConfigError, match=r"dataset 1 of data.train has 68 documents and .* tokens, but the run began with"
    ):
        stream(sources).load_state_dict(stream(numbered).state_dict())


def test_states_of_different_steps_do_not_merge(numbered):
    first, second = ranks(numbered, 2)
    first.next_batch()
    with pytest.raises(DataError, match=r"different windows: \[0, 8\]"):
        merge_states([first.state_dict(), second.state_dict()])


def test_prefetching_changes_nothing_and_its_state_is_the_consumers(sources):
    plain = stream(sources)
    with Prefetcher(stream(sources), depth=3) as ahead:
        for _ in range(5):
            assert torch.equal(ahead.next_batch().tokens, plain.next_batch().tokens)
        assert ahead.state_dict() == plain.state_dict()
        state = ahead.state_dict()
        expected = plain.next_batch().tokens
        assert torch.equal(ahead.next_batch().tokens, expected)
        ahead.load_state_dict(state)
        assert torch.equal(ahead.next_batch().tokens, expected)
        ahead.close()  # and on from where the consumer stopped
        assert torch.equal(ahead.next_batch().tokens, plain.next_batch().tokens)


@pytest.mark.parametrize("num_workers", [0, 1, 2, 3, 4])
def test_any_number_of_threads_makes_the_same_batches(sources, numbered, num_workers):
    """Also with streams that are not shared out evenly, in a blend, and where a rank walks over others' windows."""
    for options in ({"num_streams": 2}, {"dp_rank": 2, "dp_size": 3, "batch": 12}, {}):
        plain = stream([sources, numbered], weights=[0.6, 0.4], **options)
        made = stream([sources, numbered], weights=[0.6, 0.4], **options)
        with Prefetcher(made, workers=num_workers) as ahead:
            for _ in range(6):
                expected, batch = plain.next_batch(), ahead.next_batch()
                assert torch.equal(batch.tokens, expected.tokens)
                assert torch.equal(batch.labels, expected.labels)
                assert ahead.state_dict() == plain.state_dict()
            state = ahead.state_dict()
            assert torch.equal(ahead.next_batch().tokens, plain.next_batch().tokens)
            ahead.load_state_dict(state)
            plain.load_state_dict(state)
            assert torch.equal(ahead.next_batch().tokens, plain.next_batch().tokens)


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_an_error_in_the_background_reaches_the_consumer(tmp_path, workers):
    tokens = np.arange(64).reshape(8, 1, 8)
    tokens[5, 0, 0] = 60_000
    bad = stream(write_dataset(tmp_path / "bad", tokens), batch=1, seq_length=8, num_streams=1, fim=NO_FIM)
    with Prefetcher(bad, workers=workers) as ahead:
        for _ in range(2):  # and stays an error
            with pytest.raises(DataError, match="sequence 5 has ids outside"):
                [ahead.next_batch() for _ in range(20)]


def test_a_blend_takes_its_shares_and_keeps_each_dataset_in_order(sources, numbered):
    """Windows of one dataset are those of a stream that has it alone, but for their number in the run."""
    blended = stream([numbered, sources], weights=[0.75, 0.25], num_streams=1, batch=1, fim=NO_FIM)
    alone = stream([numbered], num_streams=1, batch=1, fim=NO_FIM)
    second = [blended.next_batch().tokens for _ in range(16)]
    chosen = [0, 0, 1, 0] * 4
    for tokens, dataset in zip(second, chosen, strict=True):
        if dataset == 0:
            assert torch.equal(tokens, alone.next_batch().tokens)


def test_a_blend_resumes_on_any_number_of_ranks(sources, numbered):
    options = {"weights": [0.3, 0.7], "fim_rates": [1.0, 0.0]}
    whole = digests(ranks([sources, numbered], 1, **options), 9)
    for before, after in ((1, 4), (4, 2), (8, 1)):
        first, second = (ranks([sources, numbered], size, **options) for size in (before, after))
        assert digests(first, 5) == whole[:5]
        go_on(first, second)
        assert digests(second, 4) == whole[5:]


def test_a_blend_serves_every_token_of_each_epoch_of_each_dataset_once(tmp_path):
    """Documents of one window each, so that a window is a document: after whole epochs, each was served as often."""
    datasets = []
    for offset, count in ((0, 32), (40, 16)):
        rows = [[[offset + number] * 7] for number in range(count)]
        datasets.append(write(tmp_path / f"set{offset}", rows))
    one = stream(datasets, weights=[2, 1], num_streams=4, seq_length=9, batch=12, fim=NO_FIM)
    served = Counter()
    for _ in range(3 * 48 // 12):
        served.update(one.next_batch().tokens[:, 1].tolist())
    assert served == Counter(dict.fromkeys([*range(32), *range(40, 56)], 3))


def test_rates_of_fill_in_the_middle_are_the_datasets_own(sources, numbered):
    tokenizer = small_tokenizer()
    begin = tokenizer.fim_begin_id
    both = stream([sources, sources], weights=[1, 1], fim_rates=[0.0, 1.0], num_streams=1, batch=200)
    tokens = both.next_batch().tokens
    assert (tokens[0::2] != begin).all()
    assert (tokens[1::2] == begin).any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": [0.5, 0.5]}, r"weights is \[0.5, 0.5\], but .* made with \[0.3, 0.7\]"),
        ({"weights": [0.3, 0.7], "fim_rates": [0.0, 1.0]}, "fim_rates is"),
        ({"weights": [0.3, 0.7], "packing": "best_fit", "document_masks": True}, "packing is 'best_fit'"),
    ],
)
def test_a_state_of_another_blend_is_refused(sources, numbered, change, message):
    state = stream([sources, numbered], weights=[0.3, 0.7]).state_dict()
    with pytest.raises(ConfigError, match=message):
        stream([sources, numbered], **change).load_state_dict(state)


def test_a_blend_with_missing_numbers_is_refused(sources, numbered):
    with pytest.raises(ConfigError, match=r"weights = \[1\]: give one for each of the 2"):
        stream([sources, numbered], weights=[1])
    with pytest.raises(ConfigError, match=r"fim_rates = \[0.1\]: give one for each of the 2"):
        stream([sources, numbered], fim_rates=[0.1])


def test_datasets_of_a_blend_are_dealt_and_cut_independently(numbered):
    """Else datasets of equal size would go through their documents in step, and cut them alike."""
    one = stream([numbered, numbered], weights=[1, 1], num_streams=1, batch=40, fim=NO_FIM)
    tokens = one.next_batch().tokens
    assert not torch.equal(tokens[0::2], tokens[1::2])


@pytest.mark.parametrize("options", [{}, {"packing": "best_fit", "document_masks": True}], ids=["cut", "best_fit"])
@pytest.mark.parametrize("dp_size", [1, 3, 4])
def test_a_single_epoch_serves_every_token_once_and_then_padding(numbered, options, dp_size):
    bos, pad = small_tokenizer().bos_id, small_tokenizer().pad_id
    options = {"batch": 12, "seq_length": 16, "fim": NO_FIM, **options}
    served, endless = Counter(), ranks(numbered, 1, **options)
    streams = [stream(numbered, dp_rank=rank, dp_size=dp_size, epochs=1, **options) for rank in range(dp_size)]
    for step in itertools.count():
        tokens, labels = global_batch(streams).split(16, dim=1)
        if (labels == -100).all():
            break
        if step == 0:
            assert torch.equal(tokens, global_batch(endless).split(16, dim=1)[0])
        known = tokens[tokens != bos]
        served.update(known[known != pad].tolist())
    stored = Counter(token for number in range(numbered.num_documents) for token in numbered.document(number).tolist())
    del stored[pad]  # which ends documents, too
    assert served == stored
    assert (tokens == pad).all()
    assert (global_batch(streams)[:, 16:] == -100).all()
