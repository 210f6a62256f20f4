"""From tasks to scores: completions are requested, run or compared, and written down as they come.

A folder holds `settings.json`, `completions.jsonl` and `results.jsonl`, one line per sample. The same command with the
same folder resumes where it stopped: what is there is not requested or run again. A last line that a crash cut off is
ignored. Different settings, and inputs whose content has changed, are refused once there is a line; before that,
nothing depends on the settings that are there.
"""

import json
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from megacoder.core.console import progress
from megacoder.core.errors import ConfigError, FormatError
from megacoder.core.files import exclusive, write_json
from megacoder.evaluate.benchmarks.base import Benchmark, ProgramBenchmark, Task, TextBenchmark, cut
from megacoder.evaluate.benchmarks.completions import CompletionSource, Request
from megacoder.evaluate.sandbox.host import Sandbox

__all__ = ["Notes", "Summary", "collect", "judge", "keep_settings", "pass_at_k", "summarize"]

Key = tuple[str, int]
"""(task, sample)"""


def pass_at_k(num_samples: int, num_right: int, k: int) -> float:
    """Unbiased chance that one of k samples is right: 1 - C(n - c, k) / C(n, k) (arXiv:2107.03374, eq. 1)."""
    if not 1 <= k <= num_samples:
        raise ValueError(f"pass@{k} of {num_samples} samples")
    missed = 1.0
    for number in range(num_samples - num_right + 1, num_samples + 1):
        missed *= max(0.0, 1.0 - k / number)
    return 1.0 - missed


class Notes:
    """What is known so far: completions and results by key, stored in a folder if one is given."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.completions: dict[Key, str] = {}
        self.results: dict[Key, dict[str, Any]] = {}
        self._files: dict[str, TextIO] = {}

    @classmethod
    @contextmanager
    def open(cls, folder: Path | None, settings: dict[str, Any]) -> Iterator["Notes"]:
        """Notes of an evaluation with these settings; ConfigError where the folder holds a different evaluation.

        Its `contents` give, for settings that are paths, a digest of what is there, by which they are compared.
        """
        notes = cls(folder)
        if folder is None:
            yield notes
            return
        with exclusive(folder, what="evaluation"):
            notes._read(folder, settings)
            try:
                yield notes
            finally:
                for file in notes._files.values():
                    file.close()

    @classmethod
    def glance(cls, folder: Path | None) -> "Notes":
        """The completions that are there; new ones stay in memory. For ranks other than the one that has the folder."""
        notes = cls(None)
        if folder is not None:
            notes._read_completions(folder)
        return notes

    def add_completion(self, key: Key, text: str) -> None:
        self.completions[key] = text
        self._write("completions.jsonl", {"task_id": key[0], "sample": key[1], "completion": text})

    def add_result(self, key: Key, result: dict[str, Any]) -> None:
        self.results[key] = result
        self._write("results.jsonl", {"task_id": key[0], "sample": key[1], **result})

    def _read(self, folder: Path, settings: dict[str, Any]) -> None:
        def has_lines() -> bool:
            self._read_completions(folder)
            for row in _whole_lines(folder / "results.jsonl", fields=("task_id", "sample")):
                self.results[row.pop("task_id"), row.pop("sample")] = row
            return bool(self.completions or self.results)

        keep_settings(folder, settings, has_lines=has_lines)

    def _read_completions(self, folder: Path) -> None:
        for row in _whole_lines(folder / "completions.jsonl", fields=("task_id", "sample", "completion")):
            self.completions[row["task_id"], row["sample"]] = row["completion"]

    def _write(self, name: str, row: dict[str, Any]) -> None:
        if self.folder is None:
            return
        if name not in self._files:
            self._files[name] = (self.folder / name).open("a", encoding="utf-8")
        self._files[name].write(json.dumps(row, ensure_ascii=False) + "\n")
        self._files[name].flush()


def keep_settings(
    folder: Path, settings: dict[str, Any], *, has_lines: Callable[[], bool], option: str = "--out"
) -> None:  # fmt: skip
    """Writes into `folder` what its lines are made with; ConfigError if it has lines, and they were made otherwise.

    `option` chooses the folder. `has_lines` is asked once its settings are known to be such; an evaluation reads
    nothing else there before that, while a follower has read its scores.
    """
    path = folder / "settings.json"
    old = _settings_of(path, option) if path.exists() else None
    if has_lines() and old is not None:
        _check_same(path, old, settings, option)
    else:
        write_json(path, settings)


def _settings_of(path: Path, option: str) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:  # UnicodeDecodeError is one
        found = None
    if not isinstance(found, dict) or "benchmark" not in found or not isinstance(found.get("contents", {}), dict):
        raise FormatError(f"{path}: not an evaluation's settings; choose another {option}")
    return found


_ADDED = {"spm"}
"""Options that scores of an earlier version were made without."""


def _check_same(path: Path, old: Mapping[str, Any], new: Mapping[str, Any], option: str) -> None:
    """ConfigError that names the first setting of `new` that differs from `old`, the settings in `path`."""
    if "contents" not in old:
        raise ConfigError(
            f"{path}: of an earlier version, which did not record what its inputs held; choose another {option}, or "
            f"remove {path.parent}"
        )
    before, after = old["contents"], new["contents"]
    for name in [name for name in new if name != "contents"]:
        was, now = old.get(name), new[name]
        if name in _ADDED and was is None and now == str(False):
            continue
        if name in before or name in after:
            same = before.get(name) == after.get(name)
            made = f"--{name} {was} ({before.get(name)}), now {now} ({after.get(name)})"
        else:
            same, made = was == now, f"{name} = {was!r}, now {now!r}"
        if not same:
            raise ConfigError(f"{path}: made with {made}; choose another {option}, or remove {path.parent}")


def _whole_lines(path: Path, *, fields: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of `path`; FormatError for one without all `fields`.

    What follows the last line break is cut off the file, to be done again.
    """
    if not path.exists():
        return []
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        os.truncate(path, len(whole))
    rows = []
    for number, line in enumerate(whole.split(b"\n"), start=1):
        if not line:
            continue
        try:
            row = json.loads(line)
        except ValueError:  # UnicodeDecodeError is one
            row = None
        if not isinstance(row, dict) or any(name not in row for name in fields):
            raise FormatError(f"{path}, line {number}: not a line that an evaluation wrote; choose another --out")
        rows.append(row)
    return rows


def collect(
    benchmark: Benchmark, tasks: Sequence[Task], notes: Notes, *, open_source: Callable[[], CompletionSource],
    samples: int, quiet: bool = False,
) -> None:  # fmt: skip
    """Requests every completion that `notes` do not have; each is cut where the benchmark says."""
    requests = [
        Request(task=task, sample=sample, stops=benchmark.stops_of(task), max_prompt_tokens=benchmark.max_prompt_tokens)
        for task in tasks
        for sample in range(samples)
        if (task.id, sample) not in notes.completions
    ]
    if not requests:
        return
    source = open_source()
    with progress("completions", len(requests), quiet=quiet) as bar:
        for done, (request, text) in enumerate(source.complete(requests), start=1):
            notes.add_completion((request.task.id, request.sample), cut(text, request.stops))
            bar.update(done)


def judge(benchmark: Benchmark, tasks: Sequence[Task], notes: Notes, *, start_sandbox: Callable[[], Sandbox]) -> None:
    """Runs or compares every completion that has no result yet."""
    by_id = {task.id: task for task in tasks}
    todo = [key for key in notes.completions if key not in notes.results and key[0] in by_id]
    if not todo:
        return
    if isinstance(benchmark, TextBenchmark):
        for key in todo:
            notes.add_result(key, dict(benchmark.scores(by_id[key[0]], notes.completions[key])))
        return
    assert isinstance(benchmark, ProgramBenchmark)
    toolchain = benchmark.toolchain()
    last_step = 1 if toolchain.language.compile else 0
    num_passed = sum(bool(result["passed"]) for result in notes.results.values())
    programs = ((key, benchmark.program(by_id[key[0]], notes.completions[key], toolchain)) for key in todo)
    with start_sandbox() as sandbox, progress("programs", len(todo)) as bar:
        for done, (key, outcome) in enumerate(sandbox.run(programs), start=1):
            passed = benchmark.passed(by_id[key[0]], outcome)
            row: dict[str, Any] = {"passed": passed, "verdict": outcome.verdict, "detail": outcome.describe()}
            row |= {
                "compiled": outcome.step == last_step,
                "cpu_seconds": round(outcome.cpu_seconds, 3),
                "tried_twice": outcome.alone,
            }
            notes.add_result(key, row)
            num_passed += passed
            bar.update(done, f"{num_passed} passed")


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Scores from 0 to 1 by group; group "" is the total."""

    num_tasks: int
    num_samples: int
    scores: dict[str, dict[str, float]]
    """{group: {"pass@1" or "exact_match", ...: score}}"""
    group_sizes: dict[str, int]
    verdicts: dict[str, int] = field(default_factory=dict)
    """how often each occurs in the results"""


def summarize(tasks: Sequence[Task], notes: Notes, *, samples: int, ks: Iterable[int] = (1, 10, 100)) -> Summary:
    """Means over tasks: pass@k of programs, each score of compared texts."""
    groups: dict[str, list[Task]] = defaultdict(list)
    for task in tasks:
        groups[""].append(task)
        if task.group:
            groups[task.group].append(task)
    scores = {}
    for group, members in groups.items():
        results = [[notes.results[task.id, sample] for sample in range(samples)] for task in members]
        if "passed" in results[0][0]:
            right = [sum(bool(row["passed"]) for row in rows) for rows in results]
            wanted = [k for k in ks if k <= samples]
            scores[group] = {f"pass@{k}": _mean([pass_at_k(samples, c, k) for c in right]) for k in wanted}
        else:
            names = results[0][0].keys()
            scores[group] = {name: _mean([row[name] for rows in results for row in rows]) for name in names}
    verdicts: dict[str, int] = defaultdict(int)
    for row in notes.results.values():
        if "verdict" in row:
            verdicts[row["verdict"]] += 1
    return Summary(
        num_tasks=len(tasks), num_samples=samples, scores=scores,
        group_sizes={group: len(members) for group, members in groups.items()}, verdicts=dict(verdicts),
    )  # fmt: skip


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
