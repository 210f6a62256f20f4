"""Checkpoints scored beside the run: in order, as they appear, once each, until the run has ended."""

import json
import math
import shutil
import weakref
from contextlib import closing
from types import SimpleNamespace

import pytest
from checkpoint_cases import flip_a_byte
from command_line import refusal
from command_line import run_command as run
from evaluation_samples import source_files, write_shard
from html_reader import Reader
from train_cases import ALONE, functions, leave, make_case, scalars
from train_cases import run as train

from megacoder.cli import eval_perplexity
from megacoder.core.files import exclusive
from megacoder.train.loop import Trainer
from megacoder.train.scores import ScoreLog, read_scores, scores_folder

STEPS = [3, 6, 8]


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """The data, `texts.jsonl` and `set.jsonl` to score on, and `done`, a run with checkpoints of STEPS."""
    case = make_case(tmp_path_factory.mktemp("follow"))
    train(ALONE, case.config("done"))
    texts = functions(2, first=100)
    (case.folder / "texts.jsonl").write_text("".join(json.dumps({"content": text}) + "\n" for text in texts))
    rows = [{"prompt": f"x = {n}\n", "suffix": "\n", "canonical_solution": "y = x\n"} for n in range(2)]
    (case.folder / "set.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return case


@pytest.fixture(scope="module")
def again(case):
    """The folder of a run with another checkpoint of step 6."""
    trainer = Trainer(case.config("again", seed=9, checkpoint_every=6), ALONE)
    while trainer.step < 6:
        trainer.update()
    leave(trainer)
    return trainer.config.output


@pytest.fixture
def done(case, tmp_path):
    """A copy of the run that has ended."""
    shutil.copytree(case.folder / "done", tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def pauses(monkeypatch):
    """What happens while the follower waits, a function for each time; it must not wait more often."""
    happenings = []
    monkeypatch.setattr("megacoder.cli.follow._pause", lambda: happenings.pop(0)())
    return happenings


@pytest.fixture
def loading(monkeypatch):
    """The `steps` whose models were loaded; `before[step]`, if given, is called before that."""
    seen, load = SimpleNamespace(steps=[], before={}), eval_perplexity.load_model

    def load_model(folder, *words, **names):
        step = int(folder.name.removeprefix("step-"))
        seen.steps.append(step)
        seen.before.get(step, lambda: None)()
        return load(folder, *words, **names)

    monkeypatch.setattr(eval_perplexity, "load_model", load_model)
    return seen


def checkpoint(folder, step):
    return folder / "checkpoints" / f"step-{step:08d}"


def replace(folder, step, *, by):
    shutil.rmtree(checkpoint(folder, step))
    shutil.copytree(checkpoint(by, step), checkpoint(folder, step))


def perplexity(case, model, *more):
    return ["eval", "perplexity", "--data", case.folder / "texts.jsonl", "--model", model, *more]


def follow(capsys, case, folder, *more):
    """(exit code, the steps printed, stderr)."""
    code, out, err = run(capsys, *perplexity(case, folder, "--follow", "--json", *more))
    return code, [json.loads(line)["step"] for line in out.splitlines()], err


def test_checkpoints_are_scored_as_they_appear_until_the_run_has_ended(case, capsys, pauses):
    config = case.config("live", checkpoint={"keep_last": 9})
    trainer = Trainer(config, ALONE)

    def train_to(step):
        while trainer.step < step:
            trainer.update()
        trainer._checkpoint()
        trainer.folder.checkpoints.wait()

    train_to(3)
    pauses += [lambda: train_to(6), lambda: None, lambda: train_to(8)]
    code, out, err = run(capsys, *perplexity(case, config.output, "--follow", "--json"))
    leave(trainer, saving=False)
    assert code == 0, err
    rows = [json.loads(line) for line in out.splitlines()]
    assert [(row["step"], row["tokens"]) for row in rows] == [(step, step * 8 * 32) for step in STEPS]
    assert rows == read_scores(config.output)["perplexity"]
    for row in rows:
        _, out, _ = run(capsys, *perplexity(case, checkpoint(config.output, row["step"]), "--json"))
        alone = json.loads(out)
        assert row["scores"] == {"bits_per_byte": alone["model"], "perplexity": alone["perplexity"]}
        assert (row["name"], row["protocol"]) == ("perplexity", 1)
    board = scalars(config.output, "perplexity/bits_per_byte", "perplexity")
    assert board == [(row["step"], pytest.approx(row["scores"]["bits_per_byte"])) for row in rows]
    assert "all 8 steps are done; 3 checkpoints scored" in err


def test_a_line_for_people_and_curves_in_the_report(case, done, capsys):
    code, out, err = run(capsys, *perplexity(case, done, "--follow"))
    scores = [row["scores"] for row in read_scores(done)["perplexity"]]
    lines = [f"step {step}, {step * 256:,} tokens: bits_per_byte {one['bits_per_byte']:.4f}, perplexity "
             f"{one['perplexity']:.4f}" for step, one in zip(STEPS, scores, strict=True)]  # fmt: skip
    assert (code, out.splitlines()) == (0, lines), err
    before = (case.folder / "done" / "metrics.jsonl").read_bytes()
    assert (done / "metrics.jsonl").read_bytes() == before
    assert run(capsys, "report", done)[0] == 0
    text = (done / "report.html").read_text()
    reader = Reader()
    reader.feed(text)
    shown = " ".join(reader.texts)
    assert "perplexity, bits_per_byte" in reader.texts
    assert f"{scores[-1]['perplexity']:.4f} at 8" in shown
    assert run(capsys, "report", case.folder / "done")[0] == 0
    assert text.count("<polyline") == (case.folder / "done" / "report.html").read_text().count("<polyline") + 2


def test_an_interrupted_follower_goes_on_and_computes_no_score_twice(case, done, capsys, loading):
    def interrupt():
        raise KeyboardInterrupt

    loading.before[6] = interrupt
    code, steps, err = follow(capsys, case, done)
    assert (code, steps) == (130, [3]), err
    loading.steps.clear()
    loading.before.clear()
    lines = scores_folder(done, "perplexity") / "scores.jsonl"
    lines.write_bytes(lines.read_bytes() + b'{"step": 6, "sco')  # cut off, as by a crash
    code, steps, err = follow(capsys, case, done)
    assert (code, steps, loading.steps) == (0, [6, 8], [6, 8]), err
    assert "1 checkpoint is scored already" in err
    assert [row["step"] for row in read_scores(done)["perplexity"]] == STEPS
    assert follow(capsys, case, done)[:2] == (0, [])
    assert loading.steps == [6, 8]


def test_checkpoints_that_the_run_removes_are_skipped(case, done, capsys, loading):
    def remove():
        for step in (3, 6):  # one that is being read, and one that waits
            checkpoint(done, step).rename(done / f"removed-{step}")

    loading.before[3] = remove
    code, steps, err = follow(capsys, case, done)
    assert (code, steps, loading.steps) == (0, [8], [3, 8]), err
    for step in (3, 6):
        assert err.count(f"skipping step-0000000{step}: the run removed it before it was scored") == 1
    assert err.count("skipping") == 2


def test_damaged_checkpoints_are_named_once_and_skipped(case, done, capsys, pauses):
    shutil.move(checkpoint(done, 8), done / "later")
    [weights] = checkpoint(done, 3).glob("*.safetensors")
    flip_a_byte(weights)
    (checkpoint(done, 6) / "manifest.json").unlink()
    pauses += [lambda: None, lambda: shutil.move(done / "later", checkpoint(done, 8))]
    code, steps, err = follow(capsys, case, done)
    assert (code, steps) == (0, [8]), err
    assert err.count(f"skipping step-00000003: {weights}: ") == 1
    assert err.count(f"skipping step-00000006: {checkpoint(done, 6) / 'manifest.json'}: ") == 1


def test_a_run_that_its_guard_has_stopped_has_ended(case, done, capsys):
    shutil.rmtree(checkpoint(done, 8))
    (done / "stopped").write_text("step 7: the loss is not finite\n")
    code, steps, err = follow(capsys, case, done)
    assert (code, steps) == (0, [3, 6])
    assert "the run was stopped at step 7: the loss is not finite; 2 checkpoints scored" in err


def test_a_run_that_went_back_is_scored_anew_from_there(case, done, again, capsys, pauses):
    assert follow(capsys, case, done)[1] == STEPS
    shutil.rmtree(checkpoint(done, 8))
    pauses += [
        lambda: replace(done, 6, by=again),
        lambda: replace(done, 6, by=case.folder / "done"),
        lambda: (done / "stopped").write_text("step 7: for the test"),
    ]
    code, steps, err = follow(capsys, case, done)
    assert (code, steps) == (0, [6, 6]), err
    rows = read_scores(done)["perplexity"]
    assert [row["step"] for row in rows] == [3, 6]
    values = [pytest.approx(row["scores"]["perplexity"]) for row in rows]
    assert scalars(done, "perplexity/perplexity", "perplexity") == list(zip([3, 6], values, strict=True))


def test_answers_of_a_run_that_went_back_are_stored_beside_the_old_ones(case, done, again, capsys):
    out = done / "answers"
    words = ["eval", "infill", "--data", case.folder / "set.jsonl", "--max-new-tokens", 4, "--follow", "--json"]
    words += ["--model", done, "--out", out]
    code, _, err = run(capsys, *words)
    assert code == 0, err
    before = set(out.iterdir())
    replace(done, 6, by=again)
    code, said, err = run(capsys, *words)
    assert (code, [json.loads(line)["step"] for line in said.splitlines()]) == (0, [6]), err
    [new] = set(out.iterdir()) - before
    assert (len(before), new.name.rpartition("-")[0]) == (3, "step-00000006")
    assert json.loads((new / "settings.json").read_text())["contents"]["model"].startswith("step-00000006, ")


def test_a_checkpoint_that_comes_back_is_scored_late(case, done, capsys):
    shutil.move(checkpoint(done, 3), done / "away")
    assert follow(capsys, case, done)[:2] == (0, [6, 8])
    shutil.move(done / "away", checkpoint(done, 3))
    assert follow(capsys, case, done)[:2] == (0, [3])
    rows = read_scores(done)["perplexity"]
    assert [row["step"] for row in rows] == STEPS
    values = [pytest.approx(row["scores"]["perplexity"]) for row in rows]
    assert scalars(done, "perplexity/perplexity", "perplexity") == list(zip(STEPS, values, strict=True))


@pytest.mark.parametrize("interrupted", [False, True])
@pytest.mark.parametrize(
    ("scored", "added", "left"),
    [
        pytest.param("2a 4a 6a", {3: "2a 3b 6b", 6: "2a 3b 6b"}, "2a 3b 6b", id="back to 2, other steps since"),
        pytest.param("2a 4a 6a", {6: "2a 6b"}, "2a 6b", id="back to 2"),
        pytest.param("2a 4a 6a", {6: "6b 8b", 8: "6b 8b"}, "2a 4a 6b 8b", id="back, older ones removed by keep_last"),
        pytest.param("2a 4a 6a", {8: "2a 8a"}, "2a 4a 6a 8a", id="forth, all but multiples removed by keep_last"),
        pytest.param("4a 6a", {2: "2a 4a 6a", 8: "2a 4a 6a 8a"}, "2a 4a 6a 8a", id="an earlier one appears late"),
        pytest.param("2a 4a 6a", {2: "2b"}, "2b", id="from the beginning"),
    ],
)
def test_lines_of_a_branch_that_was_left_are_dropped(tmp_path, scored, added, left, interrupted):
    def parse(words):
        return {int(word[0]): word for word in words.split()}

    def add(log, step, saved):
        score = step + 0.5 * (saved[step][1] == "b")
        row = {"step": step, "tokens": step, "name": "mbpp", "scores": {"pass@1": score}, "checkpoint": saved[step]}
        log.add(row, saved=saved)
        return log

    log = ScoreLog(tmp_path, "mbpp")
    for step in parse(scored):
        add(log, step, parse(scored))
    for step, saved in added.items():
        if interrupted:
            log.close()
            log = ScoreLog(tmp_path, "mbpp")
        add(log, step, parse(saved))
    log.close()
    assert [row["checkpoint"] for row in read_scores(tmp_path)["mbpp"]] == left.split()
    drawn = [(step, step + 0.5 * (word[1] == "b")) for step, word in parse(left).items()]
    assert scalars(tmp_path, "mbpp/pass@1", "mbpp") == drawn


def test_a_run_may_move(case, done, capsys):
    assert follow(capsys, case, done)[:2] == (0, STEPS)
    assert follow(capsys, case, done.rename(done.with_name("moved")))[:2] == (0, [])


def test_a_model_is_freed_before_the_next_is_loaded(case, done, capsys, monkeypatch):
    alive, load = [], eval_perplexity.load_model

    def load_model(*words, **names):
        assert [model() for model in alive] == [None] * len(alive)
        model, tokenizer = load(*words, **names)
        alive.append(weakref.ref(model))
        return model, tokenizer

    monkeypatch.setattr(eval_perplexity, "load_model", load_model)
    assert follow(capsys, case, done)[:2] == (0, STEPS)
    assert len(alive) == 3


def test_a_benchmark_stores_its_answers_by_checkpoint(case, done, capsys):
    words = ["eval", "infill", "--data", case.folder / "set.jsonl", "--max-new-tokens", 4]
    out = done / "answers"
    code, said, err = run(capsys, *words, "--model", done, "--follow", "--out", out, "--json")
    assert code == 0, err
    rows = [json.loads(line) for line in said.splitlines()]
    assert [row["step"] for row in rows] == STEPS
    for row in rows:
        [its] = out.glob(f"step-{row['step']:08d}-*")
        assert json.loads((its / "summary.json").read_text())["scores"][""] == row["scores"]
        settings = json.loads((its / "settings.json").read_text())
        assert settings["protocol"] == row["protocol"]
        code, _, err = run(
            capsys, *words, "--model", checkpoint(done, row["step"]), "--out", its
        )  # the same evaluation
        assert (code, "2 completions, 2 results exist already" in err) == (0, True), err


def test_lines_of_held_out_files_are_stored_by_checkpoint(case, done, capsys):
    write_shard(done / "heldout.parquet", source_files())
    words = ["eval", "infill", "--data", done / "heldout.parquet", "--max-new-tokens", 16, "--num-tasks", 2]
    code, said, err = run(capsys, *words, "--model", done, "--follow", "--out", done / "lines", "--json")
    assert code == 0, err
    assert [json.loads(line)["step"] for line in said.splitlines()] == STEPS
    assert set(json.loads(said.splitlines()[0])["scores"]) == {"exact_match", "edit_similarity"}
    files = sorted((done / "lines").iterdir())
    assert [path.name.rpartition("-")[0] for path in files] == [f"step-{step:08d}" for step in STEPS]
    assert all(len(path.read_text().splitlines()) == 2 for path in files)


def test_scores_of_other_settings_need_another_name(case, done, capsys):
    assert follow(capsys, case, done)[:2] == (0, STEPS)
    words = perplexity(case, done, "--follow", "--window", 16)
    said = refusal(capsys, *words, code=2)
    assert "settings.json: made with window = 'None', now '16'; choose another --follow-as, or remove " in said
    code, _, err = run(capsys, *words, "--follow-as", "perplexity-16")
    assert code == 0, err
    assert [len(rows) for rows in read_scores(done).values()] == [3, 3]


def test_a_second_follower_is_refused(case, done, capsys):
    folder = scores_folder(done, "perplexity")
    with exclusive(folder, what="follower"):
        said = refusal(capsys, *perplexity(case, done, "--follow"))
        assert f"{folder}: another follower is working here; wait for it, or choose another --follow-as" in said
        assert follow(capsys, case, done, "--follow-as", "other")[:2] == (0, STEPS)


def test_what_is_wrong_with_the_options_ends_the_follower(case, done, capsys):
    code, _, err = run(capsys, *perplexity(case, done, "--follow", "--window", 1))
    assert (code, err) == (2, "megacoder: window = 1: from 2 to the model's 64 positions\n")
    assert follow(capsys, case, done)[:2] == (0, STEPS), "settings that scored nothing bind nobody"


def test_only_the_model_is_measured(case, done, capsys, monkeypatch):
    monkeypatch.setattr("megacoder.evaluate.bits_per_byte.xz_bits", lambda text: pytest.fail("nobody sees it"))
    assert follow(capsys, case, done)[:2] == (0, STEPS)


@pytest.mark.parametrize("scores", ['{"perplexity": "bad"}', '{"perplexity": NaN}', '{"perplexity": [1]}', "3"])
def test_a_line_without_numbers_is_named_and_left_out(done, capsys, scores):
    with closing(ScoreLog(done, "perplexity")) as log:
        log.add({"step": 3, "scores": {"perplexity": 9.0}}, saved={})
    path = scores_folder(done, "perplexity") / "scores.jsonl"
    path.write_text(path.read_text() + f'{{"step": 4, "scores": {scores}}}\n')
    code, _, err = run(capsys, "report", done)
    assert (code, err.count(f"{path}: the line of step 4 has no scores that are numbers; it is left out")) == (0, 1)
    assert [row["step"] for row in read_scores(done)["perplexity"]] == [3]


def test_groups_share_a_chart_and_what_is_not_finite_is_left_out(done, capsys):
    with closing(ScoreLog(done, "ds1000")) as log:
        for step in STEPS:
            scores = {"pass@1": 0.1 * step, **{f"pass@1/group {n}": 0.01 * step for n in range(4)}, "broken": math.nan}
            row = {"step": step, "tokens": step, "name": "ds1000", "scores": scores, "checkpoint": str(step)}
            log.add(row, saved={})
    assert [row["scores"]["broken"] for row in read_scores(done)["ds1000"]] == [None] * 3
    assert run(capsys, "report", done)[0] == 0
    charts = (done / "report.html").read_text().split("<svg ")
    [first, second] = [chart for chart in charts if "ds1000, pass@1 over step" in chart]
    assert (first.count("<polyline"), second.count("<polyline")) == (4, 1)
    assert "broken" not in "".join(charts)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("humaneval --data d.jsonl --completions a.jsonl", "--follow: needs the folder of a run as --model"),
        ("humaneval --data d.jsonl --endpoint http://localhost:1/v1", "--follow: needs the folder of a run as --model"),
        ("humaneval --data d.jsonl --model run --tp 2", "--follow with --tp 2: checkpoints are loaded by one process"),
        ("perplexity --data texts.jsonl --model gone", "--follow --model gone: no run.toml in it; give the `output`"),
        ("perplexity --data texts.jsonl --model tokenizer", "--model tokenizer: no run.toml in it"),
        ("perplexity --data texts.jsonl --model done --tp 2", "--follow with --tp 2"),
        ("infill --data set.jsonl --model done/checkpoints", "--model done/checkpoints: no run.toml in it"),
        ("infill --data heldout --model done --tp 2", "--follow with --tp 2"),
        (
            "perplexity --data texts.jsonl --model done --follow-as a/b",
            "--follow-as 'a/b': must be a name that a folder",
        ),
        (
            "perplexity --data texts.jsonl --model done --train nowhere",
            "--follow with --train nowhere: a run is scored",
        ),
        ("infill --data heldout --model done --train a b", "--follow with --train a b: a run is scored"),
        ("perplexity --data texts.jsonl --model done --tokenizer gone", "--tokenizer gone/tokenizer.json: there is no"),
        ("perplexity --data texts.jsonl --model done --follow-as a\\nb", "--follow-as 'a\\nb': must be a name that a"),
        ("perplexity --data texts.jsonl --model done --no-follow --follow-as x", "--follow-as x: only with --follow"),
    ],
)
def test_bad_input_is_one_line(case, monkeypatch, capsys, words, message):
    monkeypatch.chdir(case.folder)
    name, *more = words.split()
    more = [word.replace("\\n", "\n") for word in more]
    said = refusal(capsys, "eval", name, "--follow", *more, code=2)
    assert message in said
    assert not (case.folder / "done" / "scores").exists()
