"""The planted corpus: every file has its expected outcome, for any shards and workers."""

import pytest
from corpus_cases import read_rows
from planted_corpus import plant

from megacoder.corpus import archives
from megacoder.corpus.build import build_corpus
from megacoder.corpus.config import CorpusConfig
from megacoder.corpus.screening import ScreeningConfig


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    root = tmp_path_factory.mktemp("planted")
    return root, plant(root, bomb_bytes=3 << 20)


@pytest.fixture(autouse=True)
def small_archives(monkeypatch):
    monkeypatch.setattr(archives, "_EXPANSION_FLOOR", 1 << 20)


def config(root, out, **options):
    screening = ScreeningConfig(heuristics=False)  # its limits have tests of their own, and are near to some rules'
    options = {"workers": 1, "benchmarks": (root / "tests.jsonl",), "screening": screening} | options
    return CorpusConfig(input=(root / "repos",), out=out, **options)


def test_every_planted_file_ends_as_it_must_and_none_vanishes(planted, tmp_path):
    root, verdicts = planted
    report = build_corpus(config(root, tmp_path / "out"), quiet=True)
    kept = read_rows(tmp_path / "out", "train") + read_rows(tmp_path / "out", "heldout")
    dropped = read_rows(tmp_path / "out", "dropped")
    found = {(row["repo"], row["path"]): None for row in kept}
    found |= {(row["repo"], row["path"]): (row["stage"], row["reason"]) for row in dropped}
    stage, reason = found["bomb", "bomb.tar.gz"]
    assert "expands beyond" in reason
    found["bomb", "bomb.tar.gz"] = (stage, "archive expands too far")
    assert {key: (found.get(key, "gone"), verdicts.get(key, "not planted")) for key in found.keys() | verdicts.keys()
            if found.get(key, "gone") != verdicts.get(key, "not planted")} == {}  # fmt: skip
    assert len(kept) + len(dropped) == len(found), "a file is in two places"
    accounts = report.accounts
    counts = [count for reasons in accounts.dropped.values() for count in reasons.values()]
    assert accounts.seen.files == len(verdicts) == accounts.kept.files + sum(count.files for count in counts)
    assert accounts.seen.bytes == accounts.kept.bytes + sum(count.bytes for count in counts)
    on_disk = sum(path.lstat().st_size for path in (root / "repos").rglob("*")
                  if path.is_file() and not path.is_symlink() and not path.name.endswith(".tar.gz"))  # fmt: skip
    in_archives = sum(row["size"] for row in dropped if row["repo"] in ("bomb", "outside"))
    in_archives += accounts.repositories["outside"].kept.bytes
    assert accounts.seen.bytes == on_disk + in_archives
    cycle = [row for row in kept if row["repo"] == "cycle"]
    assert len({row["sample"] for row in cycle}) == 1
    assert not list(root.parent.rglob("out.py"))


def test_shards_change_neither_documents_nor_counts(planted, tmp_path):
    root, _ = planted
    found = []
    for shard_bytes in (16 << 20, 3000):
        out = tmp_path / str(shard_bytes)
        report = build_corpus(config(root, out, shard_bytes=shard_bytes), quiet=True)
        found.append((report.accounts, *(read_rows(out, part) for part in ("train", "heldout", "dropped"))))
    assert len(list((tmp_path / "3000/train").iterdir())) > 3
    assert found[0] == found[1]
