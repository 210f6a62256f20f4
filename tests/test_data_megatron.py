"""Megatron's order: golden values made with its own code, and ours compared with megatron-core's functions."""

import ast
import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from data_samples import small_tokenizer, write_dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from megacoder.core.errors import ConfigError, DataError
from megacoder.core.native import native
from megacoder.data.fim import FimConfig
from megacoder.data.megatron_order import blending_indices, build_sample_order, normalized, split_range
from megacoder.data.megatron_stream import MegatronConfig, MegatronStream
from megacoder.data.stream import StreamConfig, merge_states

GOLDEN = [[1, 2, 3, 4, 5, 0], [6, 7, 0], [8, 9, 10, 11, 0], [12, 0], [13, 14, 15, 16, 17, 18, 19, 0]]
LENGTHS = np.array([len(document) for document in GOLDEN], dtype=np.int32)
ALL = np.arange(len(GOLDEN), dtype=np.int32)


class Theirs:
    """megatron-core's functions without its package, whose import takes seconds and a dozen other libraries."""

    def __init__(self):
        found = importlib.util.find_spec("megatron")
        if found is None:
            pytest.skip("megatron-core is not installed")
        (root,) = found.submodule_search_locations
        datasets = Path(root) / "core" / "datasets"
        names = {"_build_document_index", "_build_shuffle_index"}
        tree = ast.parse((datasets / "gpt_dataset.py").read_text())
        tree.body = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in names]
        self.python = {"numpy": np}
        exec(compile(tree, "gpt_dataset.py", "exec"), self.python)
        (library,) = datasets.glob("helpers_cpp*.so")
        spec = importlib.util.spec_from_file_location("helpers_cpp", library)
        self.helpers = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(self.helpers)

    def order(self, lengths, sequences, *, num_samples, seq_length, seed):
        """The steps of GPTDataset._build_document_sample_shuffle_indices."""
        per_epoch = int(np.sum(lengths[sequences]))
        epochs = 1
        while num_samples is not None and epochs * per_epoch < num_samples * seq_length + 1:
            epochs += 1
        apart = False
        if epochs > 1:
            whole = ((epochs - 1) * per_epoch - 1) // seq_length
            apart = num_samples - whole < int(0.80 * ((per_epoch - 1) // seq_length))
        random = np.random.RandomState(seed)
        documents = self.python["_build_document_index"](sequences, epochs, random, apart)
        samples = self.helpers.build_sample_idx_int32(lengths, documents, seq_length, epochs, per_epoch, True, 1)
        total = len(samples) - 1
        shuffle = self.python["_build_shuffle_index"](whole if apart else total, total, random)
        return documents, samples, shuffle


@pytest.fixture(scope="module")
def theirs():
    return Theirs()


def test_golden_indices_of_one_epoch():
    order = build_sample_order(LENGTHS, ALL, num_samples=5, seq_length=4, seed=1234)
    assert order.documents.tolist() == [4, 0, 1, 2, 3]
    assert order.samples.tolist() == [[0, 0], [0, 4], [1, 0], [1, 4], [2, 2], [3, 3]]
    assert order.shuffle.tolist() == [3, 2, 1, 0, 4]


def test_golden_indices_of_two_epochs():
    order = build_sample_order(LENGTHS, ALL, num_samples=9, seq_length=4, seed=1234)
    assert order.documents.tolist() == [2, 2, 4, 1, 0, 3, 4, 0, 1, 3]
    assert order.samples.tolist() == [
        [0, 0], [0, 4], [1, 3], [2, 2], [2, 6], [3, 2], [4, 3], [5, 1], [6, 3], [6, 7], [7, 3], [8, 1],
    ]  # fmt: skip
    assert order.shuffle.tolist() == [3, 10, 2, 1, 7, 5, 4, 0, 8, 6, 9]


def test_golden_blend():
    datasets, numbers = blending_indices([0.5, 0.3, 0.2], 10)
    assert datasets.tolist() == [0, 1, 2, 0, 1, 0, 2, 0, 1, 0]
    assert numbers.tolist() == [0, 0, 0, 1, 1, 2, 1, 3, 2, 4]


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_order_equals_megatrons(theirs, data):
    """Empty sequences, several epochs, a last one apart or not, parts of the sequences."""
    lengths = np.array(data.draw(st.lists(st.integers(0, 40), min_size=1, max_size=30)), dtype=np.int32)
    sequences = np.arange(data.draw(st.integers(1, len(lengths))), dtype=np.int32)
    seq_length, seed = data.draw(st.integers(2, 20)), data.draw(st.integers(0, 2**32 - 1))
    per_epoch = int(lengths[sequences].sum())
    num_samples = data.draw(st.one_of(st.none(), st.integers(1, 4 * per_epoch // seq_length + 2)))
    arguments = {"num_samples": num_samples, "seq_length": seq_length, "seed": seed}
    if per_epoch <= seq_length and (num_samples is None or num_samples * seq_length + 1 <= per_epoch or per_epoch < 2):
        with pytest.raises(DataError, match="too few for a sample"):
            build_sample_order(lengths, sequences, **arguments)
        return
    ours = build_sample_order(lengths, sequences, **arguments)
    documents, samples, shuffle = theirs.order(lengths, sequences, **arguments)
    assert ours.documents.dtype == documents.dtype
    assert np.array_equal(ours.documents, documents)
    assert np.array_equal(ours.samples, samples)
    assert ours.shuffle.dtype == shuffle.dtype
    assert np.array_equal(ours.shuffle, shuffle)


def test_a_last_epoch_is_kept_apart_below_four_fifths(theirs):
    """The property above meets both cases; here they are by name."""
    lengths = np.full(50, 21, dtype=np.int32)
    for num_samples in (120, 200):  # an epoch has 104 samples
        arguments = {"num_samples": num_samples, "seq_length": 10, "seed": 7}
        ours = build_sample_order(lengths, np.arange(50), **arguments)
        _, _, shuffle = theirs.order(lengths, np.arange(50), **arguments)
        assert (ours.shuffle[:104].max() == 103) == (num_samples == 120)
        assert np.array_equal(ours.shuffle, shuffle)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0.001, 1000.0), min_size=1, max_size=7), st.integers(0, 400))
def test_any_blend_equals_megatrons(theirs, weights, size):
    weights = normalized(normalized(weights))
    datasets, numbers = np.zeros(size, dtype=np.int16), np.zeros(size, dtype=np.int64)
    theirs.helpers.build_blending_indices(datasets, numbers, weights, len(weights), size, False)
    ours = blending_indices(weights, size)
    assert np.array_equal(ours[0], datasets)
    assert np.array_equal(ours[1], numbers)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(0.001, 1000.0), min_size=1, max_size=40), st.integers(0, 400))
def test_compiled_blends_equal_those_in_python(weights, size):
    compiled = blending_indices(normalized(weights), size)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("megacoder.data.megatron_order.native", lambda: None)
        for ours, reference in zip(compiled, blending_indices(normalized(weights), size), strict=True):
            assert np.array_equal(ours, reference)
            assert ours.dtype == reference.dtype


def test_blends_are_compiled_where_there_is_a_compiler():
    if native() is None:
        pytest.skip("the kernels are not built")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("megacoder.data.megatron_order.range", lambda *_: pytest.fail("a loop in Python"), raising=False)
        assert np.bincount(blending_indices([0.5, 0.3, 0.2], 1000)[0]).tolist() == [500, 300, 200]
        assert np.array_equal(blending_indices([1.0], 40_000)[1], np.arange(40_000))  # more than int16 holds


@pytest.mark.parametrize(
    ("split", "number"), [((1.0,), 10), ((969, 30, 1), 10), ((8, 1, 1), 8), ((1, 1), 5), ((0.25, 0.75), 2)]
)
def test_training_data_are_the_first_share(split, number):
    assert split_range(split, 10).tolist() == list(range(number))


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    """The golden file, and one with documents of several sequences."""
    folder, rng = tmp_path_factory.mktemp("megatron"), np.random.default_rng(0)
    more = [[rng.integers(20, 90, rng.integers(0, 9)) for _ in range(3)] for _ in range(20)]
    return [write_dataset(folder / "golden", [[document] for document in GOLDEN]), write_dataset(folder / "more", more)]


def stream(datasets, *, num_samples=5, batch=1, dp_rank=0, dp_size=1, weights=(), megatron=None, **config):
    settings = {"seq_length": 4, "add_bos": False, "train_across_documents": True, "fim": FimConfig(rate=0.0)} | config
    return MegatronStream(
        datasets, small_tokenizer(), StreamConfig(**settings), megatron or MegatronConfig(),
        num_samples=num_samples, global_batch_size=batch, weights=weights, dp_rank=dp_rank, dp_size=dp_size,
    )  # fmt: skip


def test_golden_samples(datasets):
    batch = stream(datasets[:1], batch=5).next_batch()
    assert torch.cat([batch.tokens, batch.labels[:, -1:]], dim=1).tolist() == [
        [5, 0, 6, 7, 0], [1, 2, 3, 4, 5], [17, 18, 19, 0, 1], [13, 14, 15, 16, 17], [0, 8, 9, 10, 11],
    ]  # fmt: skip
    assert torch.equal(batch.tokens[:, 1:], batch.labels[:, :-1])
    assert batch.starts is None


def test_samples_of_a_blend_are_the_datasets_in_turn(datasets):
    weights = [0.7, 0.3]
    blended = stream(datasets, num_samples=40, weights=weights)
    sizes = [int(np.ceil(int(np.ceil(40 * share)) * 1.005)) for share in normalized(weights)]
    alone = [stream([one], num_samples=size) for one, size in zip(datasets, sizes, strict=True)]
    chosen, numbers = blending_indices(normalized(normalized(weights)), 40)
    for index, (dataset, number) in enumerate(zip(chosen.tolist(), numbers.tolist(), strict=True)):
        assert blended.sample(index).tolist() == alone[dataset].sample(number).tolist()


def test_datasets_without_weights_are_blended_by_their_samples(datasets):
    blended = stream(datasets, num_samples=10**6)
    alone = [stream([one], num_samples=1) for one in datasets]
    counts = [len(one._orders[0]) for one in alone]
    assert blended.num_samples == sum(counts)
    chosen, _ = blending_indices(normalized(counts), sum(counts))
    assert np.bincount(chosen).tolist() == counts
    assert blended.sample(0).tolist() == alone[int(chosen[0])].sample(0).tolist()


@pytest.mark.parametrize("dp_size", [1, 2, 4])
def test_ranks_share_megatrons_batches_and_resume_anywhere(datasets, dp_size):
    alone = stream(datasets, num_samples=24, batch=4, weights=[1, 1])
    whole = [alone.next_batch().tokens for _ in range(5)]
    ranks = [
        stream(datasets, num_samples=24, batch=4, weights=[1, 1], dp_rank=rank, dp_size=dp_size)
        for rank in range(dp_size)
    ]
    first = [torch.stack([one.next_batch().tokens for one in ranks], dim=1).flatten(0, 1) for _ in range(2)]
    state = merge_states([one.state_dict() for one in ranks])
    resumed = stream(datasets, num_samples=24, batch=4, weights=[1, 1])
    resumed.load_state_dict(state)
    assert torch.equal(torch.cat([*first, *(resumed.next_batch().tokens for _ in range(3))]), torch.cat(whole))


def test_a_run_resumes_from_megatrons_position(datasets):
    moved = MegatronConfig(num_samples=24, consumed_samples=8)
    tail = stream(datasets, num_samples=1, batch=4, weights=[1, 1], megatron=moved)
    whole = stream(datasets, num_samples=24, batch=4, weights=[1, 1])
    batches = [whole.next_batch().tokens for _ in range(4)]
    assert torch.equal(tail.next_batch().tokens, batches[2])
    assert torch.equal(tail.next_batch().tokens, batches[3])


def test_masks_are_megatrons_options(datasets):
    """--eod-mask-loss, --reset-position-ids and --reset-attention-mask look at the end-of-document token."""
    eos = small_tokenizer().eos_id
    plain = stream(datasets[:1], batch=5).next_batch()
    masked = stream(datasets[:1], batch=5, train_across_documents=False, document_masks=True).next_batch()
    assert torch.equal(plain.tokens, masked.tokens)
    ends = masked.tokens == eos
    assert (masked.labels[ends] == -100).all()
    assert torch.equal(masked.labels[~ends], plain.labels[~ends])
    assert torch.equal(masked.starts[:, 1:], ends[:, :-1])


def test_a_long_build_is_announced(datasets, capsys):
    stream(datasets[:1], num_samples=1000)
    assert capsys.readouterr().err == ""
    stream(datasets[:1], num_samples=1 << 20)
    assert capsys.readouterr().err == "building Megatron's order of 1,048,576 samples\n"


def test_samples_that_are_used_up_are_an_error(datasets):
    one = stream(datasets[:1], num_samples=5, batch=5)
    one.next_batch()
    with pytest.raises(DataError, match=r"has 5 samples, but this step needs 10; set data\.megatron\.num_samples"):
        one.next_batch()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fim": FimConfig(rate=0.5)}, r"data.stream.fim.rate would change them"),
        ({"add_bos": True}, r"data.stream.add_bos would change them; set data.stream.add_bos = false"),
        ({"weights": [1.0]}, r"weights = \[1.0\]: give one for each of the 2"),
        ({"seq_length": 4000}, "too few for a sample"),
        ({"dp_size": 2, "batch": 3}, "global_batch_size 3"),
    ],
)
def test_streams_that_cannot_work_are_refused(datasets, options, message):
    with pytest.raises((ConfigError, DataError), match=message):
        stream(datasets, **options)


def test_a_state_of_another_number_of_samples_is_refused(datasets):
    with pytest.raises(ConfigError, match="num_samples is 9, but"):
        stream(datasets[:1], num_samples=9).load_state_dict(stream(datasets[:1]).state_dict())
