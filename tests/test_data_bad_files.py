"""Damaged inputs of the data path give the same tokens or one clear line; never a crash or half a dataset."""

import dataclasses
import json
import os
import random
import resource

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from checkpoint_cases import no_space
from command_line import refusal, run_command
from data_samples import small_tokenizer, source_texts, write_dataset, write_jsonl

from megacoder.core.errors import ConfigError, DataError, FormatError
from megacoder.data.cuts import CharacterCutter
from megacoder.data.fim import FillInTheMiddle, FimConfig
from megacoder.data.indexed import IndexedDataset, bin_path, idx_path
from megacoder.data.inspection import InspectConfig, inspect
from megacoder.data.merging import MergeConfig, merge
from megacoder.data.preprocess import PreprocessConfig, preprocess
from megacoder.data.sidecar import Sidecar
from megacoder.data.stream import StreamConfig, TokenStream
from megacoder.data.tokenizer import Tokenizer
from megacoder.data.tokenizer_training import train_tokenizer


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A tokenizer and a dataset of twelve documents, most of them of several files."""
    folder = tmp_path_factory.mktemp("made")
    rows = [{"content": text[:400], "sample": index // 2} for index, text in enumerate(source_texts(24))]
    write_jsonl(folder / "in.jsonl", rows)
    small_tokenizer().save(folder / "tokenizer")
    preprocess(config_of(folder, folder / "in.jsonl", document_key="sample"))
    return folder


def config_of(folder, *inputs, output="set", **options):
    return PreprocessConfig(
        input=inputs, tokenizer=folder / "tokenizer", output=folder / output, workers=1,
        **{"encoder": "tokenizers", **options},
    )  # fmt: skip


def test_a_thousand_flipped_bytes_are_all_noticed(made, tmp_path):
    """Opening, every access and the report either give what was written or end with an error of ours."""
    prefix, generator = tmp_path / "set", random.Random(0)
    whole = {path: path(made / "set").read_bytes() for path in (bin_path, idx_path)}
    Sidecar.path(prefix).write_bytes(Sidecar.path(made / "set").read_bytes())
    expected = IndexedDataset(made / "set")
    counts = {"refused at open": 0, "noticed by --verify": 0}
    for trial in range(1000):
        damaged = generator.choice([bin_path, idx_path])
        for path, content in whole.items():
            path(prefix).write_bytes(content)
        edited = bytearray(whole[damaged])
        edited[generator.randrange(len(edited))] ^= generator.randrange(1, 256)
        damaged(prefix).write_bytes(edited)
        try:
            dataset = IndexedDataset(prefix)
        except FormatError:
            counts["refused at open"] += 1
            continue
        sequences = [dataset.sequence(index) for index in range(dataset.num_sequences)]
        documents = [dataset.document(index) for index in range(dataset.num_documents)]
        assert sum(map(len, sequences)) == sum(map(len, documents)) == expected.num_tokens
        with pytest.raises(FormatError, match="not as it was written"):
            inspect(InspectConfig(prefix=prefix, verify=True))
        counts["noticed by --verify"] += 1
        if trial % 20 == 0:
            decoded_or_refused(InspectConfig(prefix=prefix, tokenizer=made / "tokenizer", documents=12))
    assert min(counts.values()) > 100


def decoded_or_refused(config):
    try:
        report = inspect(config)
    except DataError as error:
        message = str(error)
        return "has ids from" in message or pytest.fail(message)
    return len(report["beginnings"]) == 12 or pytest.fail(str(report))


def test_bin_and_idx_are_verified_and_a_missing_checksum_is_reported(made, tmp_path):
    assert inspect(InspectConfig(prefix=made / "set", verify=True))["checksum"] == "as it was written"
    write_dataset(tmp_path / "plain", [[[0, 1, 2]]])
    with pytest.raises(DataError, match="no checksum to compare with"):
        inspect(InspectConfig(prefix=tmp_path / "plain", verify=True))


def test_merged_parts_equal_the_undivided_dataset(made, tmp_path, capsys):
    rows = (made / "in.jsonl").read_text().splitlines(keepends=True)
    for name, some in (("a", rows[:10]), ("b", rows[10:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(some))
        config = config_of(made, tmp_path / f"{name}.jsonl", document_key="sample", output=tmp_path / name)
        preprocess(config)
    assert run_command(capsys, "data", "merge", tmp_path / "a", tmp_path / "b", "--output", tmp_path / "both")[0] == 0
    for path in (bin_path, idx_path):
        assert path(tmp_path / "both").read_bytes() == path(made / "set").read_bytes()
    both, whole = Sidecar.read(tmp_path / "both"), Sidecar.read(made / "set")
    for name in ("documents", "sequences", "tokens", "bytes", "tokenizer", "document_key", "checksum"):
        assert getattr(both, name) == getattr(whole, name)
    said = refusal(capsys, "data", "merge", tmp_path / "a", "--output", tmp_path / "both", code=2)
    assert "both.idx: exists; choose another --output" in said


def test_a_full_disk_is_one_line_that_names_the_file(made, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.copyfileobj", no_space)
    with pytest.raises(DataError, match=r"both\.bin: No space left on device"):
        merge(MergeConfig(prefixes=(made / "set", made / "set"), output=tmp_path / "both"))
    assert list(tmp_path.iterdir()) == []


def test_parts_that_do_not_belong_together_are_refused(made, tmp_path):
    train_tokenizer(source_texts(3), vocab_size=600).save(tmp_path / "tokenizer")
    preprocess(config_of(tmp_path, made / "in.jsonl", output="other"))
    with pytest.raises(ConfigError, match=r"other: made with the tokenizer .*set with"):
        merge(MergeConfig(prefixes=(made / "set", tmp_path / "other"), output=tmp_path / "both"))
    write_dataset(tmp_path / "wide", [[[0, 1, 2]]], np.int32)
    with pytest.raises(ConfigError, match=r"wide: tokens are int32, those of .*set uint16"):
        merge(MergeConfig(prefixes=(made / "set", tmp_path / "wide"), output=tmp_path / "both"))
    with pytest.raises(DataError, match=r"gone.idx: No such file"):
        merge(MergeConfig(prefixes=(made / "set", tmp_path / "gone"), output=tmp_path / "both"))
    with pytest.raises(ConfigError, match="no datasets to merge"):
        MergeConfig(prefixes=(), output=tmp_path / "both")
    assert not idx_path(tmp_path / "both").exists()


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_one_line_of_megabytes_and_nul_bytes_are_encoded_completely(made, tmp_path, suffix):
    texts = ["f(x)=1;\x00" * 300_000, "\x00" * 1000, "a\x00b"]
    path = tmp_path / f"in{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.table({"content": texts}), path)
    else:
        write_jsonl(path, [{"content": text} for text in texts])
    preprocess(config_of(made, path, output=tmp_path / "set", encoder="auto"))
    dataset = IndexedDataset(tmp_path / "set")
    decoded = [small_tokenizer().decode(dataset.document(index)[:-1].tolist()) for index in range(3)]
    assert decoded == texts


def test_fill_in_the_middle_encodes_only_around_the_cuts_of_a_minified_file(made, tmp_path, monkeypatch):
    text = " ".join("".join(source_texts()).split())[:1_100_000]  # one line, more than is encoded at once
    write_jsonl(tmp_path / "in.jsonl", [{"content": text}])
    preprocess(config_of(made, tmp_path / "in.jsonl", output=tmp_path / "set", encoder="auto"))
    assert inspect(InspectConfig(prefix=tmp_path / "set", verify=True))["bytes_of_text"] == len(text.encode())
    dataset, tokenizer = IndexedDataset(tmp_path / "set"), Tokenizer.load(made / "tokenizer")
    encode, encoded = tokenizer.encode, []
    monkeypatch.setattr(tokenizer, "encode", lambda part: encoded.append(len(part)) or encode(part))
    transform = FillInTheMiddle(FimConfig(rate=1.0), CharacterCutter(tokenizer), seed=1)
    for epoch in range(10):
        seen = transform(dataset.document(0), epoch=epoch, file=0).tolist()
        hole, end = seen.index(tokenizer.fim_hole_id), seen.index(tokenizer.fim_end_id)
        assert tokenizer.decode(seen[1:hole] + seen[end + 1 : -1] + seen[hole + 1 : end]) == text
    assert sum(encoded) < 10 * 500
    stream = TokenStream(
        [dataset], tokenizer, StreamConfig(fim=FimConfig(rate=1.0)), global_batch_size=4, dp_rank=0, dp_size=1
    )
    assert (stream.next_batch().tokens == tokenizer.fim_begin_id).sum() == 1


def test_a_raw_nul_byte_in_json_is_named(made, tmp_path):
    (tmp_path / "in.jsonl").write_bytes(b'{"content": "a"}\n{"content": "\0"}\n')
    with pytest.raises(DataError, match=r"in.jsonl:2: malformed JSON: Invalid control character"):
        preprocess(config_of(made, tmp_path / "in.jsonl", output=tmp_path / "set"))


def test_a_text_that_cannot_be_cut_is_named_with_its_file(made, tmp_path):
    write_jsonl(tmp_path / "in.jsonl", [{"content": "=" * ((1 << 24) + 1)}])
    with pytest.raises(DataError, match=r"in.jsonl: 16,777,216 characters without a line break"):
        preprocess(config_of(made, tmp_path / "in.jsonl", output=tmp_path / "set"))


def test_a_disk_that_fills_up_between_parts_loses_none(made, tmp_path):
    """The output outgrows it before the last part; with room again the same command goes on behind those kept."""
    texts = [text * 2 for text in source_texts(30)]  # several times what Python holds back in a buffer
    for index in range(5):
        write_jsonl(tmp_path / f"{index}.jsonl", [{"content": text} for text in texts[index::5]])
    config = config_of(made, *(tmp_path / f"{index}.jsonl" for index in range(5)), output=tmp_path / "set")
    preprocess(dataclasses.replace(config, output=tmp_path / "whole"))
    room = (tmp_path / "whole.bin").stat().st_size * 3 // 4
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        with pytest.raises(DataError, match="File too large; finished files are kept, run the same command to resume"):
            preprocess(config)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(path.name for path in tmp_path.glob("set*")) == ["set.parts"]
    kept = len(list((tmp_path / "set.parts").glob("*.idx")))
    assert 0 < kept < 5
    for index in range(kept):
        about = (tmp_path / f"{index}.jsonl").stat()
        (tmp_path / f"{index}.jsonl").write_bytes(b"?" * about.st_size)  # nobody reads them again
        os.utime(tmp_path / f"{index}.jsonl", ns=(about.st_atime_ns, about.st_mtime_ns))
    assert preprocess(config).documents == 30
    assert sorted(path.name for path in tmp_path.glob("set*")) == ["set.bin", "set.idx", "set.json"]


def test_a_shard_that_vanished_is_named(made, tmp_path, capsys):
    words = [
        "preprocess",
        "--tokenizer",
        made / "tokenizer",
        "--output",
        tmp_path / "set",
        "--input",
        made / "in.jsonl",
    ]
    assert "shard-7.jsonl: no such file or folder" in refusal(capsys, *words, tmp_path / "shard-7.jsonl")
    assert list(tmp_path.iterdir()) == []


def test_ids_of_another_vocabulary_are_reported_not_decoded(made, tmp_path, capsys):
    write_dataset(tmp_path / "set", [[[1, 60_000]]])
    said = refusal(capsys, "data", "inspect", tmp_path / "set", "--tokenizer", made / "tokenizer")
    assert "document 0 has ids from 1 to 60000, the tokenizer 1,033" in said
    assert json.loads(run_command(capsys, "data", "inspect", tmp_path / "set", "--json")[1])["tokens"] == 2
