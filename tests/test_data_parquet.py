"""A relative name with a colon is a file name, not a URL, wherever Parquet is read or written."""

import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from command_line import run_command
from data_samples import small_tokenizer

import megacoder
from megacoder.data.conversations import ConversationConfig, prepare_conversations
from megacoder.data.documents import DocumentReader
from megacoder.data.indexed import IndexedDataset
from megacoder.evaluate.held_out import read_source_files

HERE = Path("my:data")
"""Relative: pyarrow takes `my` for a kind of file system that it does not know."""


@pytest.fixture(autouse=True)
def _inside(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    HERE.mkdir()


def leave(name, **columns):
    with open(HERE / name, "wb") as file:
        pq.write_table(pa.table(columns), file)
    return HERE / name


def test_a_corpus_is_built_reported_and_read_back(capsys):
    texts = [f"def f_{index}():\n    return 'file number {index}'\n" for index in range(9)]
    texts += [texts[4], "def is_tested():\n    return 'a solution that a benchmark holds word for word, ten of them'\n"]
    table = leave(
        "table.parquet", text=texts, repo=[f"repo{row % 3}" for row in range(11)],
        path=[f"m{row}.py" for row in range(11)],
    )  # fmt: skip
    tests = leave("tests.parquet", task_id=["one"], solution=[texts[-1]])
    options = ["--input", table, "--out", HERE / "corpus", "--benchmarks", tests, "--near-dedup", "file"]
    code, _, err = run_command(capsys, "corpus", "build", *options, "--workers", 1)
    assert code == 0, err
    code, out, err = run_command(capsys, "corpus", "report", HERE / "corpus", "--json")
    assert code == 0, err
    assert '"test": "tests.parquet one"' in out
    parts = [HERE / "corpus" / part for part in ("train", "heldout")]
    kept = {file.content.partition("\n")[2] for file in read_source_files(parts)}
    assert kept
    assert kept <= set(texts[:-1])


def test_documents_and_conversations_are_read():
    documents = leave("documents.parquet", content=["one", "two"])
    assert list(DocumentReader(documents, text_key="content")) == [["one"], ["two"]]
    asked = leave("asked.parquet", instruction=["Add."], output=["a + b"])
    prepare_conversations([asked], HERE / "made", small_tokenizer(), ConversationConfig(train=(asked,)), seq_length=64)
    assert IndexedDataset(HERE / "made").num_documents == 1


def test_no_other_module_names_a_file_to_pyarrow():
    named = re.compile(r"pq\.(ParquetFile|read_table)\(|ds\.dataset\(")
    sources = Path(megacoder.__file__).parent.rglob("*.py")
    assert [path.name for path in sorted(sources) if named.search(path.read_text())] == ["parquet.py"]
