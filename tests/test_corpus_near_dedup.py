"""Near-dedup against exact similarity: planted copies are removed and nothing else, for any shards and engine."""

import itertools
import random
from collections import defaultdict

import numpy as np
import pyarrow.parquet as pq
import pytest
from corpus_cases import write

from megacoder.corpus import lsh, near_dedup
from megacoder.corpus.build import build_corpus
from megacoder.corpus.config import CorpusConfig
from megacoder.corpus.lsh import EDGE, SignatureFiles, band_runs, candidate_pairs, near_pairs
from megacoder.corpus.minhash import shingle_hashes, word_hashes
from megacoder.corpus.near_config import NearDedupConfig
from megacoder.corpus.near_dedup import choose_copies
from megacoder.corpus.runs import key_ranges, read_range, write_runs
from megacoder.corpus.split import SplitConfig

LEVELS = (0.2, 0.35, 0.45, 0.49, 0.8, 0.85, 0.9, 0.95)


def source(generator, lines):
    words = ["".join(generator.choices("abcdefghijklmnop", k=6)) for _ in range(5 * lines)]
    return [f"call{i}({', '.join(words[5 * i : 5 * i + 5])})" for i in range(lines)]


def jaccard(left, right):
    """Exact, of the sets of 5-grams."""
    return len(left & right) / len(left | right)


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """For each level three repositories and an edited copy of each, files shuffled; one with one near file."""
    root, generator = tmp_path_factory.mktemp("planted"), random.Random(0)
    for level, index in itertools.product(LEVELS, range(3)):
        files = [source(generator, 40) for _ in range(5)]
        changed = round(40 * (1 - level) / (1 + level))  # lines of 40 at each file's top, to come to that similarity
        edited = [source(generator, changed) + lines[changed:] for lines in files]
        for name, version in (("a", files), ("b", edited)):
            for place, lines in enumerate(version):
                path = root / f"{level:.2f}-{index}-{name}" / f"src{place * (7 if name == 'b' else 1) % 5}.py"
                path.parent.mkdir(exist_ok=True)
                path.write_text("\n".join(lines) + "\n")
    (root / "mixed").mkdir()
    copied = (root / f"{LEVELS[0]:.2f}-0-a" / "src0.py").read_text().splitlines()[:-1]
    for place, lines in enumerate([copied, *(source(generator, 40) for _ in range(4))]):
        (root / "mixed" / f"src{place}.py").write_text("\n".join(lines) + "\n")
    return root


def build(root, out, **options):
    config = CorpusConfig(input=(root,), out=out, workers=1, heldout=SplitConfig(fraction=0), **options)
    return build_corpus(config, quiet=True)


def shingles_by_unit(root, level):
    found = defaultdict(set)
    for path in root.rglob("*.py"):
        name = path.relative_to(root).as_posix()
        found[name.split("/")[0] if level == "repository" else name] |= set(
            shingle_hashes(word_hashes(path.read_bytes()), 5).tolist()
        )
    return found


def removed(out, level):
    rows = pq.read_table(out / "dropped").to_pylist()
    return {
        row["repo"] if level == "repository" else f"{row['repo']}/{row['path']}": row["detail"].rpartition(" (")[0]
        for row in rows
        if row["stage"] == "near-dedup"
    }


@pytest.mark.parametrize("level", ["repository", "file"])
def test_planted_copies_are_removed_and_nothing_below_one_half(planted, tmp_path, level):
    report = build(planted, tmp_path / "out", near_dedup=NearDedupConfig(level=level), shard_bytes=100_000)
    copies, sets = removed(tmp_path / "out", level), shingles_by_unit(planted, level)
    for copy, original in copies.items():
        assert jaccard(sets[copy], sets[original]) >= 0.5
        assert original not in copies
    pairs = [(a, b) for a, b in itertools.combinations(sorted(sets), 2) if jaccard(sets[a], sets[b]) >= 0.77]
    assert len(pairs) == (12 if level == "repository" else 12 * 5 + 1)
    assert [pair for pair in pairs if not set(pair) & set(copies)] == []
    if level == "repository":
        assert sorted(copies) == [f"{at:.2f}-{i}-b" for at in LEVELS if at > 0.7 for i in range(3)]
    assert (
        report.accounts.kept.files + report.accounts.dropped["near-dedup"][f"near copy of another {level}"].files == 245
    )


def test_the_result_depends_neither_on_shards_nor_on_workers_nor_on_ranges(planted, tmp_path, monkeypatch):
    options = {"near_dedup": NearDedupConfig(level="both")}
    build(planted, tmp_path / "one", shard_bytes=1 << 30, **options)
    monkeypatch.setattr(near_dedup, "_RECORDS_AT_ONCE", 100)
    monkeypatch.setattr(near_dedup, "_FILES_AT_ONCE", 3)
    build(planted, tmp_path / "many", shard_bytes=60_000, **options)
    one, many = (pq.read_table(tmp_path / name / "dropped").to_pylist() for name in ("one", "many"))
    assert one == many
    assert {row["reason"] for row in one} == {"near copy of another repository", "near copy of another file"}


def test_a_repository_of_exact_copies_is_dropped_as_a_whole(tmp_path):
    generator = random.Random(1)
    for place in range(6):
        text = "\n".join(source(generator, 30)) + "\n"
        for name in ("fork", "zfork", "original"):
            path = tmp_path / "repos" / name / f"file{place}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text if (name, place) != ("zfork", 3) else text.replace("call7", "call8"))
    build(tmp_path / "repos", tmp_path / "out")
    assert removed(tmp_path / "out", "repository") == {"original": "fork", "zfork": "fork"}


@pytest.mark.parametrize("interrupted", ["_search", "_take"])
def test_files_are_compared_again_where_another_shard_changes_which_are_left(tmp_path, monkeypatch, interrupted):
    """An interrupted build signed all of m's files, or knew its copies; then a gets new ones, one of them m's first."""
    generator = random.Random(2)
    first, second, other, another = (source(generator, 30) for _ in range(4))
    for name, lines in (("a/x", other), ("m/0", first), ("m/1", second), ("m/2", [*second, "call(again)"])):
        write(tmp_path / f"repos/{name}.py", "\n".join(lines) + "\n")
    options = {"near_dedup": NearDedupConfig(level="file"), "shard_bytes": 1}
    with monkeypatch.context() as patch:
        patch.setattr(near_dedup, interrupted, lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            build(tmp_path / "repos", tmp_path / "out", **options)
    for name, lines in (("copy", first), ("new", another)):
        write(tmp_path / f"repos/a/{name}.py", "\n".join(lines) + "\n")
    build(tmp_path / "repos", tmp_path / "out", **options)
    assert removed(tmp_path / "out", "file") == {"m/2.py": "m/1.py"}


def test_chains_remove_only_files_near_to_a_kept_one():
    def edges(*pairs):
        return np.array([(later, earlier, 0.8) for earlier, later in pairs], EDGE)

    def chosen(parts, num_units):
        return [(later, earlier) for part in choose_copies(parts, num_units) for later, earlier, _ in part.tolist()]

    assert chosen([edges((0, 1), (1, 2), (2, 3))], 4) == [(1, 0), (3, 2)]
    assert chosen([edges((0, 1)), edges((1, 2), (2, 3))], 4) == [(1, 0), (3, 2)]
    assert chosen([edges((0, 2), (1, 2))], 3) == [(2, 0)]
    assert chosen([], 3) == []


def test_a_crowded_band_is_searched_again_without_its_copies(tmp_path):
    """500 units of 20 families share one band: within the window are strangers, so that one pass cannot see all."""
    generator = np.random.default_rng(0)
    families = generator.integers(1 << 32, size=(20, 64), dtype=np.uint32)
    signed = families[np.arange(500) % 20 * 7 % 20]
    signed[:, :2] = 7
    signed.tofile(tmp_path / "s.u32")
    files = SignatureFiles(paths=(tmp_path / "s.u32",), counts=(500,), num_hashes=64)
    write_runs(tmp_path / "s.bands", list(band_runs(signed, np.arange(500), bands=1, rows=2)))
    gone, rounds = np.zeros(0, np.int64), 0
    while True:
        pairs, truncated = candidate_pairs(
            [tmp_path / "s.bands"], files.starts, (0, 2**64 - 1), band=0, bands=1, gone=gone
        )
        (found,) = choose_copies([np.unique(near_pairs(pairs, files, similarity=0.7))], 500)
        gone, rounds = np.array(sorted({*gone.tolist(), *found["later"].tolist()})), rounds + 1
        if not (truncated and len(found)):
            break
    assert sorted(set(range(500)) - set(gone.tolist())) == list(range(20))
    assert 2 <= rounds <= 6  # every round halves at least what is too much


def test_files_of_fewer_words_than_asked_have_no_near_copies(tmp_path):
    for name, text in (("few", "alpha(beta, gamma)\n"), ("enough", "alpha(beta, gamma, delta)\n")):
        for copy in range(2):
            write(tmp_path / f"repos/r/{name}{copy}.py", text)
    options = {"near_dedup": NearDedupConfig(level="file", min_words=4), "exact_dedup": "none"}
    build(tmp_path / "repos", tmp_path / "out", **options)
    assert removed(tmp_path / "out", "file") == {"r/enough1.py": "r/enough0.py"}


def test_a_build_searches_again_without_the_copies_found_so_far(tmp_path, monkeypatch):
    """Two families share the only band, and each file stands between two of the other family."""
    generator = random.Random(3)
    even = source(generator, 40)
    odd = [*even[:-2], *source(generator, 2)]
    for number in range(6):
        write(tmp_path / f"repos/r/{number}.py", "\n".join(odd if number % 2 else even) + "\n")
    rounds = []

    def counted(*given):
        rounds.append(given)
        assert len(rounds) < 9, "the same copies are found again and again"
        return choose_copies(*given)

    monkeypatch.setattr(lsh, "WINDOW", 1)
    monkeypatch.setattr(near_dedup, "choose_copies", counted)
    options = NearDedupConfig(level="file", similarity=1.0, num_hashes=64, bands=1, rows=1)
    build(tmp_path / "repos", tmp_path / "out", near_dedup=options, exact_dedup="none")
    assert removed(tmp_path / "out", "file") == {f"r/{number}.py": f"r/{number % 2}.py" for number in range(2, 6)}
    assert len(rounds) == 4


def test_runs_give_back_every_record_once_whatever_the_ranges(tmp_path):
    dtype = np.dtype([("key", "<u8"), ("unit", "<u4")])
    generator = np.random.default_rng(0)
    records = np.zeros(1000, dtype)
    records["key"] = generator.integers(1 << 64, size=1000, dtype=np.uint64)
    records["key"][:3] = 0, 2**64 - 1, 2**63
    records["unit"] = np.arange(1000)
    write_runs(tmp_path / "runs", [records, records[::-1]])
    for max_records in (1, 7, 1000, 5000):
        ranges = key_ranges(1000, max_records)
        assert ranges[0][0] == 0
        assert ranges[-1][1] == 2**64 - 1
        for run in (0, 1):
            parts = [read_range(tmp_path / "runs", dtype, keys, run=run, num_runs=2) for keys in ranges]
            assert (np.concatenate(parts) == np.sort(records, order="key")).all()
    write_runs(tmp_path / "empty", [records[:0]])
    assert len(read_range(tmp_path / "empty", dtype, (0, 2**64 - 1))) == 0
