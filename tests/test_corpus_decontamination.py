"""Decontamination: the decisions of a plain loop over sets of word tuples, and hits that say what was found where."""

import gzip
import json
import random
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from megacoder.core.errors import ConfigError, FormatError
from megacoder.core.native import native
from megacoder.corpus import minhash
from megacoder.corpus.benchmarks import TestString, fingerprint, read_tests
from megacoder.corpus.build import build_corpus
from megacoder.corpus.config import CorpusConfig
from megacoder.corpus.decontamination import BenchmarkIndex, Decontamination, DecontaminationConfig
from megacoder.corpus.documents import Document, Dropped
from megacoder.corpus.split import SplitConfig

TEN = "alpha beta gamma delta epsilon zeta eta theta iota kappa"


def index(*texts, **options):
    strings = [TestString(test=f"t{place}", text=text) for place, text in enumerate(texts)]
    return BenchmarkIndex(strings, DecontaminationConfig(**options))


def plain_decision(text, tests, ngram=10, min_ngram=3):
    """The rule as one would first write it; `exceptions` aside."""

    def normal(string):
        return " ".join(re.sub("[A-Z]", lambda m: m[0].lower(), string).split())

    def holds(text, literal):
        """At borders of words, if it begins or ends with one."""
        inner = re.escape(literal)
        inner = rf"(?<![a-z0-9_\x80-\U0010ffff]){inner}" if words(literal[0]) else inner
        return re.search(rf"{inner}(?![a-z0-9_\x80-\U0010ffff])" if words(literal[-1]) else inner, text)

    def words(string):
        return re.findall(r"[a-z0-9_\x80-\U0010ffff]+", re.sub("[A-Z]", lambda m: m[0].lower(), string))

    grams, found = {}, words(text)
    for test in tests:
        test_words = words(test)
        length = min(ngram, len(test_words))
        if length >= min_ngram:
            grams.setdefault(length, set()).update(zip(*(test_words[i:] for i in range(length)), strict=False))
    shared = {
        gram
        for length, wanted in grams.items()
        for gram in zip(*(found[i:] for i in range(length)), strict=False)
        if gram in wanted
    }
    literal = any(tuple(words(test)) in shared and holds(normal(text), normal(test)) for test in tests)
    return literal or any(len(gram) == ngram for gram in shared)


def test_the_boundary_of_the_ten_gram_rule():
    tests = index(f"{TEN} lambda mu")
    assert [hit.gram for hit in tests.hits(f"x {TEN.upper()} y".encode())] == [TEN]
    assert [hit.gram for hit in tests.hits(b"x(" + TEN.replace(" ", " /*+*/\n").encode())] == [TEN]
    assert tests.hits(TEN.rpartition(" ")[0].encode()) == []
    assert tests.hits(TEN.replace("zeta", "zetas").encode()) == []
    assert len(tests.hits(b"y beta gamma delta epsilon zeta eta theta iota kappa lambda z")) == 1


@pytest.mark.parametrize("length", range(1, 10))
def test_short_strings_count_as_a_whole_from_three_words_on(length):
    short = " ".join(TEN.split()[:length])
    hits = index(short).hits(f"before {short} after".encode())
    assert bool(hits) == (length >= 3)
    assert all(hit.whole for hit in hits)
    if length > 3:
        assert index(short).hits(short.rpartition(" ")[0].encode()) == []


def test_every_test_is_listed_once_in_the_order_of_the_text():
    found = index("one two three", f"{TEN} more", "never in the text").hits(f"{TEN} {TEN} one two three".encode())
    assert [(hit.test, hit.whole) for hit in found] == [("t1", False), ("t0", True)]


def test_a_short_string_must_occur_literally():
    found = index("return x - y", "Return  x*y", "return x +y", "return x - y")
    assert [hit.test for hit in found.hits(b"a\n\treturn\n x -  y;\n")] == ["t0"]
    assert [hit.test for hit in found.hits(b"return x*y, RETURN x +Y")] == ["t1", "t2"]
    assert found.hits(b"return x == y; return (x - y); return x-y; returns x - y; return x - yy") == []


def test_what_is_too_common_is_an_exception_by_default():
    solutions = ["    return x + y\n", "    return len(string)\n", "  return n**2", "    return ''.join(strings)\n"]
    code = "\n".join(solutions).encode()
    assert index(*solutions).hits(code) == []
    assert len(index(*solutions, exceptions=()).hits(code)) == 4
    assert index("return x + y", exceptions=("return  X + y",)).hits(code) == []
    assert index(f"return x + y {TEN}").hits(f"return x + y {TEN}".encode())


def test_tables_of_digits_can_be_spared():
    digits = "0 1 0 1 0 1 0 1 0 1"
    assert index(digits).hits(f"x = [{digits.replace(' ', ', ')}]".encode())
    assert not index(digits, min_distinct_words=3).hits(f"x = [{digits}]".encode())
    assert index(digits, TEN, min_distinct_words=3).hits(TEN.encode())


@pytest.mark.parametrize("kernel", [True, False])
def test_decisions_equal_a_plain_loop_over_tuples(kernel, monkeypatch):
    if not kernel:
        monkeypatch.setattr(minhash, "_kernels", lambda: None)
    generator = random.Random(3)
    vocabulary = ["a", "B", "cc", "été", "x_1", "7", "longer_than_eight", "Ω"]

    def text(most):
        words = generator.choices(vocabulary, k=generator.randrange(most))
        return "".join(word + generator.choice([" ", "\n", "(", "+-"]) for word in words)

    decided = []
    for _ in range(150):
        tests = [text(14) for _ in range(3)]
        candidate = text(60) + (generator.choice(tests) if generator.random() < 0.3 else "")
        expected = plain_decision(candidate, tests)
        assert bool(index(*tests).hits(candidate.encode())) == expected
        decided.append(expected)
    assert 20 < sum(decided) < 130


def test_an_index_of_nothing_finds_nothing():
    assert index().hits(b"some words that are here") == []
    assert index("a b").hits(b"a b a b a b") == []
    assert index(TEN).hits(b"") == []


def write_benchmark(folder, name):
    rows = [
        {"task_id": "X/0", "prompt": f"{TEN} omega", "tests": ["assert f of x", {"a": "deep down in here"}], "n": 3}
    ]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    path = folder / name
    if name.endswith(".parquet"):
        pq.write_table(
            pa.Table.from_pylist([{"task_id": "X/0", "prompt": f"{TEN} omega", "tests": ["assert f of x"]}]), path
        )
    elif name.endswith(".gz"):
        path.write_bytes(gzip.compress(lines.encode()))
    elif name.endswith(".zst"):
        path.write_bytes(zstandard.ZstdCompressor().compress(lines.encode()))
    elif name.endswith(".json"):
        path.write_text(json.dumps(rows))
    else:
        path.write_text(lines + "\n")
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.json", "a.parquet"])
def test_benchmarks_are_read_from_any_format(tmp_path, name):
    strings = read_tests([write_benchmark(tmp_path, name)], ())
    assert {string.test for string in strings} == {f"{name} X/0"}
    texts = [string.text for string in strings]
    assert texts[:2] == [f"{TEN} omega", "assert f of x"]
    assert len(texts) == (2 if name.endswith("parquet") else 3)
    assert [s.text for s in read_tests([tmp_path / name], ["tests"])] == texts[1:]


@pytest.mark.parametrize(
    ("name", "content", "error", "message"),
    [
        ("a.jsonl", b"{not json\n", FormatError, "neither JSONL"),
        ("a.jsonl", b"{}\n[1]\n", FormatError, "line 2: expected a JSON object, not list"),
        ("a.jsonl.gz", gzip.compress(b'{"a": "b"}\n' * 9, mtime=0)[:-9], FormatError, "not readable"),
        ("a.json", b"[1]\n", FormatError, "test 0 is"),
        ("a.parquet", b"PAR0", FormatError, "neither JSONL"),
        ("a.jsonl", b'{"n": 1}\n', ConfigError, "no test has text"),
        ("a.jsonl", b"", ConfigError, "no test has text"),
        ("a.json", b'{"id": 7, "t": "\\ud800"}', FormatError, "test 7: 't' holds half a surrogate pair"),
        ("a.jsonl", None, ConfigError, "No such file"),
    ],
)
def test_bad_benchmarks_are_named(tmp_path, name, content, error, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(error, match=message) as raised:
        read_tests([tmp_path / name], ())
    assert name in str(raised.value)
    if content is None:
        with pytest.raises(ConfigError, match="No such file"):
            fingerprint(tmp_path / name)


@pytest.mark.parametrize("content", ["{not json\n", ""])
def test_a_bad_benchmark_is_reported_before_anything_is_read_or_written(tmp_path, monkeypatch, content):
    good, bad = write_benchmark(tmp_path, "a.jsonl"), tmp_path / "bad.jsonl"
    bad.write_text(content)
    monkeypatch.setattr("megacoder.corpus.build.find_inputs", None)  # calling it would be a TypeError
    config = CorpusConfig(input=(tmp_path / "repos",), out=tmp_path / "out", benchmarks=(good, bad))
    with pytest.raises((ConfigError, FormatError), match=r"bad\.jsonl"):
        build_corpus(config, quiet=True)
    assert not (tmp_path / "out").exists()


def test_the_stage_names_the_test_and_the_words(tmp_path):
    benchmarks = (write_benchmark(tmp_path, "a.jsonl"),)

    def run(text, **options):
        stage = Decontamination(benchmarks=benchmarks, config=DecontaminationConfig(**options))
        return stage(Document(repo="r", path="p.py", language="Python", text=text, size=len(text)))

    dropped = run(f"# {TEN}\n# assert f of x\n")
    assert isinstance(dropped, Dropped)
    assert (dropped.stage, dropped.reason) == ("decontamination", "10 words of a benchmark")
    assert dropped.detail == f"a.jsonl X/0: {TEN}"
    assert run("assert  F\n of x\n").reason == "a benchmark's string"
    assert not isinstance(run("assert f(of, x)\n"), Dropped)
    assert not isinstance(run("nothing of the kind\n"), Dropped)
    assert not isinstance(run("assert f of x\n", fields=("prompt",)), Dropped)
    assert isinstance(run(TEN, fields=("prompt",)), Dropped)


def test_a_build_drops_contaminated_files_and_broken_ones(tmp_path):
    benchmark = write_benchmark(tmp_path, "tests.jsonl")
    repo = tmp_path / "repos" / "r"
    repo.mkdir(parents=True)
    (repo / "clean.py").write_text("def clean():\n    return 'no test is in here'\n")
    (repo / "leaked.py").write_text(f"QUESTION = '''{TEN}'''\n")
    (repo / "broken.py").write_text("def broken(:\n    return 'this is no Python'\n")
    settings = {
        "input": (tmp_path / "repos",),
        "out": tmp_path / "out",
        "workers": 1,
        "heldout": SplitConfig(fraction=0),
    }
    report = build_corpus(CorpusConfig(benchmarks=(benchmark,), **settings), quiet=True)
    assert report.accounts.kept.files == 1
    rows = {row["path"]: row for row in pq.read_table(tmp_path / "out/dropped").to_pylist()}
    assert (rows["leaked.py"]["stage"], rows["leaked.py"]["detail"]) == ("decontamination", f"tests.jsonl X/0: {TEN}")
    assert (rows["broken.py"]["stage"], rows["broken.py"]["reason"]) == ("screening", "syntax error")
    benchmark.write_text(json.dumps({"task_id": "X/0", "prompt": "another text of a test"}) + "\n")
    with pytest.raises(ConfigError, match="benchmarks"):
        build_corpus(CorpusConfig(benchmarks=(benchmark,), **settings), quiet=True)


@pytest.mark.skipif(not hasattr(native(), "find_grams"), reason="the kernels are not built")
@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.lists(st.sampled_from(["a", "B", "c1", "\u00e9", "_"]), max_size=14), max_size=6),
    st.lists(st.sampled_from(["a", "B", "c1", "\u00e9", "_"]), max_size=400),
)
def test_the_kernel_finds_the_same_as_numpy(tests, words):
    found, text = index(*map(" ".join, tests)), "-".join(words).encode()
    assert sorted(found.runs(text)) == sorted(found.reference_runs(text))


def test_without_the_kernel_numpy_answers(monkeypatch):
    monkeypatch.setattr("megacoder.corpus.decontamination.native", lambda: None)
    assert [hit.gram for hit in index(TEN).hits(f"x {TEN} y".encode())] == [TEN]
