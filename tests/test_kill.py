"""The kill test in short, and proof that it notices the faults it looks for."""

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import kill_test
import pytest
from checkpoint_cases import flip_a_byte
from kill_test import Broken, Story
from train_cases import make_case

from megacoder.train.loop import train
from megacoder.train.metrics_log import read_metrics


@pytest.mark.timeout(600)
def test_a_run_that_is_killed_loses_nothing():
    command = [sys.executable, kill_test.__file__, "--kills", "3", "--ways", "alone", "worker", "--seed", "1", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=580)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert [(row["way"], row["ranks"], row["kills"]) for row in rows] == [("alone", 1, 2), ("worker", 2, 1)]


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """A run that nobody disturbed, under the name of one that was."""
    case = make_case(tmp_path_factory.mktemp("kill"))
    train(case.config("alone", steps=4, checkpoint_every=2, eval_every=100))
    return case


@pytest.fixture
def story(ended, tmp_path):
    """The disturbed run, and a copy of it to compare with: nothing is wrong as yet."""
    shutil.copytree(ended.folder / "alone", tmp_path / "expected")
    shutil.copytree(ended.folder / "alone", tmp_path / "original")
    yield Story(ended, "alone", 1, random.Random(0)), tmp_path / "expected"
    shutil.rmtree(ended.folder / "alone")
    shutil.copytree(tmp_path / "original", ended.folder / "alone")


def rewrite_log(folder, change):
    rows = read_metrics(folder / "metrics.jsonl")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in change(rows)))


def examine(story, expected):
    story.check()
    story.compare(expected)


def test_equal_runs_pass(story):
    story, expected = story
    examine(story, expected)
    assert (story.whole_step, story.repeated) == (4, 0)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda run: (run / "checkpoints" / "step-00000006.tmp-x").mkdir(), "step-00000006.tmp-x is left"),
        (lambda run: (run / "run.toml.tmp-3").touch(), "run.toml.tmp-3 is left"),
        (lambda run: rewrite_log(run, lambda rows: [rows[0] | {"loss": 1.0}, *rows[1:]]), "step 1 was"),
        (lambda run: rewrite_log(run, lambda rows: [*rows[:2], *rows[1:]]), "the log has steps"),
        (lambda run: rewrite_log(run, lambda rows: [rows[0], *rows[2:]]), "the log has steps"),
        (lambda run: rewrite_log(run, lambda rows: rows[:3]), r"the log has steps \[1, 2, 3\] .* is of 4"),
        (lambda run: shutil.rmtree(run / "checkpoints" / "step-00000004"), "is of step 2, it was 4"),
        (lambda run: flip_a_byte(next(run.glob("checkpoints/step-00000004/*.safetensors"))), "rank-00000-of-00001"),
        (lambda run: [path.unlink() for path in run.glob("checkpoints/*/manifest.json")], "no whole checkpoint"),
    ],
)
def test_damage_to_a_run_is_noticed(story, damage, message):
    story, expected = story
    story.whole_step = 4
    damage(story.folder)
    with pytest.raises(Broken, match=message):
        examine(story, expected)


def test_other_weights_are_noticed(story, ended):
    story, expected = story
    shutil.rmtree(expected)
    train(ended.config("other", steps=4, checkpoint_every=2, eval_every=100, seed=5))
    Path(ended.folder / "other").rename(expected)
    rows = read_metrics(story.folder / "metrics.jsonl")
    rewrite_log(expected, lambda _: rows)
    with pytest.raises(Broken, match=r"weight of model\..* differs"):
        story.compare(expected)
