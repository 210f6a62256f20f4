"""The indexed format: Megatron's bytes, documents of several sequences, and a clear error for every damaged field."""

import hashlib
import os
import struct

import numpy as np
import pytest
from data_samples import write_dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from megacoder.core.errors import DataError, FormatError
from megacoder.core.native import native
from megacoder.data import indexed
from megacoder.data.indexed import (
    IndexedDataset,
    IndexedDatasetWriter,
    bin_path,
    idx_path,
    rename_dataset,
    token_dtype,
)

GOLDEN = [[1, 2, 3, 4, 5, 0], [6, 7, 0], [8, 9, 10, 11, 0], [12, 0], [*range(13, 20), 0]]


@pytest.fixture
def golden(tmp_path):
    write_dataset(tmp_path / "golden", [[document] for document in GOLDEN])
    return tmp_path / "golden"


def test_bytes_equal_megatrons(golden):
    index = idx_path(golden).read_bytes()
    assert len(index) == 142
    assert index[:34].hex() == "4d4d4944494458000001000000000000000805000000000000000600000000000000"
    assert hashlib.md5(index).hexdigest() == "88938404b4050c44326dd6db0aae1c5e"
    assert hashlib.md5(bin_path(golden).read_bytes()).hexdigest() == "4ceb0b8bc81e9ae61de7d066845e8f30"


def test_only_the_bin_and_idx_files_remain(golden, tmp_path):
    assert {path.name for path in tmp_path.iterdir()} == {"golden.bin", "golden.idx"}


def test_dtype_follows_the_vocabulary():
    assert [token_dtype(size) for size in (1, 65_499, 65_500, 102_400)] == [np.uint16, np.uint16, np.int32, np.int32]


documents_of_sequences = st.lists(st.lists(st.lists(st.integers(0, 127), max_size=6), max_size=4), max_size=8)


@settings(max_examples=60, deadline=None)
@given(documents_of_sequences, st.sampled_from([np.uint8, np.int8, np.uint16, np.int16, np.int32, np.int64]))
def test_data_reads_back_as_written(tmp_path_factory, documents, dtype):
    dataset = write_dataset(tmp_path_factory.mktemp("any") / "set", documents, dtype)
    assert dataset.dtype == dtype
    assert dataset.num_documents == len(documents)
    assert dataset.num_sequences == sum(map(len, documents))
    assert dataset.num_tokens == sum(len(sequence) for document in documents for sequence in document)
    for index, document in enumerate(documents):
        assert dataset.document(index).tolist() == [token for sequence in document for token in sequence]
        assert [dataset.sequence(i).tolist() for i in dataset.document_sequences(index)] == document


def test_many_documents_at_once_and_appended_parts_are_the_same_bytes(tmp_path, golden):
    parts = [write_dataset(tmp_path / f"part{i}", [[document] for document in GOLDEN[i::2]]) for i in (0, 1)]
    with IndexedDatasetWriter(tmp_path / "joined", dtype=np.uint16) as writer:
        for part in parts:
            writer.append(part)
    in_order = GOLDEN[0::2] + GOLDEN[1::2]
    with IndexedDatasetWriter(tmp_path / "at_once", dtype=np.uint16) as writer:
        writer.add_documents(np.concatenate(in_order), [len(document) for document in in_order], [1] * len(in_order))
    for path in (bin_path, idx_path):
        assert path(tmp_path / "joined").read_bytes() == path(tmp_path / "at_once").read_bytes()


@pytest.mark.parametrize("entries", [1, 2, 4])
def test_an_index_is_written_in_parts_of_any_size(golden, tmp_path, monkeypatch, entries):
    whole = write_dataset(tmp_path / "whole", [[document] for document in GOLDEN * 2])
    monkeypatch.setattr(indexed, "_CHUNK", entries)
    with IndexedDatasetWriter(tmp_path / "parts", dtype=np.uint16) as writer:
        for _ in range(2):
            writer.append(IndexedDataset(golden))
    assert idx_path(tmp_path / "parts").read_bytes() == idx_path(whole.prefix).read_bytes()


@pytest.mark.parametrize("dtype", [np.uint8, np.int32])
def test_offsets_are_64_bit_in_files_and_checks(tmp_path, monkeypatch, dtype):
    """A sparse file of more than 4 GB, with sequences as long as the format allows."""
    lengths = np.array([2**31 - 1, 2**31 - 1, 3], dtype=np.int32)
    with IndexedDatasetWriter(tmp_path / "large", dtype=dtype) as writer:
        writer._bin.truncate(int(lengths.sum(dtype=np.int64)) * writer.dtype.itemsize)
        writer._lengths.write(lengths.tobytes())
        writer._offsets.write(np.arange(1, 4).tobytes())
        writer.num_sequences = writer.num_documents = 3
    for module in (native(), None):
        monkeypatch.setattr(indexed, "native", lambda module=module: module)
        dataset = IndexedDataset(tmp_path / "large")
        assert (len(dataset.sequence(2)), len(dataset.document(1))) == (3, 2**31 - 1)
        assert dataset.document_tokens(np.arange(3)).tolist() == lengths.tolist()


def test_views_cannot_be_written(golden):
    with pytest.raises(ValueError, match="read-only"):
        IndexedDataset(golden).document(0)[0] = 7


@pytest.mark.parametrize("index", [-1, 5])
def test_numbers_out_of_range_are_index_errors(golden, index):
    with pytest.raises(IndexError):
        IndexedDataset(golden).document(index)
    with pytest.raises(IndexError):
        IndexedDataset(golden).sequence(index if index < 0 else 6)


def test_a_failed_writer_leaves_the_old_pair(golden, tmp_path):
    before = [path.read_bytes() for path in sorted(tmp_path.iterdir())]
    with pytest.raises(DataError), IndexedDatasetWriter(golden, dtype=np.uint16) as writer:
        writer.add_document([np.arange(9), np.array([-1])])
    assert [path.read_bytes() for path in sorted(tmp_path.iterdir())] == before


@pytest.mark.parametrize("how", ["written", "renamed"])
def test_an_old_index_never_stands_beside_new_tokens(golden, tmp_path, monkeypatch, how):
    """Whatever the moment of a kill: the old index goes first, the new one comes last."""
    write_dataset(tmp_path / "other", [[[7, 8, 0]]])
    taken, replace = [], os.replace

    def watched(source, target):
        if target == bin_path(golden):
            assert not idx_path(golden).exists()
        taken.append(target)
        replace(source, target)

    monkeypatch.setattr(os, "replace", watched)
    if how == "written":
        write_dataset(golden, [[[7, 8, 0]]])
    else:
        rename_dataset(tmp_path / "other", golden)
    assert taken == [bin_path(golden), idx_path(golden)]
    assert IndexedDataset(golden).num_tokens == 3


def test_ids_that_do_not_fit_are_refused(tmp_path):
    with (
        pytest.raises(DataError, match="token id 65536 does not fit uint16"),
        IndexedDatasetWriter(tmp_path / "set", dtype=np.uint16) as writer,
    ):
        writer.add_document([np.array([1, 65536])])
    with pytest.raises(DataError, match="dtype float32"):
        IndexedDatasetWriter(tmp_path / "set", dtype=np.float32)


def test_appending_another_dtype_is_refused(tmp_path, golden):
    with (
        pytest.raises(DataError, match="tokens are uint16, expected int32"),
        IndexedDatasetWriter(tmp_path / "set", dtype=np.int32) as writer,
    ):
        writer.append(IndexedDataset(golden))


def overwrite(path, offset, data):
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


@pytest.mark.parametrize(
    ("offset", "data", "message"),
    [
        (0, b"GARBAGE", "magic"),
        (0, b"TNTIDX\x00\x00\x00", "TNTIDX"),
        (9, struct.pack("<Q", 2), "version 2"),
        (17, b"\x06", "code 6 is floating point"),
        (17, b"\x07", "code 7 is floating point"),
        (17, b"\x09", "code 9"),
        (17, b"\x04", "byte offset of sequence 1"),  # int32: offsets no longer fit the lengths
        (18, struct.pack("<Q", 6), "142 bytes"),
        (18, struct.pack("<Q", 2**63), "142 bytes"),
        (26, struct.pack("<Q", 0), "142 bytes"),
        (34, struct.pack("<i", -1), "length of sequence 0 is -1"),
        (34 + 4, struct.pack("<i", 4), "byte offset of sequence 2"),
        (34 + 16, struct.pack("<i", 9), "but the index describes 50"),
        (34 + 20, struct.pack("<q", 2), "byte offset of sequence 0"),
        (34 + 20 + 24, struct.pack("<q", -8), "byte offset of sequence 3"),
        (34 + 60, struct.pack("<q", 1), "run from 1 to 5"),
        (34 + 60 + 40, struct.pack("<q", 6), "run from 0 to 6"),
        (34 + 60 + 16, struct.pack("<q", 4), "fall after document 2"),
    ],
)
def test_every_damaged_field_is_named(golden, offset, data, message):
    overwrite(idx_path(golden), offset, data)
    with pytest.raises(FormatError, match=message):
        IndexedDataset(golden)


def test_truncated_files_are_refused(golden):
    tokens, index = bin_path(golden).read_bytes(), idx_path(golden).read_bytes()
    for size in (0, 1, len(tokens) - 1, len(tokens) - 2):
        bin_path(golden).write_bytes(tokens[:size])
        with pytest.raises(FormatError, match=f"{size} bytes, but the index describes 48"):
            IndexedDataset(golden)
    bin_path(golden).write_bytes(tokens)
    for size in (0, 10, 33, 34, len(index) - 1):
        idx_path(golden).write_bytes(index[:size])
        with pytest.raises(FormatError, match=f"{size} bytes"):
            IndexedDataset(golden)
    idx_path(golden).write_bytes(index + b"\0")
    with pytest.raises(FormatError, match="143 bytes"):
        IndexedDataset(golden)


def test_a_flipped_bit_never_changes_tokens_silently(golden):
    """An edited index gives the same tokens in the same documents or sequences, or a FormatError."""
    index = idx_path(golden).read_bytes()
    for position in range(len(index)):
        for bit in range(8):
            edited = bytearray(index)
            edited[position] ^= 1 << bit
            idx_path(golden).write_bytes(edited)
            try:
                dataset = IndexedDataset(golden)
            except FormatError:
                continue
            sequences = [dataset.sequence(i).tolist() for i in range(dataset.num_sequences)]
            assert sequences == GOLDEN or position == 17  # 17: another integer type of the same size
            documents = [dataset.document(i) for i in range(dataset.num_documents)]
            assert np.array_equal(np.concatenate(documents), np.concatenate(sequences))


@pytest.mark.parametrize("missing", [bin_path, idx_path])
def test_a_missing_file_is_named(golden, missing):
    missing(golden).unlink()
    with pytest.raises(DataError, match=f"{missing(golden).name}: No such file"):
        IndexedDataset(golden)


@pytest.mark.parametrize("named", [bin_path, idx_path])
def test_a_file_in_the_place_of_the_prefix_is_named_with_what_to_give(golden, named):
    with pytest.raises(DataError, match=rf"{named(golden)}: a dataset is named without \.\w+; give {golden}$"):
        IndexedDataset(named(golden))


@pytest.mark.skipif(native() is None, reason="the kernels are not built")
def test_the_compiled_checks_agree_with_the_reference(tmp_path, monkeypatch):
    prefix, count = tmp_path / "many", 3 * (1 << 15) + 17
    with IndexedDatasetWriter(prefix, dtype=np.dtype(np.uint16)) as writer:
        writer.add_documents(np.full(count, 7, np.uint16), np.ones(count, np.int64), np.ones(count, np.int64))
    whole = idx_path(prefix).read_bytes()
    pointers_at, documents_at = 34 + 4 * count, 34 + 12 * count
    entries = [0, 1, (1 << 15) - 1, 1 << 15, (1 << 15) + 1, count - 1]
    places = [34 + 4 * entry for entry in entries] + [34 + 4 * entry + 3 for entry in entries]
    places += [at + 8 * entry for at in (pointers_at, documents_at) for entry in entries]
    places += [at + 8 * entry + 7 for at in (pointers_at, documents_at) for entry in entries]
    for place in places:
        idx_path(prefix).write_bytes(whole[:place] + bytes([whole[place] ^ 0x80]) + whole[place + 1 :])
        said = []
        for module in (native(), None):
            monkeypatch.setattr(indexed, "native", lambda module=module: module)
            with pytest.raises(FormatError) as caught:
                IndexedDataset(prefix)
            said.append(str(caught.value))
        assert said[0] == said[1], place


@pytest.mark.skipif(native() is None, reason="the kernels are not built")
def test_offsets_that_wrap_around_are_wrong_in_the_next_run_of_entries():
    count = (1 << 15) + 9
    lengths, pointers = np.zeros(count, np.int32), np.zeros(count, np.int64)
    lengths[4], pointers[5:] = 1 << 30, np.iinfo(np.int64).min
    assert native().first_wrong_sequences(lengths.ctypes.data, pointers.ctypes.data, count, 1 << 33) == 1 << 15
