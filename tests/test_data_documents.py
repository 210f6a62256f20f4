"""Reading documents: the same from every kind of file, grouped by key, each fault one line with its place."""

import gzip
import json
import random
import tracemalloc
from collections import deque

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from data_samples import NASTY_TEXTS, write_jsonl

from megacoder.core.errors import ConfigError, DataError
from megacoder.data import documents, jsonl
from megacoder.data.documents import DocumentReader, find_inputs
from megacoder.data.jsonl import JsonRows
from megacoder.data.tokenizer_training import sample_texts

ROWS = [{"content": text, "sample": sample} for text, sample in zip(NASTY_TEXTS, "aabbbacddd", strict=True)]


def write(path, rows):
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=4)
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress(lines[:100]) + gzip.compress(lines[100:]))  # two members
    elif path.suffix == ".zst":
        compressor = zstandard.ZstdCompressor()
        path.write_bytes(compressor.compress(lines[:100]) + compressor.compress(lines[100:]))  # two frames
    else:
        path.write_bytes(lines)
    return path


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "rows.jsonl.zst", "rows.parquet"])
def test_rows_become_documents(tmp_path, name):
    path = write(tmp_path / name, ROWS)
    reader = DocumentReader(path, text_key="content")
    assert list(reader) == [[text] for text in NASTY_TEXTS]
    assert reader.fraction == 1.0
    grouped = list(DocumentReader(path, text_key="content", document_key="sample"))
    assert [len(document) for document in grouped] == [2, 3, 1, 1, 3]
    assert [text for document in grouped for text in document] == NASTY_TEXTS


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet"])
def test_rows_whose_key_is_null_are_documents_of_their_own(tmp_path, name):
    keys = [None, None, 1, 1, None, 1, 0, 0]
    path = write(tmp_path / name, [{"content": str(row), "sample": key} for row, key in enumerate(keys)])
    found = list(DocumentReader(path, text_key="content", document_key="sample"))
    assert found == [["0"], ["1"], ["2", "3"], ["4"], ["5"], ["6", "7"]]


def test_empty_files_hold_no_documents(tmp_path):
    table = pa.table({"content": pa.array([], pa.string())})
    pq.write_table(table, tmp_path / "rows.parquet")
    (tmp_path / "rows.jsonl").write_text("\n\n")
    (tmp_path / "rows.jsonl.zst").write_bytes(zstandard.compress(b""))
    for path in find_inputs([tmp_path]):
        assert list(DocumentReader(path, text_key="content")) == []


def test_folders_are_searched_in_order(tmp_path):
    (tmp_path / "b").mkdir()
    for name in ("b/2.jsonl", "a.parquet", "b/1.jsonl.zst", "notes.txt"):
        (tmp_path / name).touch()
    names = [str(path.relative_to(tmp_path)) for path in find_inputs([tmp_path / "b" / "2.jsonl", tmp_path])]
    assert names == ["b/2.jsonl", "a.parquet", "b/1.jsonl.zst", "b/2.jsonl"]


def many_keys(count):
    return json.dumps({f"key{index}": 0 for index in range(count)}).encode()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"content": "a"', "rows.jsonl:2: malformed JSON: Expecting"),
        (b'["a"]', "rows.jsonl:2: expected a JSON object, not list"),
        (b'{"contents": "a"}', "rows.jsonl:2: no key 'content' .did you mean 'contents'"),
        (b'{"x": "a"}', "rows.jsonl:2: no key 'content'; there are 'x'"),
        (b"{}", "rows.jsonl:2: no key 'content'; there are none"),
        (many_keys(3000), "no key 'content'; there are 'key0', .*'key19', ...$"),
        (b'{"content": [' + b"7," * 10_000 + b"7]}", r"'content' is \[7, 7, .{,40}, expected text$"),
        (b'\xef\xbb\xbf{"content": "a"}', "rows.jsonl:2: malformed JSON: Unexpected UTF-8 BOM"),
        (b'{"content": "\x00"}', "rows.jsonl:2: malformed JSON: Invalid control character at"),
        (b'{"content": "a", "n": ' + b"9" * 5000 + b"}", "rows.jsonl:2: malformed JSON: Exceeds the limit"),
        (b'{"content": 7}', "rows.jsonl:2: 'content' is 7, expected text"),
        (b'{"content": null}', "rows.jsonl:2: 'content' is None, expected text"),
        (b'{"content": "\xff"}', "rows.jsonl:2: not UTF-8 .byte 0xff at 13"),
        (b'{"content": "\\ud800"}', "rows.jsonl:2: 'content' holds half a surrogate pair"),
        (b"[" * 100_000, "rows.jsonl:2: malformed JSON"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    (tmp_path / "rows.jsonl").write_bytes(b'{"content": "fine"}\n' + line + b"\n")
    with pytest.raises(DataError, match=message):
        list(DocumentReader(tmp_path / "rows.jsonl", text_key="content"))


def test_a_line_that_expands_to_gigabytes_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(jsonl, "MAX_LINE_BYTES", 1000)
    lines = [b'{"content": "fine"}', b'{"content": "' + b"a" * (20 << 20) + b'"}', b'{"content": "fine"}']
    (tmp_path / "rows.jsonl.zst").write_bytes(zstandard.compress(b"\n".join(lines)))
    tracemalloc.start()
    try:
        rows = list(JsonRows(tmp_path / "rows.jsonl.zst"))
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
    fine = {"content": "fine"}
    assert rows == [(1, len(lines[0]) + 1, fine), (2, len(lines[1]) + 1, "over 1000 bytes"), (3, len(lines[2]), fine)]
    with pytest.raises(DataError, match=r"rows.jsonl.zst:2: over 1000 bytes"):
        list(DocumentReader(tmp_path / "rows.jsonl.zst", text_key="content"))


@pytest.mark.parametrize("name", ["rows.parquet", "rows.jsonl.gz", "rows.jsonl.zst"])
def test_truncated_and_foreign_files_are_named(tmp_path, name):
    path = write(tmp_path / name, ROWS)
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], whole[:-1], b"no such format"):
        path.write_bytes(content)
        with pytest.raises(DataError, match=name):
            list(DocumentReader(path, text_key="content"))


def test_bad_columns_are_named(tmp_path):
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"text": ["a"], "id": [1]}), path)
    with pytest.raises(DataError, match=r"rows.parquet: no column 'content' .did you mean 'text'"):
        list(DocumentReader(path, text_key="content"))
    with pytest.raises(DataError, match=r"rows.parquet: no column 'texts' .did you mean 'text'"):
        list(DocumentReader(path, text_key="text", document_key="texts"))
    with pytest.raises(DataError, match="row 0: 'id' is 1, expected text"):
        list(DocumentReader(path, text_key="id"))


def test_parquet_text_that_is_not_utf8_is_named(tmp_path):
    broken = pa.array([b"fine", b"\xff"]).cast(pa.binary()).view(pa.string())
    pq.write_table(pa.table({"content": broken}), tmp_path / "rows.parquet")
    with pytest.raises(DataError, match=r"rows.parquet: a text from row 0 on is not UTF-8"):
        list(DocumentReader(tmp_path / "rows.parquet", text_key="content"))


def test_missing_and_unknown_inputs_are_named(tmp_path):
    (tmp_path / "text.txt").touch()
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="nowhere: no such file or folder"):
        find_inputs([tmp_path / "nowhere"])
    with pytest.raises(DataError, match=r"text.txt: expected a name that ends with .parquet"):
        find_inputs([tmp_path / "text.txt"])
    with pytest.raises(DataError, match=r"empty: no .parquet, .jsonl"):
        find_inputs([tmp_path / "empty"])
    with pytest.raises(ConfigError, match="no input"):
        find_inputs([])


def test_a_sample_stays_within_its_budget_in_any_order(tmp_path):
    texts = [f"text number {index}" * (1 + index % 5) for index in range(300)]
    first = write_jsonl(tmp_path / "1.jsonl", [{"content": text} for text in [*texts, *texts[:50]]])
    second = write_jsonl(tmp_path / "2.jsonl", [{"content": text} for text in texts[:150]])
    third = write_jsonl(tmp_path / "3.jsonl", [{"content": text} for text in reversed(texts[150:])])
    sample = sample_texts([first], text_key="content", max_bytes=4000)
    assert 3900 < sum(map(len, sample)) <= 4000
    assert len(set(sample)) == len(sample)
    assert sample_texts([third, second], text_key="content", max_bytes=4000) == sample
    assert sorted(sample_texts([first], text_key="content", max_bytes=10**6)) == sorted(texts)
    assert sample_texts([first], text_key="content", max_bytes=1) == sample[:1]


def test_a_file_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    write_jsonl(tmp_path / "rows.jsonl", [{"content": "a"}])

    def refuse(path, *args, **options):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("pathlib.Path.open", refuse)
    with pytest.raises(DataError, match=r"rows.jsonl: not readable: Permission denied$"):
        list(DocumentReader(tmp_path / "rows.jsonl", text_key="content"))


def test_long_rows_of_parquet_are_read_few_at_a_time(tmp_path, monkeypatch):
    rows, sizes = [{"content": letter * 300_000} for letter in "abcdefghij"], []
    path = write(tmp_path / "rows.parquet", rows)
    original = pq.ParquetFile.iter_batches

    def recording(self, batch_size, **options):
        sizes.append(batch_size)
        return original(self, batch_size, **options)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", recording)
    monkeypatch.setattr(documents, "_BYTES_AT_ONCE", 1000)
    assert list(DocumentReader(path, text_key="content")) == [[row["content"]] for row in rows]
    assert list(DocumentReader(write(path, ROWS), text_key="content")) == [[text] for text in NASTY_TEXTS]
    assert sizes[0] < sizes[1] <= 256


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_flipped_bits_of_parquet_are_errors_of_one_line_at_worst(tmp_path, compression):
    path, generator, messages = tmp_path / "rows.parquet", random.Random(0), []
    pq.write_table(pa.Table.from_pylist(ROWS), path, row_group_size=4, compression=compression)
    whole = path.read_bytes()
    for _ in range(400):
        damaged = bytearray(whole)
        damaged[generator.randrange(len(damaged))] ^= 1 << generator.randrange(8)
        path.write_bytes(damaged)
        try:
            deque(DocumentReader(path, text_key="content", document_key="sample"), maxlen=0)
        except DataError as error:
            messages.append(str(error))
    assert len(messages) > 100
    assert not any("\n" in message for message in messages)


def test_checksums_of_parquet_pages_are_compared(tmp_path):
    path, texts = tmp_path / "rows.parquet", [f"text {index}" for index in range(40)]
    pq.write_table(pa.table({"content": texts}), path, compression="none", write_page_checksum=True)
    path.write_bytes(path.read_bytes().replace(b"text 21", b"text 12"))
    with pytest.raises(DataError, match=r"rows.parquet: not readable: .*CRC"):
        list(DocumentReader(path, text_key="content"))


@pytest.mark.parametrize(
    "error",
    [pa.ArrowNotImplementedError("not\nimplemented"), UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte")],
)
def test_errors_of_arrow_on_opening_a_file_are_one_line(tmp_path, monkeypatch, error):
    def refuse(*args, **options):
        raise error

    monkeypatch.setattr(pq, "ParquetFile", refuse)
    with pytest.raises(
        DataError, match=r"rows.parquet: (not readable as Parquet: not implemented|a text from row 0 on is not)"
    ):
        list(DocumentReader(tmp_path / "rows.parquet", text_key="content"))
