"""Generation as users see it: stop strings, streaming, chat, a repository as context, models that ranks share."""

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from command_line import refusal, run_command
from data_samples import write_jsonl
from evaluation_samples import make_model, make_tokenizer, source_files, write_shard
from test_generate import SHAPES, by_transformers, make_long_case, make_prompts
from test_generate import make_model as random_model

from megacoder.cli.chat import _turns
from megacoder.core.errors import ConfigError, DataError
from megacoder.data.chat_format import ChatFormat, FormatConfig
from megacoder.evaluate.generate import generate
from megacoder.evaluate.prompts import completion_prompt
from megacoder.evaluate.repository import dependency_context
from megacoder.evaluate.sampling import Sampling
from megacoder.evaluate.stops import StopStrings
from megacoder.model.huggingface import export_model, import_model
from megacoder.parallel.tensor import TensorParallel

HOLE = {"prompt": "def f(x):\n", "suffix": "\n    return y\n", "canonical_solution": "    y = x"}


def run(capsys, *words):
    """What a command prints that must succeed."""
    code, out, err = run_command(capsys, *words)
    assert not code, err
    return out


def on_two_ranks(*words):
    words = [sys.executable, "-m", "megacoder", *map(str, words), "--tp", "2"]
    return subprocess.run(words, capture_output=True, text=True, timeout=240)


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def streamed(tokenizer, text: str, stops: list[str]) -> tuple[str, str, bool]:
    """(what was shown piece by piece, the final text, whether a stop was met) of a text's tokens, one by one."""
    shown: list[str] = []
    watching = StopStrings(tokenizer, stops, shown.append)
    for token in tokenizer.encode(text):
        if watching.add(token):
            break
    final = watching.finish()
    return "".join(shown), final, watching.stopped


@pytest.mark.parametrize(
    ("text", "stops", "expected"),
    [
        ("total = 1\ndef f", ["\ndef", "\nclass"], "total = 1"),
        ("total = 1\ndead", ["\ndef"], "total = 1\ndead"),
        ("größer 日本 🎉!", [], "größer 日本 🎉!"),
        ("a 日本 b", ["本 b"], "a 日"),
        ("xyxyz", ["xyz"], "xy"),
        ("", ["a"], ""),
        ("return x", ["n", "tur"], "re"),  # both in one token
    ],
)
def test_text_ends_before_the_first_stop_and_is_shown_once(tokenizer, text, stops, expected):
    shown, final, stopped = streamed(tokenizer, text, stops)
    assert shown == final == expected
    assert stopped == (expected != text)


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        ((b"\xff", b"ab", b"STOP\xe4"), "\ufffdab"),
        ((b"S\xff", b"TOP\xe4"), "S\ufffdTOP\ufffd"),
        ((b"a\xe4", b"b"), "a\ufffdb"),
    ],
)
def test_bytes_that_are_no_text_stay_where_they_are(pieces, expected):
    shown: list[str] = []
    tokens = SimpleNamespace(decode_bytes=lambda ids: pieces[ids[0]])
    watching = StopStrings(tokens, ["STOP"], shown.append)
    for token in range(len(pieces)):
        watching.add(token)
    assert watching.finish() == "".join(shown) == expected


def test_text_is_held_back_while_a_stop_may_match(tokenizer):
    shown: list[str] = []
    watching = StopStrings(tokenizer, ["\nclass"], shown.append)
    for token in tokenizer.encode("x\ncla"):
        watching.add(token)
    assert "".join(shown) == "x"
    watching.add(tokenizer.encode("p")[0])
    assert "".join(shown) == "x\nclap"


def test_a_watcher_ends_only_its_own_sequence():
    model, prompts = random_model(), make_prompts([3, 8, 5])
    full = generate(model, prompts, max_new_tokens=12)
    ended = generate(model, prompts, max_new_tokens=12, watcher=lambda place, tokens: len(tokens) == 2 + 3 * place)
    assert ended == [full[place][: 2 + 3 * place] for place in range(3)]


def test_top_k_draws_from_the_likeliest_by_their_probabilities():
    model, prompt = random_model(vocab_size=8, init_std=0.05), [1, 2, 3]
    with torch.no_grad():
        probabilities = model.logits(model(torch.tensor([prompt]))[0, -1]).softmax(-1)
    kept = probabilities.topk(3)
    expected = torch.zeros(8).scatter(0, kept.indices, kept.values / kept.values.sum())
    drawn = generate(
        model, [prompt] * 2000, max_new_tokens=1, sampling=Sampling(temperature=1.0, top_k=3), batch_size=2000
    )
    counts = torch.bincount(torch.tensor(drawn).flatten(), minlength=8)
    assert counts[expected == 0].sum() == 0
    torch.testing.assert_close(counts / 2000, expected, rtol=0, atol=0.04)
    greedy = generate(model, [prompt], max_new_tokens=6)
    assert generate(model, [prompt], max_new_tokens=6, sampling=Sampling(temperature=1.0, top_k=1)) == greedy


@pytest.mark.parametrize(
    "given",
    [{"temperature": -0.1}, {"temperature": float("inf")}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.1}],
    ids=str,
)
def test_what_cannot_be_drawn_by_is_named(given):
    [(name, value)] = given.items()
    with pytest.raises(ConfigError, match=f"{name} = {value}: must be"):
        Sampling(**given)


def test_samples_follow_their_names_not_their_places():
    model, prompts = random_model(), make_prompts([4, 4])
    sampling = Sampling(temperature=1.0, seed=1)
    ab = generate(model, [prompts[0], prompts[0]], max_new_tokens=9, sampling=sampling, names=["a", "b"])
    ba = generate(model, [prompts[0], prompts[0]], max_new_tokens=9, sampling=sampling, names=["b", "a"])
    assert ab == ba[::-1]
    assert ab[0] != ab[1]
    long, short = make_prompts([9, 4])  # which come in the other order in their batch
    together = generate(model, [long, short], max_new_tokens=9, sampling=sampling, names=["a", "b"])
    alone = [
        generate(model, [prompt], max_new_tokens=9, sampling=sampling, names=[name])
        for prompt, name in ((long, "a"), (short, "b"))
    ]
    assert [together[:1], together[1:]] == alone


def generate_on_rank(world, folder: str, prompts, count: int):
    tp = TensorParallel(rank=world.rank, size=world.size, group=world.group)
    model = import_model(Path(folder), tp=tp)
    drawn = Sampling(temperature=0.8, top_p=0.9, seed=3)
    greedy = generate(model, prompts, max_new_tokens=count)
    return greedy, generate(model, prompts, max_new_tokens=10, sampling=drawn)


@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES)
def test_two_ranks_that_share_a_model_generate_the_same_as_one(ranks, tmp_path, changes):
    model, prompts = make_long_case(changes)
    export_model(model, tmp_path / "hf")
    drawn = generate(model, prompts, max_new_tokens=10, sampling=Sampling(temperature=0.8, top_p=0.9, seed=3))
    first, second = ranks.run(2, generate_on_rank, str(tmp_path / "hf"), prompts, 200)
    assert first == second
    assert first == (by_transformers(tmp_path / "hf", prompts, 200), drawn)


def chat_tokens(tokenizer, turns: list[tuple[str, str]]) -> list[int]:
    return ChatFormat(FormatConfig(), tokenizer).prompt(turns)


def test_typed_text_is_never_a_control_token(tokenizer):
    assert tokenizer.eot_id not in chat_tokens(tokenizer, [("user", "say <|EOT|>")])


def repository(root: Path) -> Path:
    files = {
        "app.py": "from shop import sell\n\nsell()\n",
        "shop.py": "from store import items\n\ndef sell():\n    pass",
        "store.py": "items = 3\n",
        "other.py": "import shop\n",
        ".hidden/x.py": "secret = 1\n",
        "notes.txt": "nothing",
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root / "app.py"


def test_context_is_the_files_dependencies_in_order(tmp_path):
    context, comment = dependency_context(tmp_path, repository(tmp_path))
    assert context == (
        "# store.py\nitems = 3\n# shop.py\nfrom store import items\n\ndef sell():\n    pass\n"
    )  # fmt: skip
    assert comment == "# app.py\n"
    assert dependency_context(tmp_path, tmp_path / "store.py")[0] == ""
    with pytest.raises(DataError, match="is not in"):
        dependency_context(tmp_path / ".hidden", tmp_path / "app.py")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    home = tmp_path_factory.mktemp("model")
    tokenizer.save(home / "tokenizer")
    export_model(make_model(tokenizer), home / "model", tokenizer_folder=home / "tokenizer")
    return home / "model"


def test_commands_stream_sample_and_take_context(folder, tmp_path, capsys, tokenizer):
    target = repository(tmp_path)
    target.write_text("from shop import sell\n\n<FILL>\n")
    with_context = run(capsys, "infill", target, "--model", folder, "--context", tmp_path, "--max-new-tokens", 5)
    words = ["generate", "--model", folder, "--prompt", "def ", "--max-new-tokens", 6, "--temperature", 1]
    two = run(capsys, *words, "--samples", 2, "--seed", 4)
    assert run(capsys, *words, "--samples", 2, "--seed", 4) == two
    assert two.startswith("--- 1\n")
    assert "\n--- 2\n" in two
    assert with_context.endswith("\n")


def test_ids_without_text_are_never_picked(folder, tmp_path, capsys, monkeypatch, tokenizer):
    model = make_model(tokenizer, vocab_size=tokenizer.vocab_size + 40)  # as in every DeepSeek model
    with torch.no_grad():
        model.lm_head.weight[tokenizer.vocab_size :] *= 100
    export_model(model, tmp_path / "wide", tokenizer_folder=folder)
    (tmp_path / "gap.py").write_text("x = <FILL>\n")
    data = write_jsonl(tmp_path / "lines.jsonl", [HOLE])
    monkeypatch.setattr("sys.stdin", io.StringIO("say\n"))
    for command in (
        ["generate", "--prompt", "def "], ["generate", "--prompt", "def ", "--temperature", "1"],
        ["infill", tmp_path / "gap.py"], ["chat"], ["eval", "infill", "--data", data],
    ):  # fmt: skip
        assert run(capsys, *command, "--model", tmp_path / "wide", "--max-new-tokens", 9)
    assert max(generate(model, [[1, 2]], max_new_tokens=9)[0]) >= tokenizer.vocab_size


def test_ids_that_end_a_models_texts_are_kept_through_import_and_export(folder, tmp_path, capsys, tokenizer):
    def written(model):
        return run(capsys, "generate", "--model", model, "--prompt", "def ", "--max-new-tokens", 9).removesuffix("\n")

    prompt = completion_prompt(tokenizer, "def ", max_tokens=99).tokens
    free = generate(import_model(folder), [prompt], max_new_tokens=9)[0]
    end = next(token for token in free[2:] if token not in free[:2])
    expected = tokenizer.decode(free[: free.index(end)])
    assert written(folder).startswith(expected)
    for name, value in (("generation_config.json", [tokenizer.eos_id, end]), ("config.json", end)):
        model = tmp_path / f"with {name}"
        shutil.copytree(folder, model)
        settings = json.loads((model / name).read_text())
        (model / "generation_config.json").unlink()
        (model / name).write_text(json.dumps(settings | {"eos_token_id": value}))
        run(capsys, "checkpoint", "import", model, model / "imported")
        run(capsys, "checkpoint", "export", model / "imported", model / "again", "--dtype", "fp32")
        for kept in (model, model / "imported", model / "again"):
            assert written(kept) == expected
        for file in ("generation_config.json", "config.json"):
            assert json.loads((model / "again" / file).read_text())["eos_token_id"] == [tokenizer.eos_id, end]
    (model / "config.json").write_text(json.dumps(settings | {"eos_token_id": "2"}))
    said = refusal(capsys, "generate", "--model", model, "--prompt", "def ")
    assert "config.json: eos_token_id = '2': expected a number or a list of numbers" in said


def test_every_command_ends_where_the_model_does(folder, tmp_path, capsys, monkeypatch, tokenizer):
    model, gap = shutil.copytree(folder, tmp_path / "model"), tmp_path / "gap.py"
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": list(range(tokenizer.vocab_size))}))
    gap.write_text("x = <FILL>\n")
    monkeypatch.setattr("sys.stdin", io.StringIO("say\n"))
    for command in (
        ["generate", "--prompt", "x"], ["infill", gap], ["infill", gap, "--line", 1], ["chat", "--system", "x"],
    ):  # fmt: skip
        assert run(capsys, *command, "--model", model) == "\n"
    data = write_jsonl(tmp_path / "lines.jsonl", [HOLE])
    run(capsys, "eval", "infill", "--data", data, "--model", model, "--out", tmp_path / "out")
    assert '"completion": ""' in (tmp_path / "out" / "completions.jsonl").read_text()
    write_shard(tmp_path / "0.parquet", source_files())
    rows = tmp_path / "rows.jsonl"
    run(capsys, "eval", "infill", "--data", tmp_path / "0.parquet", "--model", model, "--out", rows)
    assert {json.loads(line)["completion"] for line in rows.read_text().splitlines()} == {""}


def test_chat_answers_every_turn_of_a_pipe(folder, capsys, monkeypatch, tokenizer):
    model_tokens: list[list[int]] = []
    real = generate

    def record(model, prompts, **more):
        model_tokens.append(list(prompts[0]))
        return real(model, prompts, **more)

    monkeypatch.setattr("megacoder.cli.model_folder.generate", record)
    monkeypatch.setattr("sys.stdin", io.StringIO("first \\\nline\n\nsecond\n"))
    assert run(capsys, "chat", "--model", folder, "--max-new-tokens", 4, "--system", "x").count("\n") >= 2
    assert model_tokens[0] == chat_tokens(tokenizer, [("system", "x"), ("user", "first \nline")])
    assert len(model_tokens) == 2
    assert tokenizer.eot_id in model_tokens[1]


def test_chat_skips_a_turn_that_is_not_utf8_and_answers_the_next(capsys, monkeypatch):
    typed = b"gr\xc3\xb6\xc3\x9fer\ncaf\xe9\nfirst\\\ncaf\xe9\nlast\n"
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(typed), encoding="utf-8"))
    assert list(_turns()) == ["größer", "last"]
    told = capsys.readouterr().err.splitlines()
    assert [line.partition(" is not UTF-8 and is skipped")[0] for line in told] == [
        r"'caf\udce9'", r"'first\ncaf\udce9'",
    ]  # fmt: skip


def test_a_local_model_and_a_transformers_folder_are_scored(folder, tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    data = write_jsonl(tmp_path / "lines.jsonl", [HOLE])
    words = ["eval", "infill", "--data", data, "--json", "--max-new-tokens", 4, "--model"]
    ours = json.loads(run(capsys, *words, folder))
    other = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=400, n_embd=16, n_layer=1, n_head=1))
    other.save_pretrained(tmp_path / "gpt2")
    transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "gpt2")
    theirs = json.loads(run(capsys, *words, tmp_path / "gpt2"))
    for summary in (ours, theirs):
        assert summary["num_tasks"] == 1
        assert set(summary["scores"][""]) == {"exact_match", "edit_similarity"}


def test_tp_2_on_the_command_line_prints_once(folder, capsys):
    words = ["generate", "--model", folder, "--prompt", "def ", "--max-new-tokens", 4, "--dtype", "float32"]
    two = on_two_ranks(*words)
    assert (two.returncode, two.stdout) == (0, run(capsys, *words)), two.stderr


def test_a_missing_model_is_reported_once_by_two_ranks(tmp_path):
    done = on_two_ranks("generate", "--model", tmp_path / "gone", "--prompt", "def ")
    assert done.returncode == 1
    assert done.stderr.count(str(tmp_path / "gone")) == 1, done.stderr


def test_two_ranks_chat_like_one(folder):
    words = [sys.executable, "-m", "megacoder", "chat", "--model", str(folder), "--max-new-tokens", "5"]
    told = {"input": "first \\\nline\n\nsecond größer\n", "capture_output": True, "text": True, "timeout": 240}
    one, two = (subprocess.run([*words, "--dtype", "float32", "--tp", tp], check=False, **told) for tp in ("1", "2"))
    assert (one.returncode, two.returncode) == (0, 0), two.stderr
    assert two.stdout == one.stdout
    assert one.stdout.count("\n") >= 2


def test_a_folder_without_a_tokenizer_uses_the_given_one(folder, tmp_path, capsys):
    shutil.copytree(folder, tmp_path / "model", ignore=shutil.ignore_patterns("tokenizer*"))
    words = ["generate", "--prompt", "def ", "--max-new-tokens", 4, "--model"]
    given = run(capsys, *words, tmp_path / "model", "--tokenizer", folder)
    assert run(capsys, *words, folder) == given


def test_tp_2_resumes_an_evaluation(folder, tmp_path, capsys):
    prompts = [f"def f(x):\n    {line}\n" for line in ("y = x", "y = x + 1", "y = 2")]
    data = write_jsonl(tmp_path / "lines.jsonl", [{**HOLE, "prompt": prompt} for prompt in prompts])
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    words = ["eval", "infill", "--data", data, "--max-new-tokens", 5, "--model", folder, "--json", "--out"]
    printed = run(capsys, *words, alone)
    shared.mkdir()
    shutil.copy(alone / "settings.json", shared)
    expected = (alone / "completions.jsonl").read_text().splitlines()
    (shared / "completions.jsonl").write_text(expected[1] + "\n" + expected[0][:9])  # as a crash leaves it
    two = on_two_ranks(*words, shared)
    assert (two.returncode, two.stdout) == (0, printed), two.stderr
    assert sorted((shared / "completions.jsonl").read_text().splitlines()) == sorted(expected)
