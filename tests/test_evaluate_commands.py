"""The commands that run a model, from an exported folder to their output, and one line for each mistake."""

import gzip
import itertools
import json
import shutil
import subprocess
import sys

import pytest
from command_line import run_command as run
from data_samples import write_dataset
from evaluation_samples import make_model, make_tokenizer, overfit, source_files, write_shard

from megacoder.evaluate.infill import choose_tasks
from megacoder.evaluate.prompts import completion_prompt, infill_prompt
from megacoder.model.huggingface import export_model

TASK = choose_tasks(source_files(), num_tasks=1)[0]
COMPLETION = ("def total(", "items):\n    pass\n")
SUFFIX_FIRST = "    total = limit"
"""What the model fills into the hole when the suffix comes first."""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with `model`, overfitted on one hole and one completion, and the shard `heldout/0.parquet`."""
    home = tmp_path_factory.mktemp("home")
    tokenizer = make_tokenizer()
    tokenizer.save(home / "tokenizer")
    model = make_model(tokenizer)
    hole = infill_prompt(tokenizer, TASK.prefix, TASK.suffix, max_tokens=256).tokens
    text = completion_prompt(tokenizer, COMPLETION[0], max_tokens=256).tokens
    turned = infill_prompt(tokenizer, TASK.prefix, TASK.suffix, max_tokens=256, spm=True).tokens
    answers = [[*tokenizer.encode(answer), tokenizer.eos_id] for answer in (TASK.truth, COMPLETION[1], SUFFIX_FIRST)]
    overfit(model, list(zip((hole, text, turned), answers, strict=True)), steps=60)
    export_model(model, home / "model", tokenizer_folder=home / "tokenizer")
    (home / "heldout").mkdir()
    write_shard(home / "heldout" / "0.parquet", source_files())
    return home


def test_generate(home, capsys):
    code, out, _ = run(capsys, "generate", "--model", home / "model", "--prompt", COMPLETION[0])
    assert (code, out) == (0, COMPLETION[1] + "\n")


def test_generate_skips_what_does_not_fit_and_says_so(home, capsys):
    prompt = "x = 1\n" * 100 + COMPLETION[0]
    code, _, err = run(capsys, "generate", "--model", home / "model", "--prompt", prompt, "--max-new-tokens", "8")
    assert code == 0
    assert "does not fit into the model: its first" in err


def test_a_short_model_answers_with_half_of_its_positions(home, capsys):
    tokenizer = make_tokenizer()
    export_model(make_model(tokenizer, max_position_embeddings=64), home / "short", tokenizer_folder=home / "tokenizer")
    (home / "gap.py").write_text("x = <FILL>\n")
    for words in (["generate", "--prompt", "x"], ["infill", home / "gap.py"]):
        code, _, err = run(capsys, *words, "--model", home / "short")
        assert (code, err) == (0, "")
        assert run(capsys, *words, "--model", home / "short", "--max-new-tokens", 60)[0] == 0
    for words, most in ((["generate", "--prompt", "x"], 62), (["infill", home / "gap.py"], 60)):
        code, _, err = run(capsys, *words, "--model", home / "short", "--max-new-tokens", most + 1)
        assert code == 2
        assert f"--max-new-tokens {most + 1}: must be from 1 to {most}; the model has 64 positions" in err
    code, _, err = run(capsys, "generate", "--model", home / "short", "--max-new-tokens", 62, "--prompt", "x\nx")
    assert code == 0
    assert "its first 1 line is dropped" in err


def test_infill_at_a_mark_or_at_a_line(home, capsys):
    marked, whole = home / "marked.py", home / "whole.py"
    marked.write_text(TASK.prefix + "<FILL>" + TASK.suffix)
    whole.write_text(TASK.prefix + "to be replaced" + TASK.suffix)
    for words in ([marked], [whole, "--line", TASK.line]):
        code, out, err = run(capsys, "infill", *words, "--model", home / "model", "--max-new-tokens", "60")
        assert (code, out, err) == (0, TASK.truth + "\n", "")
    code, out, _ = run(capsys, "infill", marked, "--model", home / "model", "--max-new-tokens", "60", "--spm")
    assert (code, out) == (0, SUFFIX_FIRST + "\n")


def test_only_a_line_that_is_filled_in_ends_with_the_line(home, capsys, monkeypatch):
    answer = make_tokenizer().encode("first\nsecond\n")

    def generated(model, prompts, *, watcher, **_):
        return [list(itertools.takewhile(lambda token: not watcher(0, [token]), answer))]

    monkeypatch.setattr("megacoder.cli.model_folder.generate", generated)
    (home / "open.py").write_text("x = 1\n<FILL>\n")
    for words, expected in (([], "first\nsecond\n\n"), (["--line", 1], "first\n")):
        code, out, err = run(capsys, "infill", home / "open.py", *words, "--model", home / "model")
        assert (code, out, err) == (0, expected, "")


def test_eval_infill(home, capsys):
    words = ["eval", "infill", "--model", home / "model", "--data", home / "heldout", "--num-tasks", "3"]
    code, out, _ = run(capsys, *words, "--train", home / "heldout", "--out", home / "rows.jsonl", "--json")
    summary = json.loads(out)
    assert (code, summary["num_tasks"], summary["num_files"]) == (0, 3, 3)
    assert summary["model"]["exact_match"] >= 1 / 3
    assert summary["most_frequent_line"]["edit_similarity"] > 0
    rows = [json.loads(line) for line in (home / "rows.jsonl").read_text().splitlines()]
    assert rows[0] == {
        "repo": TASK.repo, "path": TASK.path, "line": TASK.line, "truth": TASK.truth, "completion": TASK.truth,
        "exact_match": True, "edit_similarity": 1.0,
    }  # fmt: skip
    code, _, _ = run(capsys, *words, "--spm", "--out", home / "turned.jsonl")
    assert code == 0
    assert json.loads((home / "turned.jsonl").read_text().splitlines()[0])["completion"] == SUFFIX_FIRST
    code, out, _ = run(capsys, *words)
    assert code == 0
    assert "3 lines of 3 held-out files" in out
    assert "most frequent line" not in out


@pytest.mark.parametrize("command", ["infill", "perplexity"])
def test_a_model_is_evaluated_with_the_given_tokenizer(home, capsys, command):
    words = ["eval", command, "--data", home / "heldout", "--json"] + ["--num-tasks", "1"] * (command == "infill")
    shutil.copytree(home / "model", home / command, ignore=shutil.ignore_patterns("tokenizer*"))
    _, with_its_own, _ = run(capsys, *words, "--model", home / "model")
    code, given, err = run(capsys, *words, "--model", home / command, "--tokenizer", home / "tokenizer")
    assert (code, given) == (0, with_its_own), err


def test_two_ranks_fill_in_the_lines_that_one_does(home, tmp_path, capsys):
    words = ["eval", "infill", "--model", home / "model", "--data", home / "heldout", "--dtype", "float32", "--out"]
    words = [str(word) for word in words]
    code, alone, err = run(capsys, *words, tmp_path / "alone.jsonl")
    assert code == 0, err
    two = [sys.executable, "-m", "megacoder", *words, str(tmp_path / "shared.jsonl"), "--tp", "2"]
    shared = subprocess.run(two, capture_output=True, text=True, timeout=240)
    assert (shared.returncode, shared.stdout) == (0, alone), shared.stderr
    assert (tmp_path / "shared.jsonl").read_text() == (tmp_path / "alone.jsonl").read_text()


def test_eval_infill_recognizes_a_published_set_by_its_data_option(home, capsys):
    words = ["eval", "infill", "--model", home / "model", "--num-tasks", "1", "--json"]
    (home / "data").mkdir()
    code, out, err = run(capsys, *words, "--data", home / "heldout", "--out", home / "data" / "rows.jsonl")
    assert code == 0, err
    assert json.loads(out)["num_tasks"] == 1
    row = {"prompt": TASK.prefix, "suffix": TASK.suffix, "canonical_solution": TASK.truth}
    (home / "set.jsonl").write_text(json.dumps(row) + "\n")
    (home / "set.jsonl.gz").write_bytes(gzip.compress((home / "set.jsonl").read_bytes()))
    for given in (["--data", home / "set.jsonl"], [f"--data={home / 'set.jsonl'}"], ["--data", home / "set.jsonl.gz"]):
        code, out, err = run(capsys, "eval", "infill", "--model", home / "model", *given, "--json")
        assert code == 0, err
        assert json.loads(out)["scores"][""]["exact_match"] == 1
    for order, answer in (([], TASK.truth), (["--spm"], SUFFIX_FIRST)):
        row |= {"canonical_solution": answer}
        (home / "set.jsonl").write_text(json.dumps(row) + "\n")
        given = ["--model", home / "model", "--data", home / "set.jsonl", "--json", *order]
        _, out, _ = run(capsys, "eval", "infill", *given)
        assert json.loads(out)["scores"][""]["exact_match"] == 1
    code, out, _ = run(capsys, "eval", "infill", "--help")
    assert code == 0
    assert "--data FILE.jsonl a published infilling set" in " ".join(out.replace("│", " ").split())
    assert "Hugging Face folder, run or checkpoint" in out


def test_eval_perplexity(home, capsys):
    write_dataset(home / "train", [[[1, 2, 3]]])
    words = ["eval", "perplexity", "--model", home / "model", "--data", home / "heldout", "--train", home / "train"]
    code, out, _ = run(capsys, *words, "--json")
    score = json.loads(out)
    assert code == 0
    assert score["num_documents"] == 2
    assert score["num_bytes"] == sum(len(file.content) for file in source_files())
    assert 0 < score["xz"] < score["unigram"]
    code, out, _ = run(capsys, *words, "--window", "64")
    assert code == 0
    assert "tokens in windows of 64;" in out
    rows = [{"sample": file.sample, "text": file.content} for file in source_files()]
    (home / "heldout.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [*words[:4], "--data", home / "heldout.jsonl", "--text-key", "text", "--json"]
    _, out, _ = run(capsys, *words, "--document-key", "sample")
    assert json.loads(out) == score | {"unigram": None}
    _, out, _ = run(capsys, *words)
    assert json.loads(out)["num_documents"] == len(rows)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("infill nowhere.py --model model", "nowhere.py: no such file"),
        ("infill heldout --model model", "not readable: Is a directory"),
        ("infill latin.py --model model", "latin.py: not readable: not UTF-8"),
        ("infill none.py --model model", "none.py: no <FILL> mark in it"),
        ("infill twice.py --model model", "twice.py: 2 <FILL> marks"),
        ("infill none.py --line 0 --model model", "--line 0: none.py has lines 1 to 2"),
        ("infill none.py --line 3 --model model", "--line 3: none.py has lines 1 to 2"),
        ("infill none.py --line 1 --model gone", "gone: no such folder"),
        ("infill none.py --line 1 --model heldout", "config.json: no such file"),
        (
            "generate --model bare --prompt x",
            "bare: no tokenizer.json in it; name a folder that has one with --tokenizer",
        ),
        ("generate --model heldout --prompt x", "config.json: no such file; is heldout a model folder?"),
        ("generate --model mixed --prompt x", "use the tokenizer that the model was trained with"),
        ("generate --model model --prompt x --max-new-tokens 320", "--max-new-tokens 320: must be from 1 to 318"),
        ("generate --model model --prompt x --temperature -1", "temperature = -1.0"),
        ("generate --model model --prompt x --temprature 1", "did you mean '--temperature'"),
        ("generate --model model", "--prompt"),
        ("generate --model model --prompt x --tp 0", "--tp 0: must be at least 1"),
        ("eval infill --model model --data tokenizer", "no .parquet files"),
        ("eval infill --model model --data", "no held-out data"),
        ("eval infill --model model --data heldout --num-tasks 0", "--num-tasks 0"),
        ("eval perplexity --model model --data gone", "gone: no such file or folder"),
        ("eval perplexity --model model --data", "no held-out data"),
        ("eval perplexity --model model --data none.py", "none.py: expected a name that ends with"),
        ("eval perplexity --model model --data texts.jsonl --text-key contnet", "did you mean 'content'?"),
        ("eval perplexity --model model --data heldout --train gone", "gone.idx"),
        ("eval perplexity --model model --data heldout --window 1", "window = 1: from 2"),
    ],
)
def test_bad_input_is_one_line(home, monkeypatch, capsys, words, message):
    monkeypatch.chdir(home)
    (home / "latin.py").write_bytes(b"x = '\xe9'\n")
    (home / "none.py").write_text("x = 1\ny = 2\n")
    (home / "texts.jsonl").write_text('{"content": "x"}\n')
    (home / "twice.py").write_text("<FILL>\n<FILL>\n")
    tokenizer = make_tokenizer()
    if not (home / "bare").exists():
        export_model(make_model(tokenizer), home / "bare")
        export_model(make_model(tokenizer, vocab_size=300), home / "mixed")
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (home / "mixed" / name).write_text((home / "tokenizer" / name).read_text())
    code, out, err = run(capsys, *words.split())
    assert code != 0
    assert out == ""
    assert message in err
    assert err.startswith("megacoder: ")
    assert err.count("\n") == 1
