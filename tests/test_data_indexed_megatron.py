"""megatron-core's IndexedDataset reads our files and we read its builder's: equal bytes, equal documents."""

import importlib.util
import itertools

import numpy as np
import pytest
import torch
from data_parts.megatron import indexed_dataset
from data_samples import write_dataset
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megacoder.data.indexed import IndexedDataset, IndexedDatasetWriter, bin_path, idx_path, token_dtype

pytestmark = pytest.mark.skipif(importlib.util.find_spec("megatron") is None, reason="megatron-core is not installed")


@pytest.fixture(scope="module")
def megatron():
    return indexed_dataset()


def random_documents(seed, dtype):
    """Some empty, some of several sequences, some of empty sequences; ids over the whole range."""
    generator = np.random.default_rng(seed)
    limit = np.iinfo(dtype).max + 1
    counts = generator.choice([1, 1, 1, 0, 2, 5], size=40)
    return [
        [generator.integers(0, limit, generator.choice([0, 1, 7, 300])).astype(dtype) for _ in range(count)]
        for count in counts
    ]


def write_theirs(megatron, prefix, documents, dtype):
    builder = megatron.IndexedDatasetBuilder(str(bin_path(prefix)), dtype=dtype)
    for sequences in documents:
        tokens = np.concatenate([np.empty(0, dtype), *sequences])
        builder.add_document(torch.from_numpy(tokens.astype(np.int64)), [len(one) for one in sequences])
    builder.finalize(str(idx_path(prefix)))


def lists(documents):
    return [[sequence.tolist() for sequence in sequences] for sequences in documents]


def read_by_ours(prefix):
    dataset = IndexedDataset(prefix)
    sequences = map(dataset.document_sequences, range(dataset.num_documents))
    return [[dataset.sequence(index).tolist() for index in indices] for indices in sequences]


def read_by_theirs(megatron, prefix):
    dataset = megatron.IndexedDataset(str(prefix))  # its views of the file must not outlive it
    bounds = itertools.pairwise(dataset.document_indices.tolist())
    return [[dataset[index].tolist() for index in range(start, stop)] for start, stop in bounds]


def check_both_ways(megatron, folder, documents, dtype):
    write_dataset(folder / "ours", documents, dtype)
    write_theirs(megatron, folder / "theirs", documents, dtype)
    for path in (bin_path, idx_path):
        assert path(folder / "ours").read_bytes() == path(folder / "theirs").read_bytes()
    assert read_by_ours(folder / "theirs") == lists(documents)
    if any(len(sequence) for sequences in documents for sequence in sequences):  # theirs cannot map an empty file
        assert read_by_theirs(megatron, folder / "ours") == lists(documents)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
@pytest.mark.parametrize("seed", range(3))
def test_random_documents_both_ways(megatron, tmp_path, seed, dtype):
    check_both_ways(megatron, tmp_path, random_documents(seed, dtype), dtype)


small = st.lists(st.lists(st.lists(st.integers(0, 65535), max_size=4), max_size=3), max_size=5)


@settings(max_examples=40, deadline=None)
@given(small, st.sampled_from([np.uint16, np.int32]))
@example([], np.uint16)
@example([[]], np.uint16)
@example([[[]]], np.int32)
@example([[[7]]], np.uint16)
@example([[], [[1]], []], np.int32)
def test_any_shape_reads_back_in_both_libraries(megatron, tmp_path_factory, documents, dtype):
    arrays = [[np.array(sequence, dtype) for sequence in sequences] for sequences in documents]
    check_both_ways(megatron, tmp_path_factory.mktemp("pair"), arrays, dtype)


def test_merged_parts_equal_those_of_megatrons_builder(megatron, tmp_path):
    parts = [tmp_path / f"part{index}" for index in range(3)]
    for seed, part in enumerate(parts):
        write_dataset(part, random_documents(seed, np.uint16))
    with IndexedDatasetWriter(tmp_path / "ours", dtype=np.uint16) as writer:
        for part in parts:
            writer.append(IndexedDataset(part))
    builder = megatron.IndexedDatasetBuilder(str(bin_path(tmp_path / "theirs")), dtype=np.uint16)
    for part in parts:
        builder.add_index(str(part))
    builder.finalize(str(idx_path(tmp_path / "theirs")))
    for path in (bin_path, idx_path):
        assert path(tmp_path / "ours").read_bytes() == path(tmp_path / "theirs").read_bytes()


def test_both_choose_the_same_dtype(megatron):
    for size in (1, 32_256, 65_499, 65_500, 102_400):
        assert token_dtype(size) == megatron.DType.optimal_dtype(size)
