"""Tables as input: repositories gathered from rows anywhere in them, for any split."""

import gzip
import json
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from command_line import refusal
from corpus_cases import read_rows, write

from megacoder.cli.main import main
from megacoder.core.errors import ConfigError, CorpusError
from megacoder.corpus import tables
from megacoder.corpus.accounts import load_report
from megacoder.corpus.build import build_corpus
from megacoder.corpus.config import CorpusConfig
from megacoder.corpus.inputs import find_inputs
from megacoder.corpus.split import SplitConfig
from megacoder.corpus.tables import TableColumns


def files():
    """200 files of 20 repositories; in every second one a file imports another."""
    made = []
    for index in range(200):
        repo, number = f"repo{index % 20:02d}", index // 20
        before = f"import m{number - 1}\n" if number and index % 2 else ""
        made.append((repo, f"m{number}.py", f"{before}def f_{index}():\n    return 'file number {index}'\n"))
    return made


def stack(path, rows):
    """Rows as The Stack has them."""
    columns = {
        "hexsha": [str(index) for index in range(len(rows))],
        "max_stars_repo_name": [repo for repo, _, _ in rows],
        "max_stars_repo_path": [name for _, name, _ in rows],
        "max_stars_repo_licenses": [["MIT"] for _ in rows],
        "content": [text for _, _, text in rows],
        "lang": ["Python"] * len(rows),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)


def jsonl(path, rows):
    lines = "".join(json.dumps({"repo_name": r, "path": p, "code": t, "license": "MIT"}) + "\n" for r, p, t in rows)
    data = lines.encode()
    if path.suffix == ".zst":
        data = zstandard.ZstdCompressor().compress(data)
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


def build(inputs, out, **options):
    options = {"workers": 1, "shard_bytes": 2000, "heldout": SplitConfig(fraction=0.1)} | options
    return build_corpus(CorpusConfig(input=tuple(inputs), out=out, **options), quiet=True)


@pytest.fixture
def small_runs(monkeypatch):
    monkeypatch.setattr(tables, "_RUN_BYTES", 8000)
    monkeypatch.setattr(tables, "_GROUP_BYTES", 1000)


def test_the_corpus_does_not_depend_on_how_the_rows_are_spread(tmp_path, small_runs):
    everything = files()
    for repo, name, text in everything:
        write(tmp_path / "folders" / repo / name, text)
        write(tmp_path / "folders" / repo / "LICENSE", "SPDX-License-Identifier: MIT")
    build([tmp_path / "folders"], tmp_path / "expected")
    stack(tmp_path / "whole/data/python/a.parquet", everything)
    mixed = random.Random(0).sample(everything, len(everything))
    (tmp_path / "split").mkdir()
    jsonl(tmp_path / "split/a.jsonl", mixed[:60])
    jsonl(tmp_path / "split/b.jsonl.zst", mixed[60:100])
    jsonl(tmp_path / "split/c.jsonl.gz", mixed[100:130])
    stack(tmp_path / "split/d.parquet", mixed[130:])
    for name, shard_bytes in (("whole", 2000), ("split", 2000), ("split", 10_000)):
        out = tmp_path / f"{name}{shard_bytes}"
        report = build([tmp_path / name], out, shard_bytes=shard_bytes)
        assert (report.accounts.seen.files, report.accounts.kept.files) == (200, 200)
        for part in ("train", "heldout"):
            ours = read_rows(out, part)
            assert ours == read_rows(tmp_path / "expected", part)
        assert {row["license"] for row in ours} == {"MIT"}
        assert any(row["path"] == "m1.py" and row["sample"] == before["sample"]
                   for before, row in zip(read_rows(out), read_rows(out)[1:], strict=False))  # fmt: skip


def test_a_dropped_row_does_not_take_its_path(tmp_path):
    texts = ["y" * 2000, "def f():\n    return 'good'\n", "x = 'third'\n"]
    jsonl(tmp_path / "x.jsonl", [("r", "a.py", text) for text in texts])
    report = build([tmp_path / "x.jsonl"], tmp_path / "out", max_file_bytes=1000)
    assert report.accounts.dropped["read"].keys() == {"over 1000 bytes", "path taken by an earlier file"}
    assert [row["content"].endswith("'good'\n") for row in read_rows(tmp_path / "out")] == [True]


def test_every_bad_row_is_in_the_accounts(tmp_path):
    good = {"repo_name": "r", "path": "a.py", "content": "def f():\n    return 'good'\n"}
    lines = [
        json.dumps(good),
        "not json",
        "[1, 2]",
        json.dumps(good | {"path": ""}),
        json.dumps(good | {"content": 5}),
        json.dumps({"path": "x.py", "content": "x = 1\n"}),
        json.dumps(good | {"content": "\ud800"}),
        json.dumps(good | {"content": "def again():\n    return 'the same path'\n"}),
        json.dumps(good | {"path": "b.py", "content": "a\0b"}),
        json.dumps(good | {"path": "c.txt"}),
        json.dumps(good | {"path": "d.py", "content": "x = 'd'\n" * 200}),
        "",
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    report = build([tmp_path / "rows.jsonl"], tmp_path / "out", max_file_bytes=1000)
    assert report.accounts.seen.files == 11
    assert {reason: count.files for reason, count in report.accounts.dropped["read"].items()} == {
        "row malformed": 2, "row without path": 1, "row without text": 1, "row without repo": 1,
        "half a surrogate pair, which is no Unicode": 1, "path taken by an earlier file": 1, "binary": 1,
        "language unknown": 1, "over 1000 bytes": 1,
    }  # fmt: skip
    assert [row["path"] for row in read_rows(tmp_path / "out")] == ["a.py"]


def test_columns_can_be_named_and_must_be_there(tmp_path):
    pq.write_table(pa.table({"r": ["r"], "p": ["a.py"], "c": ["def f():\n    return 1\n"]}), tmp_path / "t.parquet")
    with pytest.raises(ConfigError, match=r"'r', 'p', 'c' is known to hold the text; name it with --columns\.text"):
        build([tmp_path / "t.parquet"], tmp_path / "out1")
    with pytest.raises(ConfigError, match=r"no column 'q'"):
        build([tmp_path / "t.parquet"], tmp_path / "out2", columns=TableColumns(text="q", repo="r", path="p"))
    report = build([tmp_path / "t.parquet"], tmp_path / "out3", columns=TableColumns(text="c", repo="r", path="p"))
    assert report.accounts.kept.files == 1


def test_licenses_and_paths_come_in_the_forms_that_tables_have(tmp_path):
    licenses = {"all": ["MIT", "GPL-3.0-only", "MIT"], "empty": [], "null": None}
    rows = {
        "repo": list(licenses), "path": ["/pkg/a.py"] * 3, "licenses": list(licenses.values()),
        "content": [f"def {name}():\n    return 'of {name}'\n" for name in licenses],
    }  # fmt: skip
    pq.write_table(pa.table(rows), tmp_path / "t.parquet")
    build([tmp_path / "t.parquet"], tmp_path / "out", heldout=SplitConfig(fraction=0))
    found = {row["repo"]: (row["path"], row["license"]) for row in read_rows(tmp_path / "out")}
    assert found == {
        "all": ("pkg/a.py", "GPL-3.0-only AND MIT"), "empty": ("pkg/a.py", "none"), "null": ("pkg/a.py", None)
    }  # fmt: skip


def test_the_first_of_the_usual_columns_is_read():
    names = ["text", "path", "content", "repo", "max_stars_repo_name", "max_stars_repo_path", "license"]
    assert TableColumns().chosen(names, "t") == {
        "text": "content", "repo": "max_stars_repo_name", "path": "max_stars_repo_path", "license": "license"
    }  # fmt: skip


def test_a_table_that_changed_since_an_interrupted_build_is_gathered_again(tmp_path, monkeypatch):
    jsonl(tmp_path / "x.jsonl", files()[:20])
    with monkeypatch.context() as patch:
        patch.setattr("megacoder.corpus.build.plan_scans", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            build([tmp_path / "x.jsonl"], tmp_path / "out")
    jsonl(tmp_path / "x.jsonl", files()[20:40])
    build([tmp_path / "x.jsonl"], tmp_path / "out", heldout=SplitConfig(fraction=0.1))
    assert {row["path"] for row in read_rows(tmp_path / "out")} == {"m1.py"}


def test_a_file_that_is_not_a_table_is_named(tmp_path):
    (tmp_path / "t.parquet").write_bytes(b"not a table")
    with pytest.raises(CorpusError, match=r"t\.parquet: not readable"):
        build([tmp_path / "t.parquet"], tmp_path / "out")
    (tmp_path / "u.jsonl.zst").write_bytes(b"not compressed")
    with pytest.raises(CorpusError, match=r"u\.jsonl\.zst: not readable"):
        build([tmp_path / "u.jsonl.zst"], tmp_path / "out2")


def test_a_repository_with_some_tables_stays_a_repository(tmp_path):
    write(tmp_path / "in/repo/pkg/a.py")
    write(tmp_path / "in/repo/data.jsonl", "{}\n")
    write(tmp_path / "in/rows/README.md", "a data set")
    (tmp_path / "in/rows/python").mkdir()
    jsonl(tmp_path / "in/rows/python/x.jsonl", files()[:1])
    found = find_inputs([tmp_path / "in"])
    assert [source.name for source in found.sources] == ["repo"]
    assert found.tables == (tmp_path / "in/rows/python/x.jsonl",)


def test_repositories_of_a_table_and_of_a_folder_are_in_one_order(tmp_path):
    write(tmp_path / "in/owner/a.py", "def alone():\n    pass\n")
    write(tmp_path / "in/p/a.py", "def also_alone():\n    pass\n")
    jsonl(tmp_path / "in/x.jsonl", files())
    build([tmp_path / "in"], tmp_path / "out", heldout=SplitConfig(fraction=0), shard_bytes=100_000)
    repos = [row["repo"] for row in read_rows(tmp_path / "out")]
    assert repos == sorted(repos)
    assert {"owner", "repo00", "repo19", "p"} <= set(repos)
    (tmp_path / "in/owner").rename(tmp_path / "in/repo")
    (tmp_path / "in/x.jsonl").write_text(json.dumps({"repo": "repo", "path": "a.py", "text": "x"}))
    with pytest.raises(ConfigError, match="two repositories are called 'repo'"):
        build([tmp_path / "in"], tmp_path / "out2")


def test_a_build_can_be_described_in_toml(tmp_path, capsys):
    jsonl(tmp_path / "x.jsonl", files())
    (tmp_path / "corpus.toml").write_text(
        f'input = ["{tmp_path / "x.jsonl"}"]\nworkers = 1\nlanguages = ["Python"]\n\n[samples]\norder = "path"\n'
    )
    main(["corpus", "build", "--config", str(tmp_path / "corpus.toml"), "--out", str(tmp_path / "out")])
    assert "Python" in capsys.readouterr().out
    config = load_report(tmp_path / "out").config
    assert (config["languages"], config["samples"]["order"]) == (["Python"], "path")
    for words, says in ((["--config", str(tmp_path / "corpus.toml")], "give --out"), (["--config"], "give the TOML")):
        assert says in refusal(capsys, "corpus", "build", *words, code=2)
