"""One contender of bench_corpus.py in a process of its own: JOB TABLE TREE SCRATCH; prints one line of JSON.

Imports that belong to one contender are inside it: peers run in an environment without megacoder's dependencies.
"""

import hashlib
import json
import random
import re
import resource
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

NUM_HASHES = 128


def cpu_seconds() -> float:
    """Of this process and those that it has waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def texts(table: Path) -> list[str]:
    """The files' contents."""
    return pq.read_table(table, columns=["text"])["text"].to_pylist()


def ours_minhash(table: Path, tree: Path, scratch: Path) -> Iterator[Any]:
    """Signatures of every file."""
    from megacoder.corpus.minhash import signatures

    column = pq.read_table(table, columns=["text"])["text"]
    yield
    for start in range(0, len(column), 500):
        signatures(column.slice(start, 500).cast(pa.binary()).to_pylist(), num_hashes=NUM_HASHES, ngram=5)
    yield {}


def daft_minhash(table: Path, tree: Path, scratch: Path) -> Iterator[Any]:
    """Daft's expression with its own normalization to equal words: lower case, other characters as blanks."""
    import daft

    daft.set_execution_config()
    frame = daft.from_arrow(pq.read_table(table, columns=["text"]))
    column = daft.col("text")
    normalized = column.normalize(remove_punct=True, lowercase=True, nfd_unicode=False, white_space=True)
    yield
    frame.select(normalized.minhash(num_hashes=NUM_HASHES, ngram_size=5)).collect()
    yield {}


def datatrove_minhash(table: Path, tree: Path, scratch: Path) -> Iterator[Any]:
    """datatrove's signature of a text, its normalization reduced to lower case, words by a regular expression."""
    from datatrove.pipeline.dedup.minhash import MinhashConfig, MinhashDedupSignature
    from datatrove.utils.hashing import HashConfig
    from datatrove.utils.text import TextNormConfig

    norm = TextNormConfig(
        lowercase=True, norm_whitespace=False, remove_punctuation=False, norm_unicode_diacritics=False,
        norm_numbers=False, norm_weekdays=False, norm_monthnames=False,
    )  # fmt: skip
    config = MinhashConfig(
        n_grams=5, num_buckets=16, hashes_per_bucket=NUM_HASHES // 16, norm_config=norm,
        hash_config=HashConfig(precision=64),
    )  # fmt: skip
    step = MinhashDedupSignature(str(scratch), config=config)
    words = re.compile(r"\w+")

    class Tokenizer:
        def word_tokenize(self, text: str) -> list[str]:
            return words.findall(text)

    step.word_tokenizer = Tokenizer()
    contents = texts(table)
    yield
    for text in contents:
        shingles = step.get_shingles(text)
        if len(shingles):  # none of fewer words than a shingle has
            step.get_signature(shingles)
    yield {}


def _syntax_files(table: Path) -> list[tuple[str, str, str]]:
    from megacoder.corpus.syntax import SCREENED

    rows = pq.read_table(table, columns=["text", "language", "path"]).to_pylist()
    return [(row["text"], row["language"], row["path"]) for row in rows if row["language"] in SCREENED]


def ours_syntax(table: Path, tree: Path, scratch: Path) -> Iterator[Any]:
    """The screen's verdict of every file."""
    from megacoder.corpus.syntax import parse

    files = _syntax_files(table)
    yield
    broken = sum(bool((found := parse(*file, enough=0.1)) and found.error_share > 0.1) for file in files)
    yield {"decided": broken}


def bare_tree_sitter(table: Path, tree: Path, scratch: Path) -> Iterator[Any]:
    """The parse alone, of the same files with the same grammars (Python with its own)."""
    from megacoder.corpus import syntax

    grammars = {**syntax._GRAMMARS, "Python": "python", "Jupyter Notebook": "json"}
    files = [(text.encode(), syntax._parser(grammars[language])) for text, language, _ in _syntax_files(table)]
    yield
    for code, parser in files:
        parser.parse(code)
    yield {}


def ours_python(table: Path, tree: Path, scratch: Path) -> Iterator[Any]:
    """The screen's verdict of every Python file."""
    from megacoder.corpus.syntax import parse

    texts = _python_texts(table)
    yield
    broken = [bool((found := parse(text, "Python", "a.py")) and found.error_share) for text in texts]
    yield {"megabytes": sum(map(len, texts)) / 1e6, **_decisions(broken)}


def cpython_parser(table: Path, tree: Path, scratch: Path) -> Iterator[Any]:
    """The same by CPython's parser alone."""
    from megacoder.corpus.syntax import _by_cpython

    texts = _python_texts(table)
    yield
    yield _decisions([bool(_by_cpython(text).error_share) for text in texts])


def _python_texts(table: Path) -> list[str]:
    return [text for text, language, _ in _syntax_files(table) if language == "Python"]


def _tests(table: Path) -> list[str]:
    """Stand-ins for a benchmark: pieces of files that are not in the sample."""
    found: list[str] = json.loads(table.with_suffix(".tests.json").read_text())
    return found


def _strange_tests(table: Path) -> list[str]:
    """The same words in random order: as of a real benchmark, hardly any file holds a piece."""
    shuffle = random.Random(0).shuffle
    found = [test.split() for test in _tests(table)]
    for words in found:
        shuffle(words)
    return list(map(" ".join, found))


def ours_decontamination(table: Path, tree: Path, scratch: Path) -> Iterator[Any]:
    """Which files hold a piece of a test."""
    from megacoder.corpus.benchmarks import TestString
    from megacoder.corpus.decontamination import BenchmarkIndex, DecontaminationConfig

    index = BenchmarkIndex([TestString(test="t", text=test) for test in _tests(table)], DecontaminationConfig())
    contents = [text.encode() for text in texts(table)]
    yield
    yield _decisions([bool(index.hits(text)) for text in contents])


def set_decontamination(table: Path, tree: Path, scratch: Path) -> Iterator[Any]:
    """The same by a loop over tuples of words and a set for each length; short strings must occur literally."""
    find = re.compile(rb"[0-9A-Za-z_\x80-\xff]+").findall
    grams: dict[int, set[tuple[bytes, ...]]] = {}
    literals: dict[tuple[bytes, ...], set[bytes]] = {}

    def holds(normal: bytes, literal: bytes) -> bool:
        whole = (rb"(?<![0-9a-z_\x80-\xff])" if find(literal[:1]) else b"") + re.escape(literal)
        return bool(re.search(whole + (rb"(?![0-9a-z_\x80-\xff])" if find(literal[-1:]) else b""), normal))

    for test in _tests(table):
        words = find(test.encode().lower())
        length = min(10, len(words))
        if length >= 3:
            grams.setdefault(length, set()).update(zip(*(words[i:] for i in range(length)), strict=False))
        if 3 <= length < 10:
            literals.setdefault(tuple(words), set()).add(b" ".join(test.encode().lower().split()))
    contents = [text.encode() for text in texts(table)]
    yield
    found = []
    for text in contents:
        words = find(text.lower())
        shared = set().union(
            *(wanted.intersection(zip(*(words[i:] for i in range(n)), strict=False)) for n, wanted in grams.items())
        )
        found.append(any(len(gram) == 10 for gram in shared))
        if shared and not found[-1]:
            normal = b" ".join(text.lower().split())
            found[-1] = any(holds(normal, literal) for gram in shared for literal in literals[gram])
    yield _decisions(found)


def ours_rules(table: Path, tree: Path, scratch: Path) -> Iterator[Any]:
    """Which files the paper's rules drop."""
    from megacoder.corpus.rules import PaperRules

    rows = pq.read_table(table, columns=["text", "language"]).to_pylist()
    rules = PaperRules()
    yield
    yield _decisions([rules.reason(row["text"], row["language"]) is not None for row in rows])


def plain_rules(table: Path, tree: Path, scratch: Path) -> Iterator[Any]:
    """The same as StarCoder's preprocessing writes such filters: line by line, character by character."""
    from megacoder.corpus.rules import visible_text

    rows = pq.read_table(table, columns=["text", "language"]).to_pylist()

    def drops(text: str, language: str) -> bool:
        if not text.strip():
            return True
        lines = text.replace("\r\n", "\n").replace("\r", "\n").removesuffix("\n").split("\n")
        lengths = [len(line) for line in lines]
        if sum(lengths) / len(lengths) > 100 or max(lengths) > 1000:
            return True
        if sum(map(str.isalpha, text)) / len(text) < 0.25:
            return True
        if language != "XSLT" and "<?xml version=" in text[:100]:
            return True
        if language == "HTML":
            visible = len(visible_text(text))
            return visible < 100 or visible / len(text) < 0.2
        return language in ("JSON", "YAML") and not 50 <= len(text) <= 5000

    yield
    yield _decisions([drops(row["text"], row["language"]) for row in rows])


def ours_pipeline(table: Path, tree: Path, scratch: Path) -> Iterator[Any]:
    """A whole build from folders: read, rules, dedup of all kinds, screening, decontamination, order, samples."""
    from megacoder.corpus.build import build_corpus
    from megacoder.corpus.config import CorpusConfig
    from megacoder.corpus.near_config import NearDedupConfig

    near = NearDedupConfig(level="both", num_hashes=NUM_HASHES, bands=16, rows=8)
    tests = scratch / "tests.jsonl"
    tests.write_text("".join(json.dumps({"text": test}) + "\n" for test in _strange_tests(table)))
    config = CorpusConfig(input=(tree,), out=scratch / "out", workers=1, near_dedup=near, benchmarks=(tests,))
    yield
    report = build_corpus(config, quiet=True)
    yield {"decided": report.accounts.kept.files}


def datatrove_pipeline(table: Path, tree: Path, scratch: Path) -> Iterator[Any]:
    """datatrove as its users run it on the same files: reader, filter, its four steps of MinHash with defaults."""
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.dedup import MinhashDedupCluster, MinhashDedupFilter, MinhashDedupSignature
    from datatrove.pipeline.dedup.minhash import MinhashConfig, MinhashDedupBuckets
    from datatrove.pipeline.filters import LambdaFilter
    from datatrove.pipeline.readers import ParquetReader
    from datatrove.pipeline.writers import ParquetWriter
    from datatrove.utils.typeshelper import Languages

    def keep(document: Any) -> bool:
        lines = document.text.splitlines() or [""]
        lengths = [len(line) for line in lines]
        letters = sum(map(str.isalpha, document.text))
        return max(lengths) <= 1000 and sum(lengths) / len(lengths) <= 100 and letters >= 0.25 * len(document.text)

    def read(folder: Path) -> ParquetReader:
        return ParquetReader(str(folder), text_key="text", glob_pattern="*.parquet")

    (scratch / "input").mkdir()
    (scratch / "input" / "files.parquet").symlink_to(table.resolve())
    config = MinhashConfig()
    s = str(scratch)
    yield
    pipelines: list[list[Any]] = [
        [read(scratch / "input"), LambdaFilter(keep), ParquetWriter(f"{s}/filtered")],
        [read(scratch / "filtered"), MinhashDedupSignature(f"{s}/signed", config=config, language=Languages.english)],
        [MinhashDedupBuckets(f"{s}/signed", f"{s}/buckets", config=config)],
        [MinhashDedupCluster(f"{s}/buckets", f"{s}/removed", config=config)],
        [read(scratch / "filtered"), MinhashDedupFilter(f"{s}/removed"), ParquetWriter(f"{s}/kept")],
    ]
    for number, pipeline in enumerate(pipelines):
        tasks = config.num_buckets if number == 2 else 1
        LocalPipelineExecutor(pipeline, tasks=tasks, workers=1, logging_dir=f"{s}/logs{number}").run()
    yield {"decided": sum(pq.read_metadata(path).num_rows for path in (scratch / "kept").glob("*.parquet"))}


def ours_order(table: Path, tree: Path, scratch: Path) -> Iterator[Any]:
    """Dependencies and order of every repository."""
    from megacoder.corpus.dependencies import repository_dependencies
    from megacoder.corpus.order import connected_subgraphs, dependency_order

    repos = _repositories(table)
    yield
    edges = 0
    for languages, files in repos.values():
        depends_on = repository_dependencies(languages, files)
        edges += sum(map(len, depends_on))
        for group in connected_subgraphs(depends_on):
            dependency_order(group, depends_on)
    yield {"decided": edges}


def dpk_order(table: Path, tree: Path, scratch: Path) -> Iterator[Any]:
    """data-prep-kit's repo_level_ordering by the function that its transform calls, repository by repository.

    What it cannot sort by meaning it sorts by path: `decided` says how many repositories it did not.
    """
    import logging

    from dpk_repo_level_order.internal.repo_level_wrappers import SORT_SEMANTIC, get_sorting_func  # type: ignore

    class Failures(logging.Handler):
        count = 0

        def emit(self, record: logging.LogRecord) -> None:
            self.count += "Falling back" in record.getMessage()

    failures, logger = Failures(logging.ERROR), logging.getLogger("ordering")
    logger.addHandler(failures)
    logger.setLevel(logging.ERROR)
    frames = [
        (repo, pa.Table.from_pylist([
            {"repo_name": repo, "title": path, "contents": text, "language": languages[path],
             "ext": PurePosixPath(path).suffix}
            for path, text in files
        ]))
        for repo, (languages, files) in _repositories(table).items()
    ]  # fmt: skip
    sort = get_sorting_func(SORT_SEMANTIC, "title", logger, "language")
    yield
    for repo, frame in frames:
        sort(frame, repo)
    yield {"decided": len(frames) - failures.count}


def _repositories(table: Path) -> dict[str, tuple[dict[str, str], list[tuple[str, str]]]]:
    repos: dict[str, tuple[dict[str, str], list[tuple[str, str]]]] = {}
    for row in pq.read_table(table).to_pylist():
        languages, files = repos.setdefault(row["repo"], ({}, []))
        languages[row["path"]] = row["language"]
        files.append((row["path"], row["text"]))
    return repos


def _decisions(found: list[bool]) -> dict[str, Any]:
    return {"decided": sum(found), "digest": hashlib.sha256(bytes(found)).hexdigest()[:16]}


def main() -> None:
    """Prepares, then times what lies between the two yields of the job."""
    job: Callable[..., Iterator[Any]] = globals()[sys.argv[1]]
    steps = job(*map(Path, sys.argv[2:5]))
    next(steps)
    start, wall = cpu_seconds(), time.perf_counter()
    report = next(steps)
    seconds, wall = cpu_seconds() - start, time.perf_counter() - wall
    status = Path("/proc/self/status").read_text()  # ru_maxrss would count the process that started this one
    peak = int(status.partition("VmHWM:")[2].split()[0]) // 1024
    print(json.dumps({"seconds": seconds, "wall": wall, "peak_mb": peak, **report}))


if __name__ == "__main__":
    main()
