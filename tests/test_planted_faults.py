"""`tools/check_benchmarks.py`: faults are planted where intended, and the check notices what is wrong."""

import json
import sys

import check_benchmarks
import pytest
from evaluation_problems import HUMANEVAL, HUMANEVAL_CPP, MBPP
from planted_faults import EMPTY, faulty_programs, rewritten
from recited_answers import recited_answer

from megacoder.evaluate.sandbox.host import Sandbox, SandboxError
from megacoder.evaluate.sandbox.languages import installed_languages

SOURCE = """
def helper(x):
    return x == 3

def f(x):
    # a comment
    def inner():
        return 5
    if x < 2:
        return inner()
    return x
"""


def test_faults_are_only_in_functions_that_the_tests_name():
    programs = faulty_programs(SOURCE, "assert f(3) == 3")
    found = {}
    for fault, program in programs.items():
        space = {}
        exec(program, space)
        assert space["helper"](3) is True
        found[fault] = [space["f"](x) for x in (1, 3)]
    assert found == {
        EMPTY: [None, None],
        "results are negated": [False, False],
        "results are in a list": [[5], [3]],
        "a comparison is the opposite": [1, 5],
        "a whole number is one more": [6, 3],
    }
    assert "#" not in rewritten(SOURCE)


def test_no_fault_without_a_place_for_it():
    assert set(faulty_programs("def f(x):\n    x.sort()", "f(y)")) == {EMPTY}
    assert faulty_programs("def f(x):\n    return 1", "g()") == {}


def test_answers_are_recited_from_the_tests():
    row = {"test": 'assert.deepEqual(candidate("(", [1]),[2, ")"]);\n  assert.deepEqual(candidate(2),undefined);\n'}
    body = recited_answer(row, "js", right=True)
    assert [line.strip() for line in body.splitlines()[2:4]] == [
        'if (call === 0) return [2, ")"];', "if (call === 1) return undefined;",
    ]  # fmt: skip
    assert "if (call === 0) return undefined;" in recited_answer(row, "js", right=False)
    assert recited_answer({"test": "assert.deepEqual(candidate(1),2);"}, "js", right=False) is None
    assert 'return std::string("a");' in recited_answer({"test": 'assert(candidate(1) == "a");'}, "cpp", right=True)
    assert recited_answer({"test": "assert(candidate(1) < 2);"}, "cpp", right=True) is None


@pytest.fixture
def check(tmp_path, monkeypatch):
    """The tool on files of these rows: its exit code and what it counted."""
    try:
        Sandbox().close()
    except SandboxError as error:
        pytest.skip(str(error))

    def run(**files) -> tuple[int, dict]:
        words = ["check_benchmarks.py", "--out", str(tmp_path / "out.json")]
        for option, rows in files.items():
            path = tmp_path / f"{option}.jsonl"
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
            words += [f"--{option}", str(path)]
        monkeypatch.setattr(sys, "argv", words)
        try:
            check_benchmarks.main()
            code = 0
        except SystemExit as stop:
            code = stop.code
        return code, json.loads((tmp_path / "out.json").read_text())["results"]

    return run


def test_right_solutions_pass_and_faults_fail(check, capsys):
    solved = [row | {"canonical_solution": row["right"]} for row in HUMANEVAL]
    code, results = check(humaneval=solved, mbpp=MBPP)
    assert code == 0
    assert results["MBPP"][check_benchmarks.AS_THEY_ARE] == {"programs": 1, "passed": 1}
    assert results["HumanEval, python"]["a whole number is one more"] == {"programs": 1, "passed": 0}
    for counts in (results["MBPP"], results["HumanEval, python"]):
        for kind, count in counts.items():
            assert count["passed"] == (count["programs"] if kind in check_benchmarks.MUST_PASS else 0)
    assert "2 of 2 pass" in capsys.readouterr().out


def test_a_wrong_solution_and_a_blind_test_are_noticed(check, capsys):
    wrong = HUMANEVAL[0] | {"canonical_solution": HUMANEVAL[0]["wrong"]}
    code, _ = check(humaneval=[wrong])
    assert code == 1
    blind = HUMANEVAL[0] | {"canonical_solution": HUMANEVAL[0]["right"], "test": "assert total([1]) is not total"}
    code, results = check(humaneval=[blind])
    assert code == 1
    assert results["HumanEval, python"][EMPTY] == {"programs": 1, "passed": 1}
    assert "Own/0" in capsys.readouterr().out


def test_a_language_without_solutions_is_tried(check, capsys):
    if "cpp" not in installed_languages():
        pytest.skip("no C++ compiler")
    tests = (
        "}\nint main() {\n auto candidate = twice;\n assert(candidate((4)) == (8));\n assert(candidate((1)) == (2));\n}"
    )
    code, results = check(humaneval=[HUMANEVAL_CPP | {"test": tests}])
    assert code == 0
    assert results["HumanEval, cpp"] == {
        check_benchmarks.RECITED: {"programs": 1, "passed": 1},
        check_benchmarks.RECITED_WRONGLY: {"programs": 1, "passed": 0},
    }
