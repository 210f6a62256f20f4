"""Benchmarks: prompts, cuts and judgement as published, pass@k, files, servers, folders that are resumed."""

import gzip
import itertools
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import zstandard
from command_line import run_command as run
from evaluation_problems import CROSSCODE, DS1000, HUMANEVAL, HUMANEVAL_CPP, INFILL, LEETCODE, MBPP, PAL, SHOTS
from evaluation_samples import make_model, make_tokenizer
from language_problems import OWN_LANGUAGES, own_problems

from megacoder.cli.eval_inputs import file_content
from megacoder.core.errors import ConfigError, DataError, FormatError
from megacoder.evaluate.benchmarks.base import PYTHON_IMPORTS, Settings, Task, code_block, cut
from megacoder.evaluate.benchmarks.catalogue import BENCHMARKS
from megacoder.evaluate.benchmarks.completions import FileSource
from megacoder.evaluate.benchmarks.crosscode import first_statement
from megacoder.evaluate.benchmarks.pal import question_and_answer, set_of
from megacoder.evaluate.benchmarks.published import published_scores
from megacoder.evaluate.benchmarks.python_tests import asserts, leaves_check_uncalled
from megacoder.evaluate.benchmarks.scoring import Notes, keep_settings, pass_at_k, summarize
from megacoder.evaluate.sandbox.host import Sandbox, SandboxError
from megacoder.evaluate.sandbox.languages import LANGUAGES, Library, find_toolchain
from megacoder.evaluate.similarity import edit_similarity
from megacoder.model.huggingface import export_model
from megacoder.model.init import init_weights

ROWS = {
    "humaneval": HUMANEVAL, "mbpp": MBPP, "leetcode": LEETCODE, "ds1000": DS1000, "pal": PAL, "infill": INFILL,
    "crosscode": CROSSCODE,
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _can_shut_programs_in():
    try:
        Sandbox().close()
    except SandboxError as error:
        pytest.skip(str(error))


def write(path: Path, rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def task_ids(name: str, rows) -> list[str]:
    tasks = list(BENCHMARKS[name](Settings(shots=Path("/dev/null"))).tasks(rows))
    return [task.id for task in tasks]


def score(tmp_path, capsys, name: str, kind: str, *more) -> dict:
    """The summary of one kind of answers to our own problems of a benchmark."""
    rows = ROWS[name]
    data = write(tmp_path / f"{name}.jsonl", rows)
    known = zip(task_ids(name, rows), rows, strict=True)
    answers = write(tmp_path / "answers.jsonl", [{"task_id": key, "completion": row[kind]} for key, row in known])
    if name == "pal":
        (tmp_path / "shots.md").write_text("Question: 1 + 1?\n\n```python\n...\n```")
        more = (*more, "--shots", tmp_path / "shots.md")
    code, out, err = run(
        capsys, "eval", name, "--data", data, "--completions", answers, "--workers", 2, "--json", *more
    )
    assert code == 0, err
    return json.loads(out)


PROGRAMS = ["humaneval", "leetcode", "pal", "infill", "crosscode"]


@pytest.mark.parametrize("name", PROGRAMS)
def test_right_answers_pass_and_wrong_ones_fail(tmp_path, capsys, name):
    right = score(tmp_path, capsys, name, "right")
    metric = next(iter(right["scores"][""]))
    assert right["num_tasks"] == len(ROWS[name])
    assert right["scores"][""][metric] == 1.0
    wrong = score(tmp_path, capsys, name, "wrong")
    assert wrong["scores"][""][metric] == 0.0
    if name == "humaneval":
        assert wrong["verdicts"] == {"failed": 1, "ended early": 1}


def left_to_the_harness(row: dict) -> dict:
    """A row as OpenAI's own file has it, whose harness calls `check` with the entry point."""
    test, called = row["test"].split("\n\ncheck(")
    return {**row, "test": f"\n\nMETADATA = {{}}\n\n{test}\n", "entry_point": called.removesuffix(")")}


@pytest.mark.parametrize("more", [(), ("--instruct",)])
def test_a_check_function_is_called_by_the_harness(tmp_path, capsys, monkeypatch, more):
    monkeypatch.setitem(ROWS, "humaneval", [left_to_the_harness(row) for row in HUMANEVAL])
    right = [row["prompt"] + row["right"] for row in HUMANEVAL] if more else [row["right"] for row in HUMANEVAL]
    for row, whole in zip(ROWS["humaneval"], right, strict=True):
        row["right"] = whole
    assert score(tmp_path, capsys, "humaneval", "right", *more)["scores"][""]["pass@1"] == 1.0
    wrong = score(tmp_path, capsys, "humaneval", "wrong", *more)
    assert wrong["scores"][""]["pass@1"] == 0.0


@pytest.mark.parametrize(
    ("test", "found"),
    [
        ("def check(c):\n    assert c(1)\n", (True, False)),
        ("def check(c):\n    assert c(1)\n\ncheck(f)", (False, True)),
        ("def check(c):\n    assert c(1)\n\nif True:\n    check(f)", (False, True)),
        ("def check(c):\n    assert c(1)\n\ndef later():\n    check(f)", (True, False)),
        ("def check(c):\n    pass  # assert\n\ncheck(f)", (False, False)),
        ("def check(c):\n    assert c(1\n", (True, True)),
        ("def check(c):\n    assert c(1\ncheck(f)\n", (False, True)),
        ("}\nint main() { check(f); }", (False, True)),
        ("assert f(1)", (False, True)),
        ("numpy.testing.assert_equal(f(1), 2)", (False, True)),
        ("class T(unittest.TestCase):\n    def test(self):\n        self.assertTrue(f(1))\nunittest.main()",
         (False, True)),
        ("x = f(1)\n", (False, False)),
        ("if f(1) != 2:\n    raise ValueError", (False, True)),
        ("", (False, False)),
    ],
)  # fmt: skip
def test_missing_calls_and_assertions_of_a_test_text_are_detected(test, found):
    assert (leaves_check_uncalled(test), asserts(test)) == found


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("humaneval", {"test": "def check(c):\n    assert c(1)"}, "not call check, and no .*'entry_point' .*'prompt'"),
        ("humaneval", {"test": "METADATA = {}\n"}, "asserts nothing, so any answer would pass: 'METADATA"),
        ("mbpp", {"test_list": []}, r"task 11: test_list = \[\]: any answer would pass"),
        ("leetcode", {"test": "my_solution = Solution()"}, "asserts nothing"),
        ("ds1000", {"code_context": "def test_execution(solution):\n    exec(solution)"}, "no test_execution that"),
    ],
)  # fmt: skip
def test_a_row_that_any_answer_would_pass_is_refused(tmp_path, name, row, message):
    data = write(tmp_path / "d.jsonl", [ROWS[name][0], {**ROWS[name][0], **row}])
    with pytest.raises(FormatError, match=f"d.jsonl, line 2: .*{message}"):
        BENCHMARKS[name](Settings()).load(data)


@pytest.mark.parametrize(
    ("answer", "program"),
    [
        ("So:\n```python\ndef solution():\n    return 2\n```\nIt is 2.", "def solution():\n    return 2\n"),
        ("```python\ndef solution():\n    return 2\n", ""),
        ("def solution():\n    return 2\n```", ""),
        ("```python\nx = 2\n```", ""),
    ],
)
def test_a_maths_answer_is_a_closed_block_that_defines_the_solution(answer, program):
    benchmark = BENCHMARKS["pal"](Settings(instruct=True))
    [task, *_] = benchmark.tasks(PAL)
    assert benchmark.source(task, answer).split("\n_value = solution()\n")[0] == program


def test_a_maths_answer_of_none_does_not_pass(tmp_path, capsys, monkeypatch):
    row = {"question": "Who?", "answer": None, "idx": 0, "right": "```python\ndef solution():\n    pass\n```"}
    monkeypatch.setitem(ROWS, "pal", [row])
    assert score(tmp_path, capsys, "pal", "right")["scores"][""]["pass@1"] == 0.0
    with pytest.raises(DataError, match="row 0: an empty answer, with which nothing can be compared"):
        list(BENCHMARKS["pal"](Settings(instruct=True)).tasks([{**row, "answer": " "}]))


def test_mbpp_reference_needs_its_set_up_code(tmp_path, capsys):
    assert score(tmp_path, capsys, "mbpp", "code")["scores"][""]["pass@1"] == 1.0
    assert score(tmp_path, capsys, "mbpp", "wrong")["scores"][""]["pass@1"] == 0.0


def test_ds1000_runs_in_the_rows_context(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(BENCHMARKS["ds1000"], "preload", ("numpy",))
    right = score(tmp_path, capsys, "ds1000", "right")
    assert right["scores"] == {"": {"pass@1": 1.0}, "Numpy": {"pass@1": 1.0}}
    assert score(tmp_path, capsys, "ds1000", "wrong")["scores"][""]["pass@1"] == 0.0


def test_a_chat_answer_is_the_code_block_in_it(tmp_path, capsys):
    assert score(tmp_path, capsys, "leetcode", "chat", "--instruct")["scores"]["Easy"]["pass@1"] == 1.0


def test_a_compiled_language_reports_compile_errors(tmp_path, capsys):
    row = HUMANEVAL_CPP
    data = write(tmp_path / "cpp.jsonl", [{**row, "task_id": kind} for kind in ("right", "wrong", "broken")])
    answers = write(tmp_path / "a.jsonl", [{"task_id": k, "completion": row[k]} for k in ("right", "wrong", "broken")])
    code, out, err = run(capsys, "eval", "humaneval", "--data", data, "--completions", answers, "--out", tmp_path / "o")
    if code == 2 and "not installed" in err:
        pytest.skip(err)
    assert code == 0, err
    assert "humaneval, cpp" in out
    assert "31.1%" in out  # the published 1.3B score of this language
    rows = [json.loads(line) for line in (tmp_path / "o" / "results.jsonl").read_text().splitlines()]
    found = {row["task_id"]: (row["passed"], row["compiled"]) for row in rows}
    assert found == {"right": (True, True), "wrong": (False, True), "broken": (False, False)}


def test_prompts_are_the_published_ones():
    [task] = BENCHMARKS["mbpp"](Settings()).tasks([*SHOTS, *MBPP])
    assert task.prompt.count("You are an expert Python programmer, and here is your task: ") == 4
    assert "Write example 2. Your code should pass these tests:\n\nassert e2() == 2\n[BEGIN]\ndef e2()" in task.prompt
    assert "return 2\n[DONE]\nYou are" in task.prompt
    assert task.prompt.endswith("assert height(root) == 2\n[BEGIN]")
    [task] = BENCHMARKS["mbpp"](Settings(instruct=True)).tasks([*SHOTS, *MBPP])
    assert "assert e4() == 4\n\n>>> Code:\n```python\ndef e4(): return 4\n```\n\nHere is my problem:\n" in task.prompt
    assert task.prompt.endswith(">>> Test Cases:\nassert height(root) == 2\n")
    first, _ = BENCHMARKS["humaneval"](Settings()).tasks(HUMANEVAL)
    assert first.prompt == HUMANEVAL[0]["prompt"].strip()
    asked, _ = BENCHMARKS["humaneval"](Settings(instruct=True)).tasks(HUMANEVAL)
    assert asked.prompt.startswith("Please continue to complete the function.")
    assert asked.prompt.endswith('""" Adds them up.\n    """\n```')
    [without], [given] = (
        BENCHMARKS["crosscode"](Settings(retrieval=retrieval)).tasks(CROSSCODE) for retrieval in (False, True)
    )
    assert (without.context, given.context_title[:7]) == ((), "# Here ")
    assert given.context == ("# the below code fragment is found in shop.py\n# class Item:\n#     pass\n\n",)


def test_mbpp_asks_tasks_11_to_510_of_a_file_that_has_the_examples():
    rows = [{**MBPP[0], "task_id": number} for number in (1, 2, 3, 4, 10, 11, 510, 511)]
    asked = [[task.id for task in BENCHMARKS["mbpp"](Settings()).tasks(part)] for part in (rows, rows[2:])]
    assert asked == [["11", "510"], ["3", "4", "10", "11", "510", "511"]]


def test_mbpp_in_chat_strips_its_texts_and_runs_without_the_imports():
    rows = [*({**shot, "code": "if 1:\r\n\tx = 1"} for shot in SHOTS), {**MBPP[0], "text": " Measure.  "}]
    programs, prompts = {}, {}
    for instruct in (False, True):
        benchmark = BENCHMARKS["mbpp"](Settings(instruct=instruct))
        [task] = benchmark.tasks(rows)
        prompts[instruct] = task.prompt
        programs[instruct] = benchmark.source(task, "x = 1")
        assert benchmark.stops_of(task) == (() if instruct else ("[DONE]",))
        assert "\nif 1:\n    x = 1\n" in task.prompt
    assert "your task:  Measure.   Your" in prompts[False]
    assert ">>> Problem:\nMeasure.\n>>>" in prompts[True]
    rest = "\n".join(["x = 1", MBPP[0]["test_setup_code"], *MBPP[0]["test_list"]])
    assert programs == {False: f"{PYTHON_IMPORTS}\n{rest}", True: rest}


@pytest.mark.parametrize(
    ("row", "question", "answer"),
    [
        ({"problem": "p", "solution": "$\\boxed{1}$, so $\\boxed{x=.5}$"}, "p", "0.5"),
        ({"question": "q", "answer": "12%", "table": "t", "ans_type": "decimal_number"},
         "Read the following table and answer a question:\nt\nq", "0.12"),
        ({"input": "q", "code": "c", "target": 12.5}, "q", "12.5"),
        ({"body": "Two. ", "question": " How many?", "answer": "2 (ducks)"}, "Two. How many?", "2"),
        ({"Body": "Two", "Question": "How many? ", "Answer": 2.0}, "Two. How many?", "2"),
        ({"question": "q", "answer": "x #### 1,200"}, "q", "1,200"),
        ({"problem": "p", "solution": "a \\boxed{\\sqrt 2}. b", "level": "1"}, "p", "\\sqrt{2}"),
        ({"problem": "p", "solution": "$\\boxed{x = \\frac12\\text{ m}}$"}, "p", "\\frac{1}{2}"),
        ({"question": "q", "answer": "1/4", "table": "a | 1", "ans_type": "decimal_number", "table_title": "Rain",
          "choices": None}, 'Read the following table regarding "Rain" and answer a question:\na | 1\nq', "0.25"),
        ({"question": "q", "answer": "No", "table": "a | 1", "ans_type": "boolean_text", "choices": ["Yes", "No"]},
         ("Read the following table and answer a question:\na | 1\nq Please select from the following options: ['Yes', "
         "'No']"), "No"),
    ],
)  # fmt: skip
def test_the_maths_sets_are_recognized_by_their_fields(row, question, answer):
    assert question_and_answer(row, 0) == (question, answer)


def test_a_row_of_an_unknown_maths_set_is_named():
    with pytest.raises(DataError, match=r"row 3: no question.*\['text'\]"):
        question_and_answer({"text": "x"}, 3)


@pytest.mark.parametrize(("samples", "right"), [(5, 0), (5, 2), (5, 5), (4, 1), (10, 7)])
def test_pass_at_k_is_the_share_of_draws_that_hold_a_right_answer(samples, right):
    marks = [True] * right + [False] * (samples - right)
    for k in range(1, samples + 1):
        draws = list(itertools.combinations(marks, k))
        assert pass_at_k(samples, right, k) == pytest.approx(sum(map(any, draws)) / len(draws))


def test_cuts_blocks_statements_and_similarity():
    assert cut("abc\ndef x", ("\ndef", "c")) == "ab"
    assert code_block("x\n```python\na = 1\n```\ny", "python") == "a = 1\n"
    assert code_block("x\n```Python\na\n```\n```python\nb\n```", "python") == "a\n"
    assert code_block("x\n```python\na\n", "python") is None
    assert code_block("x\n```\na\n```", "python") is None
    assert edit_similarity("abcd", "abxd") == 0.75


@pytest.mark.parametrize(
    ("language", "prompt", "answer", "statement"),
    [
        ("python", "x = ", "f(a,\n  b)\ng()", "f(a,\n  b)"),
        ("python", "", "\nx = 1  \ny", "\nx = 1"),
        ("python", "x = (", "\n1", "\n1"),
        ("java", "foo.", "bar(1); // why\nreturn;", "bar(1);"),
        ("ts", "if (", "open) {\n  shut();\n}", "open) {"),
        ("cs", "x", ";y;", ";y;"),
    ],
)
def test_the_statement_that_counts_is_the_published_one(language, prompt, answer, statement):
    assert first_statement(prompt, answer, language) == statement


def test_comments_and_blank_lines_do_not_count_and_edit_similarity_is_in_whole_percent():
    [task] = BENCHMARKS["crosscode"](Settings(language="typescript")).tasks([
        {"prompt": "go(", "groundtruth": "  away, // far\n\n now);", "metadata": {"file": "a/b.ts"}}
    ])  # fmt: skip
    assert task.row["language"] == "ts"
    benchmark = BENCHMARKS["crosscode"](Settings(language="ts"))
    assert benchmark.scores(task, "away,\nnow); // soon") == {"exact_match": 1.0, "edit_similarity": 0.88}
    assert benchmark.scores(replace(task, row={"groundtruth": "abc"}), "abd")["edit_similarity"] == 0.67
    with pytest.raises(ConfigError, match="--language rust: crosscode has python, java, ts, cs"):
        BENCHMARKS["crosscode"](Settings(language="rust"))
    [unknown] = BENCHMARKS["crosscode"](Settings()).tasks([
        {"prompt": "go(", "groundtruth": "now)", "metadata": {"file": "a/b.kt"}}
    ])  # fmt: skip
    assert unknown.row["language"] == ".kt", "which is refused as --language is, not judged as Python"


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        ("x = 1\n```\nIt adds.\n```python\nprint()\n```", "x = 1\n"),
        ("```python\nx = 1\n```\n</code>", "\nx = 1\n"),
        ("<code>x = 1\nEND SOLUTION\nmore", "x = 1"),
    ],
)
def test_a_data_science_answer_ends_at_its_fence(answer, code):
    [task] = BENCHMARKS["ds1000"](Settings()).tasks(DS1000)
    assert f"code = {code!r}\n" in BENCHMARKS["ds1000"](Settings()).source(task, answer)


def test_a_data_science_program_checks_the_text_of_a_solution_where_the_row_does():
    [task] = BENCHMARKS["ds1000"](Settings()).tasks(
        [{**DS1000[0], "code_context": f"{DS1000[0]['code_context']}\ndef test_string(solution): ..."}]
    )
    assert BENCHMARKS["ds1000"](Settings()).source(task, "x").endswith("\ntest_execution(code)\ntest_string(code)\n")


def test_base_models_have_the_published_limits_and_stops(monkeypatch):
    found = {name: benchmark(Settings()) for name, benchmark in BENCHMARKS.items()}
    limits = {
        name: (found.max_new_tokens, found.max_prompt_tokens, getattr(found, "seconds", None))
        for name, found in found.items()
    }
    assert limits == {
        "humaneval": (500, 4096, 10.0), "mbpp": (500, 4096, 10.0), "leetcode": (1024, 3072, 10.0),
        "ds1000": (512, 2048, 60.0), "pal": (512, 2048, 5.0), "infill": (64, None, None),
        "crosscode": (50, 1998, None),
    }  # fmt: skip
    monkeypatch.setattr(BENCHMARKS["humaneval"], "_language", "python")
    task = Task(id="t", prompt="", row={"stop_tokens": ["\n}"]})
    top_level = ("\ndef", "\nclass", "\nif", "\n#", "\nprint")
    assert {name: benchmark.stops_of(task) for name, benchmark in found.items()} == {
        "humaneval": top_level, "mbpp": ("[DONE]",), "leetcode": (*top_level, "\n```", "\nmy_solution"),
        "ds1000": ("</code>", "# SOLUTION END", "\nEND SOLUTION"), "pal": ("Question", "----------------"),
        "infill": ("\n",), "crosscode": (),
    }  # fmt: skip
    monkeypatch.setattr(BENCHMARKS["humaneval"], "_language", "ts")
    assert found["humaneval"].stops_of(task)[:3] == ("\n}", "\nexport", "\nimport")
    monkeypatch.setattr(BENCHMARKS["humaneval"], "_language", "cpp")
    assert found["humaneval"].stops_of(task) == ("\n}",)


def test_chat_has_limits_of_its_own():
    limits = {
        (name, instruct): (found.max_new_tokens, found.seconds)
        for name in ("humaneval", "mbpp", "leetcode")
        for instruct in (False, True)
        for found in [BENCHMARKS[name](Settings(instruct=instruct))]
    }
    assert limits == {
        ("humaneval", False): (500, 10.0), ("humaneval", True): (1024, 3.0), ("mbpp", False): (500, 10.0),
        ("mbpp", True): (512, 10.0), ("leetcode", False): (1024, 10.0), ("leetcode", True): (1024, 10.0),
    }  # fmt: skip


def test_a_chat_answer_to_humaneval_keeps_its_function_alone():
    benchmark = BENCHMARKS["humaneval"](Settings(instruct=True))
    [_, task] = benchmark.tasks(HUMANEVAL)
    answer = "```python\nimport os\n\ndef helper():\n    pass\n\ndef double(x):\n    return x * 2\n```\nSo."
    program = benchmark.source(task, answer)
    assert "helper" not in program
    assert program.endswith("\ndef double(x):\n    return x * 2\n\n\n" + HUMANEVAL[1]["test"])
    unclosed = benchmark.source(task, "```python\ndef double(x):\n    return x * 2\n")
    assert HUMANEVAL[1]["prompt"] + "\n```python\n" in unclosed


def test_a_chat_answer_in_a_compiled_language_loses_its_main_and_the_brace_that_the_tests_close(monkeypatch):
    monkeypatch.setattr(BENCHMARKS["humaneval"], "_language", "cpp")
    benchmark = BENCHMARKS["humaneval"](Settings(instruct=True))
    twice = "long twice(long x) {\n    return again(x);\n}\n\nlong again(long x) {\n    return 2 * x;"
    answer = f"```cpp\n{twice}\n}}\n\nint main() {{\n    return 0;\n}}\n```"
    function = f"\n// Twice x.\n{twice}"
    for test, closing in ((HUMANEVAL_CPP["test"], ""), ("int main() {}", "\n}")):
        [task] = benchmark.tasks([{**HUMANEVAL_CPP, "test": test}])
        assert benchmark.source(task, answer).endswith(f"{function}{closing}\n\n{test}")


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        ("Text\n```python\nclass Solution:\n    pass\n```\nmore", "class Solution:\n    pass"),
        ("class Solution:\n    pass\n\nprint(1)", "class Solution:\n    pass\n"),
        ("\n        return a + b", "class Solution:\n    def add(self, a, b):\n\n        return a + b"),
        ("```python\nclass Solution:\n    pass", "```python\nclass Solution:\n    pass"),
        ("[PYTHON]\nclass Solution:\n    pass\n[/PYTHON]", "class Solution:\n    pass"),
    ],
)
def test_a_chat_answer_to_leetcode_is_read_as_published(answer, code):
    benchmark = BENCHMARKS["leetcode"](Settings(instruct=True))
    [task] = benchmark.tasks(LEETCODE)
    assert benchmark.source(task, answer).split("from functools import *\n")[1] == f"{code}\n{LEETCODE[0]['test']}"


def test_an_evaluation_resumes(tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    score(tmp_path, capsys, "humaneval", "right", "--out", out)
    lines = (out / "results.jsonl").read_text()
    (out / "results.jsonl").write_text(lines[: lines.index("\n") + 20])  # the second line is cut off, as by a crash
    ran = []
    real = Sandbox.run
    monkeypatch.setattr(Sandbox, "run", lambda self, programs: real(self, (ran.append(p[0]) or p for p in programs)))
    again = score(tmp_path, capsys, "humaneval", "right", "--out", out)
    assert len(ran) == 1
    assert again["scores"][""]["pass@1"] == 1.0
    assert [json.loads(line)["passed"] for line in (out / "results.jsonl").read_text().splitlines()] == [True, True]
    assert json.loads((out / "summary.json").read_text()) == again
    data, answers = tmp_path / "humaneval.jsonl", tmp_path / "answers.jsonl"
    words = ["eval", "humaneval", "--data", data, "--completions", answers, "--seconds", 3, "--out", out]
    code, _, err = run(capsys, *words)
    assert code == 2
    assert "made with seconds = 'None', now '3.0'; choose another --out" in err


def test_scores_of_an_earlier_protocol_are_not_mixed_with_new_ones(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(BENCHMARKS["infill"], "protocol", 1)
    score(tmp_path, capsys, "infill", "right", "--out", tmp_path / "out")
    monkeypatch.undo()
    words = [
        "--data",
        tmp_path / "infill.jsonl",
        "--completions",
        tmp_path / "answers.jsonl",
        "--out",
        tmp_path / "out",
    ]
    code, _, err = run(capsys, "eval", "infill", *words)
    assert code == 2
    assert "settings.json: made with protocol = 1, now 2; choose another --out" in err


@pytest.mark.parametrize(
    ("missing", "found"),
    [("protocol", "made with protocol = None, now 2"), ("data", r"made with --data .* \(None\), now")],
)
def test_scores_made_without_a_setting_of_today_are_not_reused(tmp_path, capsys, missing, found):
    score(tmp_path, capsys, "infill", "right", "--out", tmp_path / "out")
    path = tmp_path / "out" / "settings.json"
    settings = json.loads(path.read_text())
    del (settings["contents"] if missing in settings["contents"] else settings)[missing]
    path.write_text(json.dumps(settings))
    words = ["--data", tmp_path / "infill.jsonl", "--completions", tmp_path / "answers.jsonl"]
    code, _, err = run(capsys, "eval", "infill", *words, "--out", tmp_path / "out")
    assert code == 2
    assert re.search(found, err)


def test_scores_made_before_an_option_existed_are_reused_until_it_is_set(tmp_path, capsys):
    score(tmp_path, capsys, "infill", "right", "--out", tmp_path / "out")
    path = tmp_path / "out" / "settings.json"
    settings = json.loads(path.read_text())
    assert settings.pop("spm") == "False"
    path.write_text(json.dumps(settings))
    words = ["--data", tmp_path / "infill.jsonl", "--completions", tmp_path / "answers.jsonl"]
    assert run(capsys, "eval", "infill", *words, "--out", tmp_path / "out")[0] == 0
    with pytest.raises(ConfigError, match=r"made with spm = None, now 'True'; choose another --out"):
        keep_settings(tmp_path / "out", settings | {"spm": "True"}, has_lines=lambda: True)


def exported_model(tmp_path, *, seed: int = 0) -> Path:
    """A Hugging Face folder of 320 positions, not trained."""
    tokenizer = make_tokenizer()
    tokenizer.save(tmp_path / "tokenizer")
    model = make_model(tokenizer)
    init_weights(model, seed=seed)
    export_model(model, tmp_path / "model", tokenizer_folder=tmp_path / "tokenizer")
    return tmp_path / "model"


@pytest.mark.parametrize("name", ["humaneval.jsonl", "answers.jsonl", "shots.md"])
def test_scores_of_a_changed_file_are_not_reused(tmp_path, capsys, name):
    benchmark, option = {
        "humaneval.jsonl": ("humaneval", "data"), "answers.jsonl": ("humaneval", "completions"),
        "shots.md": ("pal", "shots"),
    }[name]  # fmt: skip
    score(tmp_path, capsys, benchmark, "right", "--out", tmp_path / "out")
    words = ["eval", benchmark, "--data", tmp_path / f"{benchmark}.jsonl", "--completions", tmp_path / "answers.jsonl"]
    words += ["--shots", tmp_path / "shots.md"] * (benchmark == "pal") + ["--out", tmp_path / "out", "--json"]
    (tmp_path / name).write_text((tmp_path / name).read_text() + "\n")
    code, out, err = run(capsys, *words)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert f"settings.json: made with --{option} {tmp_path / name} (sha256 " in err
    assert err.endswith(f"; choose another --out, or remove {tmp_path / 'out'}\n")


def test_scores_are_not_reused_for_another_model_at_the_same_path(tmp_path, capsys):
    data, model, start = write(tmp_path / "d.jsonl", INFILL), exported_model(tmp_path), tmp_path / "start"
    assert run(capsys, "checkpoint", "import", model, start)[0] == 0
    [step] = (start / "checkpoints").glob("step-*")
    words = ["eval", "infill", "--data", data, "--max-new-tokens", "4", "--model"]
    for folder, out in ((model, "of-folder"), (start, "of-run"), (step, "of-run")):
        code, _, err = run(capsys, *words, folder, "--out", tmp_path / out)
        assert code == 0, err
        assert ("results exist already" in err) == (folder == step)
    exported_model(tmp_path, seed=1)
    shutil.rmtree(start)
    assert run(capsys, "checkpoint", "import", model, start)[0] == 0
    for folder, out, found in ((model, "of-folder", "sha256 "), (start, "of-run", f"{step.name}, sha256 ")):
        code, _, err = run(capsys, *words, folder, "--out", tmp_path / out)
        assert code == 2
        assert f"made with --model {folder} ({found}" in err


def test_a_pipe_cannot_be_resumed_from():
    with pytest.raises(ConfigError, match="--completions /dev/null: not a file, so nothing can tell later"):
        file_content(Path("/dev/null"), option="--completions")


def test_settings_that_wrote_nothing_may_change(tmp_path, capsys):
    data, model, out = write(tmp_path / "d.jsonl", HUMANEVAL[:1]), exported_model(tmp_path), tmp_path / "out"
    words = ["eval", "humaneval", "--data", data, "--model", model, "--out", out]
    code, _, err = run(capsys, *words)
    assert code == 2
    assert "500 new tokens leave no room for a prompt in the model's 320 positions; lower --max-new-tokens" in err
    code, _, err = run(capsys, *words, "--max-new-tokens", 8)
    assert code == 0, err
    code, _, err = run(capsys, *words, "--max-new-tokens", 9)
    assert code == 2
    assert "made with max_new_tokens = '8', now '9'" in err
    code, _, err = run(capsys, *words, "--max-new-tokens", 8, "--top-k", 2)
    assert code == 2
    assert "made with top_k = '0', now '2'" in err


def test_several_samples_of_a_task(tmp_path, capsys):
    data = write(tmp_path / "d.jsonl", HUMANEVAL[:1])
    texts = [HUMANEVAL[0]["right"]] + [HUMANEVAL[0]["wrong"]] * 3
    answers = write(tmp_path / "a.jsonl", [{"task_id": "Own/0", "completion": text} for text in texts])
    code, out, _ = run(capsys, "eval", "humaneval", "--data", data, "--completions", answers, "--json")
    summary = json.loads(out)
    assert (code, summary["num_samples"], summary["scores"][""]) == (0, 4, {"pass@1": 0.25})


def test_a_summary_has_every_k_up_to_the_number_of_samples():
    tasks, notes = [Task(id=name, prompt="") for name in "ab"], Notes(None)
    for task in tasks:
        for sample in range(10):
            notes.add_result((task.id, sample), {"passed": task.id == "a" and sample == 3, "verdict": "v"})
    found = summarize(tasks, notes, samples=10)
    assert found.scores == {"": {"pass@1": pytest.approx(0.05), "pass@10": 0.5}}
    assert (found.num_tasks, found.num_samples, found.verdicts) == (2, 10, {"v": 20})


def test_tasks_of_fewer_samples_than_others_are_named(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"task_id": name, "completion": "x"} for name in "aab"])
    with pytest.raises(DataError, match="1 completions of task 'b', but 2 of others"):
        FileSource(path).check([Task(id=name, prompt="") for name in "ab"])


class FakeServer(BaseHTTPRequestHandler):
    """Answers like a server of OpenAI's interface; every first try of a prompt fails with 503."""

    seen: list[dict] = []  # noqa: RUF012  (of the server, as its handlers live for one request)

    def do_GET(self):
        self.answer({"data": [{"id": "some-model"}]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        tried = any(other == body for other in self.seen)
        self.seen.append(body)
        if not tried:
            self.send_error(503)
            return
        asked = body["messages"][0]["content"] if "messages" in body else body["prompt"]
        text = next(row["right"] for row in HUMANEVAL if row["prompt"].split("def ")[1][:6] in asked)
        choice = {"message": {"content": text}} if "messages" in body else {"text": text}
        self.answer({"choices": [choice]})

    def answer(self, value):
        data = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *words):
        pass


def test_a_server_is_scored(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("megacoder.evaluate.benchmarks.endpoint.time.sleep", lambda seconds: None)
    server = ThreadingHTTPServer(("127.0.0.1", 0), FakeServer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    data = write(tmp_path / "d.jsonl", HUMANEVAL)
    url = f"http://127.0.0.1:{server.server_port}"
    try:
        code, out, err = run(capsys, "eval", "humaneval", "--data", data, "--endpoint", url, "--json")
    finally:
        server.shutdown()
        server.server_close()
    assert code == 0, err
    assert json.loads(out)["scores"][""]["pass@1"] == 1.0
    asked = FakeServer.seen[0]
    assert (asked["model"], asked["max_tokens"], asked["temperature"]) == ("some-model", 500, 0.0)
    assert asked["stop"] == ["\ndef", "\nclass", "\nif", "\n#"]
    assert len(FakeServer.seen) == 4


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (None, "/models: no answer in 0 s; is an OpenAI-compatible server running there?"),
        (b"SSH-2.0-here\r\n", "/models: SSH-2.0-here; is the server running?"),
        (b"HTTP/1.1 404 Not Found\r\nContent-Length: 4\r\n\r\ngone", "/models: 404 Not Found: gone"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n[]", "/models: no model in []; name one (--api-model)"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n{", "is the server running?"),
        (b"", "is the server running?"),
    ],
)
def test_an_address_without_a_model_server_gives_one_line(tmp_path, capsys, monkeypatch, answer, message):
    monkeypatch.setattr("megacoder.evaluate.benchmarks.endpoint.time.sleep", lambda seconds: None)
    monkeypatch.setattr("megacoder.evaluate.benchmarks.endpoint._MODELS_SECONDS", 0.3 if answer is None else 60.0)
    data, open_until_the_end = write(tmp_path / "d.jsonl", HUMANEVAL), []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve():
            while True:
                try:
                    channel, _ = server.accept()
                except OSError:
                    return
                open_until_the_end.append(channel)
                if answer is not None:
                    channel.recv(4096)
                    channel.sendall(answer)
                    channel.shutdown(socket.SHUT_RDWR)

        threading.Thread(target=serve, daemon=True).start()
        url = f"http://127.0.0.1:{server.getsockname()[1]}/v1"
        code, out, err = run(capsys, "eval", "humaneval", "--data", data, "--endpoint", url)
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert err.startswith(f"megacoder: {url}/models: ")
    assert message in err


def test_lines_not_written_by_an_evaluation_are_named(tmp_path, capsys):
    out = tmp_path / "out"
    score(tmp_path, capsys, "infill", "right", "--out", out)
    for name, line in (("completions.jsonl", "{}"), ("results.jsonl", "?")):
        kept = (out / name).read_text()
        (out / name).write_text(f"{kept}{line}\n")
        words = ["eval", "infill", "--data", tmp_path / "infill.jsonl", "--completions", tmp_path / "answers.jsonl"]
        code, _, err = run(capsys, *words, "--out", out)
        assert (code, err.count("\n")) == (1, 1)
        assert f"{name}, line 2: not a line that an evaluation wrote" in err
        (out / name).write_text(kept)


@pytest.mark.parametrize("language", OWN_LANGUAGES)
def test_right_and_wrong_answers_in_each_language(language):
    try:
        toolchain = find_toolchain(language)
    except ConfigError as error:
        pytest.skip(str(error))  # names the missing tools
    benchmark = BENCHMARKS["humaneval"](Settings(language=language))
    programs = {}
    for task in benchmark.tasks(own_problems(language)[:2]):
        assert cut(task.row["right"].rstrip(), benchmark.stops_of(task)) == task.row["right"].rstrip()
        for kind in ("right", "wrong"):
            programs[task.id, kind] = benchmark.program(task, task.row[kind], toolchain)
    assert len(programs) == 4
    with Sandbox(workers=2, tools=toolchain.visible) as sandbox:
        for (problem, kind), outcome in sandbox.run(programs.items()):
            assert outcome.passed == (kind == "right"), (problem, kind, outcome)
            assert outcome.step == len(toolchain.language.compile[:1]), (problem, kind, outcome)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("humaneval --data gone.jsonl --completions a.jsonl", "gone.jsonl: not readable: No such file"),
        ("humaneval --data bad.jsonl --completions a.jsonl", "bad.jsonl, line 2: malformed JSON"),
        ("mbpp --data d.jsonl --completions a.jsonl", "d.jsonl, line 1: no field 'text' (str)"),
        ("humaneval --data d.jsonl --completions some.jsonl", "0 completions of task 'Own/1', but 1 of others"),
        ("humaneval --data d.jsonl --completions unknown.jsonl", "task_id 'x' is not in the data"),
        ("humaneval --data d.jsonl", "exactly one of --model, --endpoint, --completions"),
        ("humaneval --data d.jsonl --completions a.jsonl --language cobol", "language 'cobol': not one of python"),
        ("humaneval --data d.jsonl --endpoint http://localhost:1/v1 --spm", "--spm: only for eval infill, where a"),
        ("infill --data i.jsonl --completions a.jsonl --spm", "--spm: only for eval infill, where a --model or"),
        ("humaneval --data d.jsonl --endpoint nowhere", "--endpoint nowhere: expected an address"),
        ("humaneval --data d.jsonl --model x --samples 3", "--samples 3: greedy answers are all the same"),
        ("humaneval --data d.jsonl --completions a.jsonl --workers 0", "--workers 0: must be at least 1"),
        ("humaneval --data d.jsonl --endpoint http://localhost:1/v1 --top-p 2", "top_p = 2.0: must be above 0"),
        ("humaneval --data d.jsonl --endpoint http://localhost:1/v1 --top-k 5", "--top-k 5: OpenAI's interface has no"),
        ("humaneval --data d.jsonl --model x --tp 0", "--tp 0: must be at least 1"),
        (
            "humaneval --data d.jsonl --completions a.jsonl --tp 2",
            "--tp 2: only a --model can be shared by processes, not completions",
        ),
        ("pal --data p.jsonl --completions a.jsonl", "pal needs --shots FILE"),
        ("humaneval --data d.jsonl --completions a.jsonl --out d.jsonl", "d.jsonl"),
        ("humaneval --data d.jsonl --completions none.jsonl", "none.jsonl: no completions in it"),
        ("humaneval --data d.jsonl --endpoint http://localhost:x/v1", "--endpoint http://localhost:x/v1: expected an"),
        ("humaneval --data sh.jsonl --completions sh.jsonl", "sh: sh.jsonl needs a shelf, not installed here"),
        ("mbpp --data tests.jsonl --completions a.jsonl", "task 1: test_list = [3]: expected a list of texts"),
        ("infill --data i.jsonl --model torn", "torn/config.json: not readable as JSON"),
        (
            "infill --data i.jsonl --model bare",
            "bare: no tokenizer.json in it; name a folder that has one with --tokenizer",
        ),
        (
            "humaneval --data d.jsonl --completions a.jsonl --out torn",
            "torn/settings.json: not an evaluation's settings",
        ),
    ],
)
def test_bad_input_is_one_line(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "d.jsonl", HUMANEVAL)
    write(tmp_path / "p.jsonl", PAL)
    (tmp_path / "bad.jsonl").write_text(json.dumps(HUMANEVAL[0]) + "\n{oops\n")
    write(tmp_path / "a.jsonl", [{"task_id": f"Own/{n}", "completion": "x"} for n in range(2)])
    write(tmp_path / "some.jsonl", [{"task_id": "Own/0", "completion": "x"}])
    write(tmp_path / "unknown.jsonl", [{"task_id": "x", "completion": "x"}])
    write(tmp_path / "none.jsonl", [])
    write(tmp_path / "tests.jsonl", [{**MBPP[0], "task_id": 1, "test_list": [3]}])
    write(tmp_path / "i.jsonl", INFILL)
    shelf = Library(mention="shelf", install="a shelf", is_there=lambda paths: False)
    monkeypatch.setitem(LANGUAGES, "sh", replace(LANGUAGES["sh"], libraries=(shelf,)))
    row = {"task_id": "s", "language": "sh", "prompt": "f() {\n", "test": "}\n. shelf", "completion": ":"}
    write(tmp_path / "sh.jsonl", [row])
    for folder, config in (("torn", "{"), ("bare", '{"architectures": ["LlamaForCausalLM"]}')):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config.json").write_text(config)
    (tmp_path / "torn" / "settings.json").write_text("[]")
    code, out, err = run(capsys, "eval", *words.split())
    assert code != 0
    assert out == ""
    assert message in err
    assert err.startswith("megacoder: ")
    assert err.count("\n") == 1


def test_a_field_of_another_type_is_named(tmp_path):
    data = write(tmp_path / "d.jsonl", [{**HUMANEVAL[0], "task_id": 7}])
    with pytest.raises(FormatError, match=r"line 1: 7 as field 'task_id' \(str\)"):
        BENCHMARKS["humaneval"](Settings()).load(data)


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_data_and_answers_may_be_compressed(tmp_path, capsys, suffix):
    plain = score(tmp_path, capsys, "crosscode", "right")
    words = ["eval", "crosscode", "--json"]
    for option, name in (("--data", "crosscode.jsonl"), ("--completions", "answers.jsonl")):
        compress = {".gz": gzip.compress, ".zst": zstandard.compress}[suffix]
        (tmp_path / (name + suffix)).write_bytes(compress((tmp_path / name).read_bytes()))
        words += [option, tmp_path / (name + suffix)]
    code, out, err = run(capsys, *words)
    assert code == 0, err
    assert json.loads(out) == plain
    (tmp_path / ("answers.jsonl" + suffix)).write_bytes(b"no such format")
    code, _, err = run(capsys, *words)
    assert (code, err.count("\n")) == (1, 1)
    assert f"answers.jsonl{suffix}: not readable: " in err


def test_scoring_answers_imports_nothing_slow(tmp_path, capsys):
    score(tmp_path, capsys, "humaneval", "right")
    words = ["eval", "humaneval", "--data", "humaneval.jsonl", "--completions", "answers.jsonl", "--json"]
    for argv in (["--help"], ["eval", "humaneval", "--help"], words):
        code = f"import sys; from megacoder.cli.main import main; main({argv})"
        done = subprocess.run(
            [sys.executable, "-X", "importtime", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True,
            env={**os.environ, "PYTHONPATH": ":".join(sys.path)},
        )  # fmt: skip
        imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
        assert imported >= {"megacoder.cli.main"}
        assert not imported & {"torch", "pyarrow", "rich", "typeguard"}


def test_published_scores_are_those_of_the_paper():
    assert published_scores("humaneval", language="java")["33B base"] == {"": 51.9}
    assert published_scores("humaneval", language="cpp")["5.7B base"] == {"": 45.3}
    assert published_scores("humaneval", language="lua") == {}
    assert published_scores("crosscode", language="cs", retrieval=True) == {"6.7B base": {"": 16.23}}
    assert published_scores("leetcode") == {}
    assert published_scores("pal", subset="tabmwp")["6.7B base"] == {"": 67.9}
    assert published_scores("pal", subset="") == {}
    for scores in published_scores("ds1000").values():
        assert set(scores) == {"Matplotlib", "Numpy", "Pandas", "Pytorch", "Scipy", "Sklearn", "Tensorflow", ""}


@pytest.mark.parametrize("name", ["humaneval", "mbpp", "pal", "infill", "crosscode", "ds1000"])
@pytest.mark.parametrize("kind", ["base", "instruct"])
def test_models_are_compared_with_those_of_their_kind(name, kind):
    found = published_scores(name, language="python", subset="gsm8k", instruct=kind == "instruct")
    assert all(model.endswith(kind) for model in found)
    assert found or kind == "instruct"


@pytest.mark.parametrize(
    ("row", "name"),
    [
        ({"question": "q", "answer": "so #### 3"}, "gsm8k"), ({"problem": "p", "solution": "s", "level": "1"}, "math"),
        ({"input": "q", "code": "c", "target": 3.0}, "gsm-hard"), ({"input": "q", "target": 3, "type": "t"}, "mawps"),
        ({"Body": "b", "Question": "q", "Answer": 3.0}, "svamp"),
        ({"body": "b", "question": "q", "answer": "3 (m)", "formula": "f"}, "asdiv"),
        ({"question": "q", "answer": "3", "table": "t"}, "tabmwp"), ({"question": "q", "answer": "3"}, ""),
    ],
)  # fmt: skip
def test_maths_sets_are_told_apart_by_their_fields(row, name):
    assert set_of(row) == name


def test_scores_of_maths_stand_beside_those_of_the_set(tmp_path, capsys):
    data = write(tmp_path / "pal.jsonl", [{"question": "How many?", "answer": "Two. #### 2", "idx": 0}])
    answer = "```python\ndef solution():\n  return 2\n```"
    answers = write(tmp_path / "a.jsonl", [{"task_id": "0", "completion": answer}])
    words = ["eval", "pal", "--data", data, "--completions", answers]
    (tmp_path / "shots.md").write_text("Question: none\n")
    code, out, err = run(capsys, *words, "--shots", tmp_path / "shots.md")
    assert code == 0, err
    assert "43.2%" in out
    code, out, err = run(capsys, *words, "--instruct")
    assert code == 0, err
    assert "DeepSeek-Coder" not in out
