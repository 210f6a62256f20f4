"""Every two choices of layout and model meet in one of these cases, and each equals one process."""

import copy
import json
import math
import subprocess
import sys
from pathlib import Path

import layout_parity
import pytest
from layout_parity import Case, compare, one_process, pairwise_cases, random_cases, train_case

from megacoder.core.errors import ConfigError

TOOL = Path(layout_parity.__file__)


@pytest.mark.parametrize("case", pairwise_cases(), ids=str)
def test_a_layout_equals_one_process(ranks, case):
    settings = (2, 0, "float32")
    found = compare(ranks.run(case.world_size, train_case, case, *settings), one_process(case.alone, *settings))
    assert found.within(None), (found.loss, found.norm, found.worst_gradient, found.worst_weight)


@pytest.mark.parametrize(
    "text",
    [
        "tp=2",
        "tp=4,kv-heads=2",
        "pp=2,schedule=zbv",
        "cp=2,packed=on",
        "dp=2",
        "tp=2,cp=2,pp=2",
        "dp=1,block=plain",
        "tp=2,kv-heads=1,qk-norm=on",
    ],
)
def test_bf16_errs_at_most_twice_as_much_as_one_process_in_bf16(ranks, text):
    case = Case.parse(text)
    exact = one_process(case.alone, 2, 0, "float32")
    limit = compare([one_process(case.alone, 2, 0, "bfloat16")], exact)
    found = compare(ranks.run(case.world_size, train_case, case, 2, 0, "bfloat16"), exact)
    assert found.within(limit), (found, limit)
    assert limit.worst_gradient[1] > 1e-3  # bf16 it was


SMALL = Case(layers=1, sequences=2)


@pytest.fixture
def run_and_limit():
    """A run of one process in bf16, to be spoilt, and what it differs by from one in fp32."""
    run = copy.deepcopy(one_process(SMALL, 2, 0, "bfloat16"))
    return run, compare([run], one_process(SMALL, 2, 0, "float32"))


def write_nan(run, what):
    if what in ("losses", "norms"):
        getattr(run, what)[1] = math.nan
    else:
        parts = run.gradients[1] if what == "gradients" else run.weights
        parts[-1].data[0] = math.nan


@pytest.mark.parametrize("what", ["losses", "norms", "gradients", "weights"])
def test_nan_is_not_a_small_difference(run_and_limit, what):
    run, limit = run_and_limit
    exact = copy.deepcopy(one_process(SMALL, 2, 0, "float32"))
    for found, allowed in ((run, limit), (exact, None)):
        expected = one_process(SMALL, 2, 0, "float32")
        assert compare([found], expected).within(allowed)
        write_nan(found, what)
        assert not compare([found], expected).within(allowed)


@pytest.mark.parametrize("what", ["losses", "norms"])
def test_a_wrong_loss_or_norm_is_seen_in_bf16(run_and_limit, what):
    run, limit = run_and_limit
    getattr(run, what)[1] *= 1.02
    assert not compare([run], one_process(SMALL, 2, 0, "float32")).within(limit)


def test_a_run_with_zero_loss_equals_itself():
    """With one id there is nothing to learn: loss and gradients are zero."""
    run = one_process(Case(layers=1, sequences=2, vocab=1), 1, 0, "float32")
    assert run.losses == [0.0]
    assert compare([run], run).within(None)


def test_every_two_choices_meet():
    rows = [
        {**vars(case), "pipeline": (case.pp, case.schedule)} for case in pairwise_cases()
    ]  # fmt: skip
    met = {
        ((one, row[one]), (other, row[other]))
        for row in rows for one in layout_parity.CHOICES for other in layout_parity.CHOICES
    }  # fmt: skip
    choices = [(name, value) for name, values in layout_parity.CHOICES.items() for value in values]
    missing = {frozenset((a, b)) for a in choices for b in choices if a[0] != b[0] and (a, b) not in met}
    # 16 ranks hold no tp=4 with pp=4 and another axis of two, which is no pair
    assert missing == {frozenset((("block", "plain"), ("recompute", "norms")))}  # which is refused


def test_random_layouts_follow_the_seed():
    cases = random_cases(5, seed=3, world=8)
    assert cases == random_cases(5, seed=3, world=8) != random_cases(5, seed=4, world=8)
    assert {case.world_size for case in cases} == {8}


def test_a_layout_reads_as_it_is_written():
    for case in random_cases(20, seed=1, world=4):
        assert Case.parse(str(case)) == case


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tp=two", "tp = 'two': expected a number"),
        ("pp=2,shedule=zbv", "unknown key 'shedule' .did you mean 'schedule'"),
        ("tied=yes", "tied = 'yes': expected on or off"),
    ],
)
def test_a_layout_that_cannot_be_read(text, message):
    with pytest.raises(ConfigError, match=message):
        Case.parse(text)


def run_tool(*arguments):
    command = [sys.executable, str(TOOL), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)


def test_the_command_prints_differences_as_json():
    done = run_tool("--layouts", "tp=2", "pp=2,schedule=zbv", "--steps", "1", "--json")
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert [row["layout"] for row in rows] == ["tp=2", "pp=2,schedule=zbv"]
    assert all(0 < row["gradient"] < 1e-4 for row in rows[:1])


def test_the_command_fails_past_the_tolerance(monkeypatch, capsys):
    monkeypatch.setattr(layout_parity, "TOLERANCE", 0.0)
    assert layout_parity.main(["--layouts", "tp=2", "--steps", "1"]) == 1
    assert "FAIL" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no layouts; give --layouts"),
        (["--layouts", "tp=3"], "tp = 3: model.num_attention_heads = 4 is not a multiple of 3"),
        (["--layouts", "block=fast"], "block = 'fast': expected one of 'scheduled', 'plain'"),
    ],
)
def test_invalid_layouts_are_refused_in_one_line(arguments, message):
    done = run_tool(*arguments)
    assert done.returncode == 1
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
