"""The recipes scaled down, each from the one before: pre-train -> longer -> instruct, import -> continue."""

import dataclasses
import json
import math
import re

import numpy as np
import pytest
import torch
from command_line import refusal, run_command
from data_samples import write_dataset, write_jsonl, write_texts
from evaluation_samples import make_tokenizer
from train_cases import Case, changed, functions, losses_of, make_case

from megacoder.checkpoint.reader import CheckpointReader
from megacoder.cli import checkpoint_convert
from megacoder.core.config import load_toml
from megacoder.core.errors import ConfigError
from megacoder.data.chat_format import ChatFormat, FormatConfig
from megacoder.data.fim import FimConfig
from megacoder.data.stream import StreamConfig
from megacoder.data.tokenizer import Tokenizer
from megacoder.evaluate import long_context
from megacoder.evaluate.generate import generate
from megacoder.evaluate.long_context import loss_by_position, retrieval
from megacoder.model.conversion import model_of
from megacoder.model.huggingface import import_with_tokenizer
from megacoder.model.transformer import Transformer
from megacoder.ops.rope_scaling import RopeScaling
from megacoder.train.config import RunConfig
from megacoder.train.fragments import load_weights
from megacoder.train.loop import train
from megacoder.train.metrics_log import read_metrics
from megacoder.train.resuming import open_start
from megacoder.train.schedule import ScheduleConfig
from megacoder.train.sft import prepare

WORDS = ("import", "return", "class", "while")
SHORT = FormatConfig(kind="custom", system="")


@pytest.fixture(scope="module")
def recipes(tmp_path_factory):
    """The folder with runs `pretrain`, `long`, `instruct` and `continue`, trained in this order."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCAL_WORLD_SIZE", "2")  # one thread
        case = make_case(tmp_path_factory.mktemp("recipes"))
        base = case.config(
            "pretrain", steps=40, checkpoint_every=40, eval_every=40, schedule={"warmup_steps": 4},
            model={"rope_theta": 10_000.0, "rope_factor": 1.0, "max_position_embeddings": 32},
        )  # fmt: skip
        train(base)

        longer = changed(
            base, output=case.folder / "long", init_from=base.output, init_optimizer=True, steps=10,
            global_batch_size=4, data={"stream": {"seq_length": 128}},
            model={"rope_theta": 100_000.0, "rope_factor": 4.0, "max_position_embeddings": 128},
            schedule=ScheduleConfig(kind="constant", peak_lr=1e-3, warmup_steps=0),
        )  # fmt: skip
        train(longer)

        rows = [{"instruction": f"say {word}", "output": f"{word} {word}"} for word in WORDS]
        data = write_jsonl(case.folder / "instructions.jsonl", rows)
        instruct = changed(
            longer, output=case.folder / "instruct", init_from=longer.output, steps=100,
            data={
                "valid": (), "conversations": {"train": (data,), "format": SHORT},
                "stream": StreamConfig(seq_length=128, document_masks=True, fim=FimConfig(rate=0.0)),
            },
            schedule=ScheduleConfig(kind="cosine", peak_lr=5e-3, warmup_steps=5),
        )  # fmt: skip
        train(prepare(instruct))

        exported, imported = case.folder / "exported", case.folder / "imported"
        checkpoint_convert.export_main([str(base.output), str(exported), "--dtype", "fp32"])
        checkpoint_convert.import_main([str(exported), str(imported)])
        tokenizer = Tokenizer.load(case.folder / "tokenizer")
        texts = [f"Value {n} is scaled by {n % 5} and shifted by {n % 7}.\n" * 3 for n in range(40)]
        write_texts(case.folder / "text", texts, tokenizer)
        mixed = {
            "train": (case.folder / "train", case.folder / "text"), "weights": (70.0, 30.0),
            "tokenizer": imported / "tokenizer", "stream": {"fim": FimConfig(rate=0.0)},
        }  # fmt: skip
        further = {"init_from": imported, "steps": 30, "data": mixed, "schedule": {"peak_lr": 5e-3}}
        train(changed(base, output=case.folder / "continue", **further))
        yield case.folder


def test_losses_fall_and_each_recipe_continues_the_one_before(recipes):
    names = ("pretrain", "long", "instruct", "continue")
    pretrain, longer, instruct, further = (losses_of(recipes / name) for name in names)
    assert pretrain[-1] < 0.8 * pretrain[0]
    assert longer[0] < 0.9 * pretrain[0], "it began with what pre-training had learnt"
    assert np.mean(longer[-3:]) < np.mean(longer[:3])
    assert instruct[-1] < 0.2 < instruct[0]
    assert read_metrics(recipes / "instruct" / "metrics.jsonl")[-1]["skipped_updates"] == 0, "learnt by heart, no spike"
    assert further[0] < pretrain[0]
    assert np.mean(further[-5:]) < np.mean(further[:5])


def test_longer_context_changes_positions_and_nothing_else(recipes):
    config = CheckpointReader(recipes / "long" / "checkpoints").state["config"]["model"]
    assert (config["rope_theta"], config["rope_factor"], config["max_position_embeddings"]) == (100_000.0, 4.0, 128)


def test_the_instructed_model_ends_its_answers(recipes):
    checkpoint_convert.export_main([str(recipes / "instruct"), str(recipes / "chat-model"), "--dtype", "fp32"])
    model, tokenizer = import_with_tokenizer(recipes / "chat-model", dtype=torch.float32)
    settings = json.loads((recipes / "chat-model" / "generation_config.json").read_text())
    assert settings["eos_token_id"] == [tokenizer.eot_id, tokenizer.eos_id]
    chat = ChatFormat(SHORT, tokenizer)
    prompts = [chat.segments([("user", f"say {word}"), ("assistant", "")])[0].ids for word in WORDS]
    answers = generate(model, prompts, max_new_tokens=24, stop_ids=[tokenizer.eot_id])
    assert [tokenizer.decode(answer) for answer in answers] == [f"{word} {word}\n" for word in WORDS]


def test_later_positions_have_lower_loss_and_retrieval_is_measured(recipes):
    checkpoint_convert.export_main([str(recipes / "long"), str(recipes / "long-model"), "--dtype", "fp32"])
    model, tokenizer = import_with_tokenizer(recipes / "long-model", dtype=torch.float32)
    documents = [np.array(tokenizer.encode(text)[:128]) for text in functions(4, first=200)]
    rows = loss_by_position(model, tokenizer, documents, length=128, parts=4)
    assert [row.start for row in rows] == [0, 32, 64, 96]
    assert all(math.isfinite(row.loss) and row.tokens for row in rows)
    assert rows[0].loss > rows[-1].loss, "context helps"
    found = retrieval(model, tokenizer, length=120, depths=(0.0, 0.5), trials=2, seed=1)
    assert [(row.depth, row.trials) for row in found] == [(0.0, 2), (0.5, 2)]
    assert all(0 <= row.found <= row.trials for row in found)


def test_a_definition_is_planted_at_its_depth_and_found_by_its_whole_number(monkeypatch):
    tokenizer, depths, asked, digits = make_tokenizer(), (0.0, 0.25, 1.0), [], 4

    def answers(model, prompts, **options):
        asked.append([tokenizer.decode(prompt) for prompt in prompts])
        assert all(300 < len(prompt) <= 400 - 4 for prompt in prompts)
        return [tokenizer.encode(re.search(r"planted\(\):\n    return (\d+)", text)[1][:digits]) for text in asked[-1]]

    monkeypatch.setattr(long_context, "generate", answers)
    assert [row.found for row in retrieval(None, tokenizer, length=400, depths=depths, trials=3)] == [3, 3, 3]
    for depth, texts in zip(depths, asked, strict=True):
        assert len(set(texts)) == 3, "each trial has a context of its own"
        for text in texts:
            names = re.findall(r"def (\w+)\(", text)
            assert names.index("planted") == round(depth * (len(names) - 1))
            assert text.endswith("\n\nassert planted() == ")
    digits = 3
    assert [row.found for row in retrieval(None, tokenizer, length=400, depths=depths, trials=3)] == [0, 0, 0]


def loss_of_run(run, sequences):
    """Sum over the sequences, whose positions may be beyond those of the run's model."""
    reader = CheckpointReader(run)
    longest = max(map(len, sequences))
    model = Transformer(dataclasses.replace(model_of(reader), max_position_embeddings=longest))
    load_weights(model, reader)
    with torch.no_grad():
        tensors = [torch.tensor([ids]) for ids in sequences]
        return sum(model.loss(ids[:, :-1], ids[:, 1:]).item() for ids in tensors)


def test_a_model_is_compared_with_the_one_that_it_extends(recipes, capsys):
    tokenizer = Tokenizer.load(recipes / "tokenizer")
    write_dataset(recipes / "documents", [[tokenizer.encode(text)] for text in ("short", *functions(3, first=200))])
    words = ["eval", "long-context", "--data", recipes / "documents", "--length", 120, "--trials", 1, "--model"]
    code, out, err = run_command(capsys, *words, recipes / "pretrain", recipes / "long", "--json")
    assert code == 0, err
    assert f"{recipes / 'long'}: 3 documents of 120 tokens" in err
    before, after = json.loads(out).values()
    assert [(row["start"], row["stop"], row["tokens"]) for row in after["loss"]][-1] == (105, 120, 45)
    documents = [tokenizer.encode(text)[:120] for text in functions(3, first=200)]
    for name, rows in (("pretrain", before["loss"]), ("long", after["loss"])):
        expected = loss_of_run(recipes / name, [[tokenizer.bos_id, *ids] for ids in documents])
        assert sum(row["loss"] * row["tokens"] for row in rows) == pytest.approx(expected, rel=1e-5), name
    assert [(row["depth"], row["trials"]) for row in after["found"]] == [(0, 1), (0.25, 1), (0.5, 1), (0.75, 1), (1, 1)]
    code, out, _ = run_command(capsys, *words, recipes / "long")
    assert code == 0
    assert "105 to 120" in out
    assert "of 1" in out
    for more, message in (([], "--model: give at least one"), (["x", "--trials", 0], "--trials 0: must be at least 1")):
        assert message in refusal(capsys, *words, *more, code=2)


def test_a_context_is_extended_by_yarn_evaluated_exported_and_gone_on_with(recipes, capsys):
    base = load_toml(RunConfig, recipes / "pretrain" / "run.toml")
    scaling = RopeScaling(kind="yarn", original_max_position_embeddings=32)
    config = changed(
        base, output=recipes / "yarn", init_from=base.output, steps=2, global_batch_size=4,
        data={"stream": {"seq_length": 128}},
        model={"rope_factor": 4.0, "rope_scaling": scaling, "max_position_embeddings": 128},
        schedule=ScheduleConfig(kind="constant", peak_lr=1e-3, warmup_steps=0),
    )  # fmt: skip
    train(config)
    in_words = "RoPE of base 10,000, yarn scaling by 4 from 32 positions"
    tokenizer = Tokenizer.load(recipes / "tokenizer")
    write_dataset(recipes / "long-documents", [[tokenizer.encode(text)] for text in functions(2, first=200)])
    words = ["eval", "long-context", "--length", 100, "--trials", 1, "--data", recipes / "long-documents"]
    code, _, err = run_command(capsys, *words, "--model", recipes / "yarn")
    assert code == 0, err
    assert f"2 documents of 100 tokens; {in_words}\n" in err
    report, exported, imported = recipes / "yarn.html", recipes / "yarn-model", recipes / "yarn-again"
    assert run_command(capsys, "report", recipes / "yarn", "--out", report)[0] == 0
    assert in_words in report.read_text()
    assert run_command(capsys, "checkpoint", "export", recipes / "yarn", exported)[0] == 0
    table = json.loads((exported / "config.json").read_text())
    (exported / "config.json").write_text(json.dumps(table | {"max_position_embeddings": 32}))  # as Qwen's are
    code, _, err = run_command(capsys, "checkpoint", "import", exported, imported)
    assert code == 0, err
    assert in_words in err
    assert "32 positions; its RoPE is scaled to 128, to which max_position_embeddings can be set\n" in err
    assert load_toml(RunConfig, imported / "train.toml").model.rope_scaling == scaling
    assert open_start(changed(config, output=recipes / "further", init_from=imported)).step == 0
    code, _, err = run_command(capsys, "generate", "--model", imported, "--prompt", "x = 1\n" * 40)
    assert code == 0, err
    assert "lines are dropped; its RoPE is scaled to 128, to which max_position_embeddings can be set\n" in err


def test_a_recipe_for_a_checkpoint_of_another_shape_is_refused(recipes):
    vocab_size = Tokenizer.load(recipes / "tokenizer").vocab_size
    other = Case(recipes, vocab_size).config("other", init_from=recipes / "pretrain", model={"hidden_size": 64})
    with pytest.raises(ConfigError, match=r"init_from = .* was made with hidden_size = 32, not 64"):
        train(other)
    assert not (recipes / "other").exists()
