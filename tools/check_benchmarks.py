"""Tests the judge: canonical solutions must pass, and the same solutions with a planted fault must fail.

    python tools/check_benchmarks.py --humaneval humaneval-python.jsonl humaneval-cpp.jsonl --mbpp mbpp.jsonl --own

Python's solutions run as they are, rewritten from their syntax trees, and with each of the faults of `planted_faults`;
problems whose tests miss a fault are listed. The multilingual sets come without solutions: instead of solving, programs
recite what the tests expect (`recited_answers`), in the right order and in a wrong one. `--own` adds the problems of
`language_problems`, with solutions by hand. A language whose tools are not installed is reported and skipped.
Exits with 1 if a right program fails (one whose row's own prompt does not compile fails too) or a wrong one passes: an
empty body, answers in a wrong order, one answer to all questions.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench_common import machine, run_tool, write_record
from language_problems import OWN_LANGUAGES, own_problems
from planted_faults import EMPTY, faulty_programs, rewritten
from recited_answers import RECITED_LANGUAGES, recited_answer

from megacoder.core.config import parse_args
from megacoder.core.console import say, table
from megacoder.core.errors import ConfigError, DataError
from megacoder.evaluate.benchmarks.base import ProgramBenchmark, Settings, Task, read_rows
from megacoder.evaluate.benchmarks.humaneval import HumanEval
from megacoder.evaluate.benchmarks.mbpp import Mbpp
from megacoder.evaluate.sandbox.host import Sandbox
from megacoder.evaluate.sandbox.languages import LANGUAGES, installed_languages

AS_THEY_ARE, REWRITTEN = "as they are", "rewritten"
RECITED, RECITED_WRONGLY = "recited from the tests", "recited in another order"
ONE_ANSWER = "one answer to all questions"
MUST_PASS, MUST_FAIL = (AS_THEY_ARE, REWRITTEN, RECITED), (EMPTY, RECITED_WRONGLY, ONE_ANSWER)


@dataclass(frozen=True, kw_only=True)
class Options:
    """Benchmarks' own solutions, right and spoilt, through the sandbox."""

    humaneval: tuple[Path, ...] = ()
    """JSONL files of HumanEval, in Python with canonical solutions, or multilingual"""
    mbpp: Path | None = None
    """MBPP's JSONL file"""
    own: bool = False
    """problems of our own, in every language whose tools are installed"""
    seconds: float = 2.0
    """CPU time of a program with a fault, which may run for ever; the others have the published limit"""
    workers: int = 2
    """programs at a time"""
    out: Path | None = None
    """JSON file to write"""

    def __post_init__(self) -> None:
        if not self.humaneval and self.mbpp is None and not self.own:
            raise ConfigError("nothing to check: give --humaneval FILE..., --mbpp FILE or --own")


@dataclass(frozen=True, kw_only=True)
class Count:
    """Programs of one kind."""

    kind: str
    programs: int
    passed: tuple[str, ...]
    """tasks"""
    failed: tuple[str, ...]

    @property
    def holds(self) -> bool:
        unexpected = self.failed if self.kind in MUST_PASS else self.passed if self.kind in MUST_FAIL else ()
        return not unexpected

    def row(self) -> list[str]:
        right = self.kind in MUST_PASS
        count, named = (len(self.passed), self.failed) if right else (len(self.failed), self.passed)
        wanted = "pass" if right else "fail"
        names = ", ".join(named[:8]) + (f" and {len(named) - 8} more" if len(named) > 8 else "")
        return [self.kind, f"{count:,} of {self.programs:,} {wanted}", names]


def judged(benchmark: ProgramBenchmark, answers: list[tuple[str, Task, str]], options: Options) -> list[Count]:
    """Counts by kind of (kind, task, completion)."""
    toolchain = benchmark.toolchain()
    patient, hasty = (type(benchmark)(Settings(language=benchmark.settings.language, seconds=seconds))
                      for seconds in (None, options.seconds))  # fmt: skip
    programs = (
        (place, (patient if kind in MUST_PASS else hasty).program(task, completion, toolchain))
        for place, (kind, task, completion) in enumerate(answers)
    )
    preload = benchmark.preload if toolchain.language.name == "python" else ()
    found: dict[str, dict[bool, list[str]]] = defaultdict(lambda: {True: [], False: []})
    with Sandbox(workers=options.workers, preload=preload, tools=toolchain.visible) as sandbox:
        for place, outcome in sandbox.run(programs):
            kind, task, _ = answers[place]
            found[kind][benchmark.passed(task, outcome)].append(task.id)
    return [
        Count(kind=kind, programs=len(ids[True]) + len(ids[False]), passed=tuple(ids[True]), failed=tuple(ids[False]))
        for kind, ids in sorted(found.items(), key=lambda item: (item[0] not in MUST_PASS, item[0]))
    ]


def python_answers(task: Task) -> Iterator[tuple[str, Task, str]]:
    """The canonical solution of a Python task, then each way in which it can be spoilt."""
    if isinstance(task.row.get("canonical_solution"), str):  # HumanEval's, a body: whole functions come after the stub
        body, tests = task.row["canonical_solution"], task.row["test"]
        whole, before = task.row["prompt"] + body, "    pass\n"
    elif isinstance(task.row.get("code"), str):
        body, tests = task.row["code"], "\n".join(task.row["test_list"])
        whole, before = body, ""
    else:
        raise DataError(f"task {task.id}: no canonical solution")
    yield AS_THEY_ARE, task, body
    yield REWRITTEN, task, before + rewritten(whole)
    for fault, program in faulty_programs(whole, tests).items():
        yield fault, task, before + program


def check_python(benchmark: ProgramBenchmark, path: Path, options: Options) -> list[Count]:
    """Canonical solutions and planted faults of one file."""
    return judged(benchmark, [answer for task in benchmark.load(path) for answer in python_answers(task)], options)


def check_other(language: str, path: Path, options: Options) -> list[Count]:
    """Recited answers to one multilingual file."""
    benchmark = HumanEval(Settings(language=language))
    answers, others = [], []
    for task in benchmark.load(path):
        if (completion := recited_answer(task.row, language, right=True)) is None:
            others.append(task.id)
            continue
        answers.append((RECITED, task, completion))
        if (completion := recited_answer(task.row, language, right=False)) is not None:
            answers.append((RECITED_WRONGLY, task, completion))
    if others:
        say(f"{path}: tests that cannot be recited from, left out: {', '.join(others)}")
    return judged(benchmark, answers, options)


def check_own(language: str, options: Options) -> list[Count]:
    """Our own problems in one language."""
    benchmark = HumanEval(Settings(language=language))
    rows = own_problems(language)
    tasks = benchmark.tasks(rows)
    answers = [(kind, task, task.row[answer]) for task in tasks for kind, answer in
               ((AS_THEY_ARE, "right"), (ONE_ANSWER, "wrong"))]  # fmt: skip
    return judged(benchmark, answers, options)


def language_of(path: Path) -> str:
    """The language that a HumanEval file names in its first row, else python."""
    rows = read_rows(path, HumanEval.fields)
    return str(rows[0].get("language", "python")) if rows else "python"


def main() -> None:
    options = parse_args(Options, None, prog="tools/check_benchmarks.py")
    results: dict[str, list[Count]] = {}
    for path in options.humaneval:
        language = language_of(path)
        if language not in installed_languages():
            say(f"{path}: the tools of {language} are not installed")
        elif language == "python":
            results["HumanEval, python"] = check_python(HumanEval(Settings()), path, options)
        elif language in RECITED_LANGUAGES:
            results[f"HumanEval, {language}"] = check_other(language, path, options)
        else:
            say(f"{path}: no solutions, and none can be recited in {language}")
    if options.mbpp is not None:
        results["MBPP"] = check_python(Mbpp(Settings()), options.mbpp, options)
    if options.own:
        here = installed_languages()
        say(f"not installed: {', '.join(name for name in LANGUAGES if name not in here)}")
        for language in OWN_LANGUAGES:
            if language in here:
                results[f"own problems, {language}"] = check_own(language, options)
    for title, counts in results.items():
        table(title, ["solutions", "outcome", "apart from"], [count.row() for count in counts])
    holds = all(count.holds for counts in results.values() for count in counts)
    if options.out is not None:
        write_record(options.out, machine=machine(), options=options, results=_record(results) | {"holds": holds})
    if not holds:
        raise SystemExit(1)


def _record(results: dict[str, list[Count]]) -> dict[str, Any]:
    return {
        title: {count.kind: {"programs": count.programs, "passed": len(count.passed)} for count in counts}
        for title, counts in results.items()
    }


if __name__ == "__main__":
    run_tool(main)
