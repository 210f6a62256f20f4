"""The corpus pipeline beside its peers: paired runs over real code, CPU time of the whole process tree.

    python tools/corpus_sources.py /tmp/bench-corpus                              # once: gathers the code
    python tools/bench_corpus.py stages --peers /tmp/venv-corpus-peers/bin/python # each stage beside a peer
    python tools/bench_corpus.py scale                                            # 100 MB to 5 GB

A sample of the gathered files, the same for every contender, lies in one Parquet file; each contender reads it in a
process of its own (peers in their own environment), takes its start-up out of its time by timing only the work, and
the contenders of a pair take turns. What is compared does equal work; where decisions can differ, they are compared,
and the record says in how many files they do. Results go to tools/results/corpus_cpu.json.
"""

import argparse
import hashlib
import json
import os
import random
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from bench_common import machine, write_record

from megacoder.corpus.languages import language_of

HERE = Path(__file__).parent
TARGET = HERE / "results" / "corpus_cpu.json"
PAIRS = {
    # name: (ours, theirs, how many times as fast ours has to be)
    "minhash / Daft": ("ours_minhash", "daft_minhash", 2.0),
    "minhash / datatrove": ("ours_minhash", "datatrove_minhash", 6.0),
    "syntax / bare tree-sitter": ("ours_syntax", "bare_tree_sitter", 0.85),
    "decontamination / set of tuples": ("ours_decontamination", "set_decontamination", 2.0),
    "rules / StarCoder-style Python": ("ours_rules", "plain_rules", 2.0),
    "stages 1-7 / datatrove filter + minhash": ("ours_pipeline", "datatrove_pipeline", 10.0),
    "ordering / data-prep-kit": ("ours_order", "dpk_order", 20.0),
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """As given on the command line."""

    folder: Path
    megabytes: int
    repeats: int
    peers: Path


def sample(folder: Path, megabytes: int) -> tuple[Path, Path]:
    """(Parquet of files, folder with the same files by repository), drawn by hash over all that was gathered."""
    table, tree = folder / f"sample-{megabytes}.parquet", folder / f"sample-{megabytes}"
    if table.exists():
        return table, tree
    found = []
    for path in (folder / "repos").rglob("*"):
        language = language_of(path.name)
        if language and path.is_file() and not path.is_symlink() and path.stat().st_size <= 1 << 20:
            found.append((hashlib.sha256(str(path.relative_to(folder)).encode()).digest(), path, language))
    rows: list[dict[str, Any]] = []
    left = megabytes * 1_000_000
    drawn, place = sorted(found), 0
    for place, (_, path, language) in enumerate(drawn):  # noqa: B007
        try:
            text = path.read_bytes().decode()
        except UnicodeDecodeError:
            continue
        repo, _, name = path.relative_to(folder / "repos").as_posix().partition("/")
        if "\0" in text or not name:
            continue
        rows.append({"repo": repo, "path": name, "language": language, "text": text})
        left -= len(text.encode())
        if left < 0:
            break
    tests = [piece for _, path, _ in drawn[place + 1 : place + 1001] for piece in _pieces(path)]
    table.with_suffix(".tests.json").write_text(json.dumps(tests))
    rows.sort(key=lambda row: (row["repo"], row["path"]))
    for row in rows:
        place = tree / row["repo"] / row["path"]
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(row["text"], encoding="utf-8")
    pq.write_table(pa.Table.from_pylist(rows), table, row_group_size=2000)
    return table, tree


def _pieces(path: Path) -> list[str]:
    """What stands for a test: 40 words from the middle of a file, and 7 words for every fifth."""
    words = re.findall(r"\w+", path.read_text(encoding="utf-8", errors="replace"))
    middle = len(words) // 2
    long = " ".join(words[middle : middle + 40])
    return [long, " ".join(words[middle : middle + 7])] if len(words) % 5 == 0 else [long]


def run(job: str, python: Path, table: Path, tree: Path) -> dict[str, Any]:
    """One contender's own report: CPU seconds of its work, and what it decided."""
    with tempfile.TemporaryDirectory() as scratch:
        command = [str(python), str(HERE / "corpus_contenders.py"), job, str(table), str(tree), scratch]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent), "PYTHONHASHSEED": "0"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        return {"error": done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "killed"}
    return json.loads(done.stdout.splitlines()[-1])


def stages(options: Options, only: str) -> None:
    """Every pair of `PAIRS` in turns."""
    table, tree = sample(options.folder, options.megabytes)
    size = sum(len(text.encode()) for text in pq.read_table(table, columns=["text"])["text"].to_pylist()) / 1e6
    results: dict[str, Any] = json.loads(TARGET.read_text())["results"] if TARGET.exists() else {}
    for name, (ours, theirs, wanted) in PAIRS.items():
        if only and only not in name:
            continue
        runs: dict[str, list[dict[str, Any]]] = {ours: [], theirs: []}
        for _ in range(options.repeats):
            for job in runs:
                python = options.peers if job.startswith(("daft", "datatrove", "dpk")) else Path(sys.executable)
                runs[job].append(run(job, python, table, tree))
        failed = next((report["error"] for reports in runs.values() for report in reports if "error" in report), None)
        if failed:
            results[name] = {"error": failed}
        else:
            seconds = {job: statistics.median(report["seconds"] for report in reports) for job, reports in runs.items()}
            ratios = [b["seconds"] / a["seconds"] for a, b in zip(runs[ours], runs[theirs], strict=True)]
            results[name] = {
                "megabytes": round(size, 1), "files": pq.read_metadata(table).num_rows,
                "cpu_seconds": {job: round(value, 3) for job, value in seconds.items()},
                "megabytes_per_core_second": {job: round(size / value, 2) for job, value in seconds.items()},
                "times_as_fast": round(statistics.median(ratios), 2), "wanted": wanted,
                "peak_mb": {job: max(report["peak_mb"] for report in reports) for job, reports in runs.items()},
                "decided": {job: reports[0].get("decided") for job, reports in runs.items()},
                "same_decisions": runs[ours][0].get("digest") == runs[theirs][0].get("digest"),
            }  # fmt: skip
        print(json.dumps({name: results[name]}), flush=True)
    _write(options, results)


def scale(options: Options, sizes: list[int]) -> None:
    """Whole builds of growing corpora: real files again and again, each copy with words of its own."""
    results: dict[str, Any] = json.loads(TARGET.read_text())["results"] if TARGET.exists() else {}
    table, _ = sample(options.folder, options.megabytes)
    points = []
    for megabytes in sizes:
        source = options.folder / f"grown-{megabytes}"
        grow(table, source, megabytes)
        with tempfile.TemporaryDirectory(dir=options.folder) as out:
            command = [
                sys.executable, "-m", "megacoder", "corpus", "build", "--input", str(source), "--out", f"{out}/corpus",
                "--workers", "2",
            ]  # fmt: skip
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            start = time.perf_counter()
            subprocess.run(command, check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
            wall = time.perf_counter() - start
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        points.append(
            {
                "megabytes": megabytes, "cpu_seconds": round(cpu, 1), "wall_seconds": round(wall, 1),
                "largest_process_mb": after.ru_maxrss // 1024,
                "cpu_seconds_per_megabyte": round(cpu / megabytes, 4),
            }
        )  # fmt: skip
        print(json.dumps(points[-1]), flush=True)
    slope = points[-1]["cpu_seconds_per_megabyte"]
    results["scale"] = {
        "curve": points,
        "extrapolated_core_hours_for_798_gb": round(slope * 798_000 / 3600, 1),
        "assumes": "time linear in bytes at the last point's rate; files as large as here; one repository a few MB",
    }
    _write(options, results)


def grow(table: Path, target: Path, megabytes: int) -> None:
    """Tables of about `megabytes`: the sample's files over and over, in every copy a third of the lines renamed."""
    if (target / "done").exists():
        return
    target.mkdir(parents=True, exist_ok=True)
    rows = pq.read_table(table).to_pylist()
    left, copy = megabytes * 1_000_000, 0
    while left > 0:
        generator = random.Random(copy)
        edited = []
        for row in rows:
            lines = row["text"].split("\n")
            if copy:
                mark = f"n{copy}_"
                lines = [
                    line.replace("e", mark, 1) if generator.random() < 0.34 and "=" in line else line for line in lines
                ]
            text = "\n".join(lines)
            left -= len(text.encode())
            edited.append({**row, "repo": f"copy{copy:04d}-{row['repo']}", "content": text})
            if left < 0:
                break
        columns = {name: [row[name] for row in edited] for name in ("repo", "path", "content")}
        pq.write_table(pa.table(columns), target / f"part-{copy:04d}.parquet", row_group_size=2000)
        copy += 1
    (target / "done").touch()


def _write(options: Options, results: dict[str, Any]) -> None:
    TARGET.parent.mkdir(exist_ok=True)
    write_record(TARGET, machine=machine(), options=options, results=results)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["stages", "scale"])
    parser.add_argument("--folder", type=Path, default=Path("/tmp/bench-corpus"), help="what corpus_sources.py filled")
    parser.add_argument("--megabytes", type=int, default=320, help="size of the sample")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--peers", type=Path, default=Path("/tmp/venv-corpus-peers/bin/python"))
    parser.add_argument("--only", default="", help="pairs whose name contains this")
    parser.add_argument("--sizes", type=int, nargs="+", default=[100, 300, 1000, 2000, 5000], help="megabytes")
    args = parser.parse_args()
    options = Options(folder=args.folder, megabytes=args.megabytes, repeats=args.repeats, peers=args.peers)
    if args.what == "stages":
        stages(options, args.only)
    else:
        scale(options, args.sizes)


if __name__ == "__main__":
    main()
