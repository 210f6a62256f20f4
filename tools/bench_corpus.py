"""The corpus pipeline compared with its peers: paired runs over real code, CPU time of the whole process tree.

    python tools/corpus_sources.py /tmp/bench-corpus                              # once: gathers the code
    python tools/bench_corpus.py stages --peers /tmp/venv-corpus-peers/bin/python # each stage and a peer
    python tools/bench_corpus.py scale                                            # 100 MB to 5 GB
    python tools/bench_corpus.py alarms                                           # clean files that the screen drops

A sample of the gathered repositories lies in one Parquet file and as folders, the same for all; each contender reads it
in a process of its own (peers in their own environment) and times only its work, not its start-up; the contenders of a
pair alternate. Contenders do equal work; where their decisions may differ, the record counts the files on which they
do. Results go to tools/results/corpus_cpu.json.
"""

import hashlib
import itertools
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from bench_common import commit, machine, run_tool, write_record
from tyro.conf import Positional

from megacoder.core.config import parse_args
from megacoder.corpus.ambiguous import candidate_languages, settled_language
from megacoder.corpus.languages import CODE_LANGUAGES, language_of
from megacoder.corpus.reading import decode
from megacoder.corpus.rules import PaperRules
from megacoder.corpus.screening import ScreeningConfig
from megacoder.corpus.syntax import parse

HERE = Path(__file__).parent
TARGET = HERE / "results" / "corpus_cpu.json"
PEERS = ("daft", "datatrove", "spacy", "data_prep_toolkit_transforms")
PAIRS = {
    # name: (ours, theirs, how many times as fast ours has to be)
    "minhash / Daft": ("ours_minhash", "daft_minhash", 2.0),
    "minhash / datatrove": ("ours_minhash", "datatrove_minhash", 6.0),
    "syntax / bare tree-sitter": ("ours_syntax", "bare_tree_sitter", 0.85),
    "syntax of Python / CPython's parser": ("ours_python", "cpython_parser", 5.0),
    "decontamination / set of tuples": ("ours_decontamination", "set_decontamination", 2.0),
    "rules / StarCoder-style Python": ("ours_rules", "plain_rules", 2.0),
    "stages 1-7 / datatrove filter + minhash": ("ours_pipeline", "datatrove_pipeline", 10.0),
    "ordering / data-prep-kit": ("ours_order", "dpk_order", 20.0),
}

_NAME = re.compile(r"(?<![\w$#@%&\\])[a-z]+(?:_[a-z]+|[a-z][A-Z])\w*")  # no keyword looks like this
_TESTS = re.compile(
    r"/(?:\w*[-_.])?(?:tests?|testing|testdata|testsuite|fixtures?|baselines|t|spec|bad|invalid|corpus)(?:[-_.]\w*)?/"
)
TOP_TEN = ("Java", "Python", "C++", "TypeScript", "PHP", "C#", "JavaScript", "HTML", "C", "TeX")


@dataclass(frozen=True, kw_only=True)
class Options:
    """The corpus pipeline beside its peers."""

    what: Positional[Literal["stages", "scale", "alarms"]]
    """see the module"""
    folder: Path = Path("/tmp/bench-corpus")
    """what corpus_sources.py filled"""
    megabytes: int = 320
    """size of the sample"""
    repeats: int = 3
    """runs of each contender"""
    peers: Path = Path("/tmp/venv-corpus-peers/bin/python")
    """interpreter of the peers' environment"""
    only: str = ""
    """pairs whose name contains this"""
    files: int = 3000
    """of a language, at most, for alarms"""
    sizes: tuple[int, ...] = (100, 300, 1000, 2000, 5000)
    """megabytes, for scale"""


_MOST_OF_ONE = 0.1  # of a sample's bytes that one repository may fill


def sample(folder: Path, megabytes: int) -> tuple[Path, Path]:
    """(Parquet of files, folder of the same files): whole repositories, drawn by the hash of their names.

    Versions of one project are drawn one by one. Repositories too large for the sample are left out.
    """
    table, tree = folder / f"sample-{megabytes}.parquet", folder / f"sample-{megabytes}"
    if table.exists():
        return table, tree
    rows: list[dict[str, Any]] = []
    left = megabytes * 1_000_000
    drawn = sorted((folder / "repos").iterdir(), key=lambda repo: hashlib.sha256(repo.name.encode()).digest())
    repos = iter(drawn)
    for repo in repos:
        files = list(_source_files(repo))
        size = sum(len(row["text"].encode()) for row in files)
        if size <= _MOST_OF_ONE * megabytes * 1e6:
            rows += files
            left -= size
        if left < 0:
            break
    else:
        sys.exit(f"{folder} holds only {megabytes - left / 1e6:.0f} MB to draw from; --megabytes less")
    others = [row["text"] for repo in repos for row in itertools.islice(_source_files(repo), 1000)]
    others.sort(key=lambda text: hashlib.sha256(text.encode()).digest())
    table.with_suffix(".tests.json").write_text(
        json.dumps([piece for text in others[:1000] for piece in _pieces(text)])
    )
    rows.sort(key=lambda row: (row["repo"], row["path"]))
    for row in rows:
        target = tree / row["repo"] / row["path"]
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(row["text"], encoding="utf-8", newline="")
    pq.write_table(pa.Table.from_pylist(rows), table, row_group_size=2000)
    return table, tree


def _source_files(repo: Path) -> Iterator[dict[str, Any]]:
    """The repository's files in languages of the paper, up to 1 MiB and in UTF-8."""
    for path in sorted(repo.rglob("*")):
        language = language_of(path.name)
        if language not in CODE_LANGUAGES or not path.is_file() or path.is_symlink() or path.stat().st_size > 1 << 20:
            continue
        try:
            text = path.read_bytes().decode()
        except UnicodeDecodeError:
            continue
        if "\0" not in text:
            yield {"repo": repo.name, "path": path.relative_to(repo).as_posix(), "language": language, "text": text}


def _pieces(text: str) -> list[str]:
    """What stands for a test: 40 words from the middle of a file, and for every fifth 7 words as they are written."""
    words = list(re.finditer(r"\w+", text))
    middle = words[len(words) // 2 :]
    pieces = [" ".join(word[0] for word in middle[:40])]
    return [*pieces, text[middle[0].start() : middle[:7][-1].end()]] if middle and len(words) % 5 == 0 else pieces


def run(job: str, python: Path, table: Path, tree: Path) -> dict[str, Any]:
    """One contender's own report: CPU seconds of its work, and what it decided."""
    with tempfile.TemporaryDirectory() as scratch:
        command = [str(python), str(HERE / "corpus_contenders.py"), job, str(table), str(tree), scratch]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent), "PYTHONHASHSEED": "0"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        return {"error": done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "killed"}
    return json.loads(done.stdout.splitlines()[-1])


def stages(options: Options) -> None:
    """Every pair of `PAIRS` in turns."""
    table, tree = sample(options.folder, options.megabytes)
    whole = sum(len(text.encode()) for text in pq.read_table(table, columns=["text"])["text"].to_pylist()) / 1e6
    for name, (ours, theirs, wanted) in PAIRS.items():
        if options.only not in name:
            continue
        runs: dict[str, list[dict[str, Any]]] = {ours: [], theirs: []}
        for _ in range(options.repeats):
            for job in runs:
                python = options.peers if job.startswith(("daft", "datatrove", "dpk")) else Path(sys.executable)
                runs[job].append(run(job, python, table, tree))
        failed = next((report["error"] for reports in runs.values() for report in reports if "error" in report), None)
        if failed:
            found: dict[str, Any] = {"error": failed}
        else:
            seconds = {job: statistics.median(report["seconds"] for report in reports) for job, reports in runs.items()}
            size = runs[ours][0].get("megabytes", whole)  # where a pair looks at a part
            ratios = [b["seconds"] / a["seconds"] for a, b in zip(runs[ours], runs[theirs], strict=True)]
            found = {
                "megabytes": round(size, 1), "files": pq.read_metadata(table).num_rows, "repeats": options.repeats,
                "cpu_seconds": {job: round(value, 3) for job, value in seconds.items()},
                "megabytes_per_core_second": {job: round(size / value, 2) for job, value in seconds.items()},
                "times_as_fast": round(statistics.median(ratios), 2), "wanted": wanted,
                "peak_mb": {job: max(report["peak_mb"] for report in reports) for job, reports in runs.items()},
                "decided": {job: reports[0].get("decided") for job, reports in runs.items()},
                "same_decisions": _same(runs[ours][0], runs[theirs][0]),
            }  # fmt: skip
        print(json.dumps({name: found}), flush=True)
        _add(options, name, found)


def _same(ours: dict[str, Any], theirs: dict[str, Any]) -> bool | None:
    """Whether both decided alike on every file; None where they do not decide the same thing."""
    return ours["digest"] == theirs["digest"] if "digest" in ours and "digest" in theirs else None


def scale(options: Options) -> None:
    """Whole builds of growing corpora: real files again and again, in each copy with names of its own."""
    table, _ = sample(options.folder, options.megabytes)
    points = []
    for megabytes in options.sizes:
        source = options.folder / f"grown-{megabytes}"
        files = grow(table, source, megabytes)
        with tempfile.TemporaryDirectory(dir=options.folder) as out:
            command = [
                sys.executable, "-m", "megacoder", "corpus", "build", "--input", str(source), "--out", f"{out}/corpus",
                "--workers", "2",
            ]  # fmt: skip
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            start = time.perf_counter()
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT, env=environment)
            main_mb, worker_mb = watch(process)
            wall = time.perf_counter() - start
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            if process.returncode:
                sys.exit(f"{' '.join(command)} ended with {process.returncode}")
        cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        points.append(
            {
                "megabytes": megabytes, "files": files, "cpu_seconds": round(cpu, 1), "wall_seconds": round(wall, 1),
                "cpu_seconds_per_megabyte": round(cpu / megabytes, 4), "main_process_peak_mb": main_mb,
                "largest_worker_peak_mb": worker_mb,
            }
        )  # fmt: skip
        print(json.dumps(points[-1]), flush=True)
    _add(options, "scale", {"curve": points, "extrapolated": extrapolate(*points[-2:])})


def extrapolate(before: dict[str, Any], last: dict[str, Any]) -> dict[str, Any]:
    """What the last two points of the curve say of the corpus that DeepSeek-Coder was trained on."""
    per_file = (last["main_process_peak_mb"] - before["main_process_peak_mb"]) / (last["files"] - before["files"])
    return {
        "to": "798 GB, 603 million files",
        "core_hours": round(last["cpu_seconds_per_megabyte"] * 798_000 / 3600, 1),
        "main_process_gb": round((last["main_process_peak_mb"] + per_file * (603e6 - last["files"])) / 1000, 1),
        "largest_worker_mb": last["largest_worker_peak_mb"],
        "assumes": [
            "time is linear in bytes at the last point's rate, and the languages are mixed as here",
            "the main process grows with the files as between the last two points; it works itself on a single shard",
            "a worker's memory depends on its shard, its largest repository and the ranges that it sorts",
            "shards of 256 MB (--shard-bytes), so that there are about 3,000 of them",
        ],
    }


def watch(process: subprocess.Popen[bytes]) -> tuple[int, int]:
    """Waits for the end; the peak resident memory in MB of the process, and of the largest that it started."""
    peaks: dict[int, int] = {}
    while process.poll() is None:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        for pid in [process.pid, *map(int, _read(children).split())]:
            if found := re.search(r"VmHWM:\s+(\d+)", _read(Path(f"/proc/{pid}/status"))):
                peaks[pid] = max(peaks.get(pid, 0), int(found[1]) // 1024)
        time.sleep(0.1)
    own = peaks.pop(process.pid, 0)
    return own, max(peaks.values(), default=0)


def _read(path: Path) -> str:
    """Its text, or none where the process has ended."""
    try:
        return path.read_text()
    except OSError:
        return ""


def grow(table: Path, target: Path, megabytes: int) -> int:
    """Tables of about `megabytes`: the sample's files over and over, in each copy with other names; how many files."""
    count = target / "files.txt"
    if count.exists():
        return int(count.read_text())
    target.mkdir(parents=True, exist_ok=True)
    rows = pq.read_table(table).to_pylist()
    left, copy, files = megabytes * 1_000_000, 0, 0
    while left > 0:
        edited = []
        for row in rows:
            text = _NAME.sub(rf"\g<0>{copy}", row["text"]) if copy else row["text"]
            left -= len(text.encode())
            edited.append({**row, "repo": f"copy{copy:04d}-{row['repo']}", "content": text})
            if left < 0:
                break
        columns = {name: [row[name] for row in edited] for name in ("repo", "path", "content")}
        pq.write_table(pa.table(columns), target / f"part-{copy:04d}.parquet", row_group_size=2000)
        copy, files = copy + 1, files + len(edited)
    count.write_text(str(files))
    return files


def alarms(options: Options) -> None:
    """Of released sources, how many the syntax screen would drop, for the ten languages with the largest shares.

    Clean are files of packages that people install, outside the folders of tests, where parsers keep what must not
    parse, and only those that the paper's rules keep. At most `--files` of a language, drawn by hash.
    """
    config, rules = ScreeningConfig(), PaperRules()
    found: dict[str, dict[str, Any]] = {}
    root = options.folder / "repos"
    names = (path.relative_to(root).as_posix() for path in root.rglob("*"))
    clean = [name for name in names if not _TESTS.search(f"/{name}/")]
    for name in sorted(clean, key=lambda name: hashlib.sha256(name.encode()).digest()):
        path = root / name
        candidates = candidate_languages(name, language_of(name)) & set(TOP_TEN)
        if not candidates or not path.is_file() or path.is_symlink() or path.stat().st_size > 1 << 20:
            continue
        text, _ = decode(path.read_bytes())
        language = None if text is None else settled_language(name, language_of(name), text)
        if text is None or language not in TOP_TEN or rules.reason(text, language):
            continue
        row = found.setdefault(language, {"files": 0, "dropped": 0, "first_dropped": []})
        if row["files"] == options.files:
            continue
        limit = config.max_share(language)
        parsed = parse(text, language, name, enough=limit)
        row["files"] += 1
        if parsed is not None and parsed.error_share > limit:
            row["dropped"] += 1
            row["first_dropped"] = [*row["first_dropped"], f"{name}: {parsed.problem}"][:8]
    for language in TOP_TEN:
        row = found.setdefault(language, {"files": 0, "dropped": 0, "first_dropped": []})
        row["percent"] = round(100 * row["dropped"] / max(row["files"], 1), 2)
        print(language, row["files"], row["dropped"], f"{row['percent']}%", flush=True)
    _add(options, "false alarms", {language: found[language] for language in TOP_TEN})


def _add(options: Options, name: str, found: dict[str, Any]) -> None:
    """Puts what was found into the record, with the commit that it was found on: parts may be taken again alone."""
    results: dict[str, Any] = json.loads(TARGET.read_text())["results"] if TARGET.exists() else {}
    results[name] = {"commit": commit(), **found}
    TARGET.parent.mkdir(exist_ok=True)
    write_record(TARGET, machine=machine(**_versions(options.peers)), options=options, results=results)


def _versions(peers: Path) -> dict[str, str | int]:
    """What is installed of the peers; nothing where there is no environment of theirs."""
    if not peers.exists():
        return {}
    ask = f"import importlib.metadata as m; print(*(m.version(name) for name in {PEERS!r}))"
    done = subprocess.run([str(peers), "-c", ask], capture_output=True, text=True, check=True)
    return dict(zip(PEERS, done.stdout.split(), strict=True))


def main() -> None:
    """The command."""
    options = parse_args(Options, None, prog="bench_corpus.py")
    {"stages": stages, "scale": scale, "alarms": alarms}[options.what](options)


if __name__ == "__main__":
    run_tool(main)
