"""`megacoder tokenizer extend`: control tokens behind the others of a model's tokenizer, and training with them."""

import json
import os
import shutil

import numpy as np
import pytest
import tokenizers
import torch
from command_line import refusal, run_command
from data_samples import NASTY_TEXTS, small_tokenizer, source_texts, write_jsonl
from tokenizer_folders import LLAMA3, SENTINELS, write_folder
from tokenizers import models
from train_cases import ALONE, changed

from megacoder.cli.loading import Loading
from megacoder.cli.model_folder import load_model
from megacoder.core.config import load_toml
from megacoder.data import tokenizer_extending
from megacoder.data.chat_format import FormatConfig
from megacoder.data.fim import FimConfig
from megacoder.data.folder_settings import chat_template_in, end_ids_in
from megacoder.data.preprocess import PreprocessConfig, preprocess
from megacoder.data.tokenizer import Tokenizer
from megacoder.data.tokenizer_folder import extended_files, read_tokenizer_files
from megacoder.evaluate.transformers_check import largest_logit_difference
from megacoder.model.config import ModelConfig
from megacoder.model.huggingface import export_model
from megacoder.model.init import init_weights
from megacoder.model.transformer import Transformer
from megacoder.parallel.tensor import ALONE as TP_ALONE
from megacoder.train.config import RunConfig
from megacoder.train.loop import Trainer
from megacoder.train.metrics_log import read_metrics
from megacoder.train.sft import prepare

ADDED = ["<｜fim▁hole｜>", "<｜fim▁begin｜>", "<｜fim▁end｜>", "<|User|>", "<|Assistant|>", "<|EOT|>"]


def extend(capsys, *words):
    code, _, said = run_command(capsys, "tokenizer", "extend", *words)
    assert code == 0, said
    return said.splitlines()


def small_model(num_rows):
    model = Transformer(ModelConfig(
        vocab_size=num_rows, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=64, init_std=0.1,
    ))  # fmt: skip
    init_weights(model, seed=0)
    return model


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("name", ["llama3", "qwen"])
def test_control_tokens_follow_the_others_and_no_text_has_other_ids(name, request, tmp_path, capsys):
    folder = request.getfixturevalue(name)
    before, base = contents(folder), Tokenizer.load(folder)
    *lines, last = extend(capsys, folder, "--output", tmp_path / "new", "--add", "<|tool|>", "<|sql|>")
    added = [*ADDED, "<|tool|>", "<|sql|>"]
    assert lines == [f"{base.vocab_size + number}  {text}" for number, text in enumerate(added)]
    assert last.endswith(
        f"a run that starts from the model adds its rows: model.vocab_size = {base.vocab_size + 8}, "
        "or the model's own, if that is larger"
    )
    new = Tokenizer.load(tmp_path / "new")
    assert new.token_bytes == [*base.token_bytes, *(text.encode() for text in added)]
    assert (new.bos_id, new.eos_id, new.pad_id) == (base.bos_id, base.eos_id, base.pad_id), "those that it has learned"
    assert new.control_id("fim_hole") == base.vocab_size
    texts = [*NASTY_TEXTS, *source_texts(20), *added]
    assert new.encode_batch(texts) == base.encode_batch(texts)
    assert contents(folder) == before


def test_transformers_reads_an_extended_folder_as_its_export(qwen, tmp_path, capsys):
    """Lists of added tokens in other files name the new ones, too; a chat template of the model's own stays."""
    transformers = pytest.importorskip("transformers")
    folder = shutil.copytree(qwen, tmp_path / "base")
    size = Tokenizer.load(folder).vocab_size
    listed = {"content": "<|pad|>", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"model_max_length": 77, "added_tokens_decoder": {str(size - 1): {**listed, "special": True}}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "added_tokens.json").write_text(json.dumps({"<|pad|>": size - 1}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [size - 2]}))
    extend(capsys, folder, "--output", tmp_path / "new")
    files = read_tokenizer_files(tmp_path / "new", max_length=None).files
    assert {name: (tmp_path / "new" / name).read_text() for name in files} == files
    assert json.loads(files["added_tokens.json"])["<|EOT|>"] == size + 5
    assert json.loads(files["tokenizer_config.json"])["added_tokens_decoder"][str(size + 5)]["content"] == "<|EOT|>"
    assert chat_template_in(tmp_path / "new") == FormatConfig().jinja
    assert end_ids_in(tmp_path / "new") == [Tokenizer.load(folder).eos_id, size - 2]
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "new")
    assert theirs.convert_tokens_to_ids(ADDED) == list(range(size, size + 6))
    assert theirs.model_max_length == 77
    assert theirs(f"x = 1\n{ADDED[0]}").input_ids == [*Tokenizer.load(folder).encode("x = 1\n"), size]
    (folder / "chat_template.jinja").write_text("{{ 1 }}")
    extend(capsys, folder, "--output", tmp_path / "other")
    assert chat_template_in(tmp_path / "other") == "{{ 1 }}"


def test_only_what_is_missing_is_added_and_spare_rows_are_found(llama3, tmp_path, capsys):
    extend(capsys, llama3 / "tokenizer.json", "--output", tmp_path / "new")
    [line] = extend(capsys, tmp_path / "new", "--output", tmp_path / "again")
    assert line.startswith(f"{tmp_path / 'new'}: has all control tokens of fill-in-the-middle and chat already; ")
    assert not (tmp_path / "again").exists()
    size = Tokenizer.load(tmp_path / "new").vocab_size
    for rows, wanted in ((size + 1, size + 1), (size, size + 1)):
        (tmp_path / "new" / "config.json").write_text(json.dumps({"vocab_size": rows}))
        lines = extend(capsys, tmp_path / "new", "--output", tmp_path / f"with-{rows}", "--add", "<|more|>")
        assert lines[0] == f"{size}  <|more|>"
        assert (f"the {rows:,} rows of the model suffice: " in lines[1]) == (rows > size)
        assert lines[1].endswith(f": model.vocab_size = {wanted}")
    assert extend(capsys, write_deepseeks(tmp_path), "--output", tmp_path / "none")[0].endswith("is not written")


def write_deepseeks(tmp_path):
    small_tokenizer().save(tmp_path / "deepseeks")
    return tmp_path / "deepseeks"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--add", ""], "--add '': a token needs at least one character"),
        (["--add", "<|a|>", "<|b|>", "<|a|>"], "--add '<|a|>': is given twice"),
        (["--add", "<|EOT|>"], "--add '<|EOT|>': is added in any case; leave it out"),
        (["--add", "<|eot_id|>"], "--add '<|eot_id|>': the tokenizer has it already, as id 902; leave it out"),
        (["--add", " return"], "--add ' return': the tokenizer has it already, as id "),
        (["--add", "Ġreturn"], "--add 'Ġreturn': is how the tokenizer's file spells id "),
        (["--add", "é"], "--add 'é': is how the tokenizer's file spells id "),
        (["--add", "<|a|>", "Ċ"], "--add 'Ċ': is how the tokenizer's file spells id "),
    ],
)
def test_a_token_that_cannot_be_added_is_refused(llama3, tmp_path, capsys, words, message):
    assert message in refusal(capsys, "tokenizer", "extend", llama3, "--output", tmp_path / "new", *words, code=2)
    assert not (tmp_path / "new").exists()


def test_a_copy_in_which_an_id_stands_for_another_token_is_not_left_behind(llama3, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        tokenizer_extending, "extended_files",
        lambda files, ids, folder: extended_files(files, ids | {"Ġreturn": max(ids.values()) + 1}, folder),
    )  # fmt: skip
    said = refusal(capsys, "tokenizer", "extend", llama3, "--output", tmp_path / "new")
    assert f"{llama3}: with further tokens its ids stand for others; it cannot be extended" in said
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("added_tokens.json", "{", "not readable as JSON: "),
        ("added_tokens.json", "[1]", "expected a JSON object, got list"),
        (
            "tokenizer_config.json", '{"eos_token": "<|end_of_text|>", "added_tokens_decoder": []}',
            "added_tokens_decoder: expected a JSON object, got list",
        ),
    ],
)  # fmt: skip
def test_a_damaged_list_of_added_tokens_is_named(llama3, tmp_path, capsys, name, text, message):
    folder = shutil.copytree(llama3, tmp_path / "base")
    (folder / name).write_text(text)
    said = refusal(capsys, "tokenizer", "extend", folder, "--output", tmp_path / "new")
    assert f"{folder / name}: {message}" in said
    assert not (tmp_path / "new").exists()


def test_what_is_no_tokenizer_is_not_extended_and_no_folder_replaced(llama3, tmp_path, capsys):
    words = ["tokenizer", "extend"]
    (tmp_path / "new").mkdir()
    assert "new exists already; choose another folder" in refusal(
        capsys, *words, llama3, "--output", tmp_path / "new", code=2
    )
    out = ["--output", tmp_path / "out"]
    assert "nowhere: No such file or directory; expected a" in refusal(capsys, *words, tmp_path / "nowhere", *out)
    (tmp_path / "new" / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>")
    assert "tokenizer.json: No such file or directory" in refusal(capsys, *words, tmp_path / "new", *out)
    sentencepiece = tokenizers.Tokenizer(models.BPE({"<s>": 0, "</s>": 1, "\u2581a": 2}, []))
    sentencepiece.add_special_tokens(["<s>", "</s>"])
    sentencepiece.save(str(tmp_path / "new" / "tokenizer.json"))
    (tmp_path / "new" / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    assert "token '\u2581a' (id 2) is not byte-level" in refusal(capsys, *words, tmp_path / "new", *out)
    assert not (tmp_path / "out").exists()


def test_the_rows_of_a_checkpoints_model_are_found(llama3, tmp_path, capsys):
    """Named as the imported folder, its checkpoint, or the tokenizer beside it; a run's tokenizer may lie elsewhere."""
    base = Tokenizer.load(llama3)
    for more, rows in ((32, base.vocab_size + 32), (0, base.vocab_size + 6)):
        source, start = tmp_path / f"source-{more}", tmp_path / f"start-{more}"
        export_model(small_model(base.vocab_size + more), source, tokenizer_folder=llama3)
        assert run_command(capsys, "checkpoint", "import", source, start)[0] == 0
        names = start, start / "checkpoints" / "step-00000000", start / "tokenizer", start / "tokenizer/tokenizer.json"
        said = {extend(capsys, name, "--output", tmp_path / f"{more}-{n}")[-1].split(";")[1]
                for n, name in enumerate(names)}  # fmt: skip
        adds = "a run that starts from the model adds its rows"
        assert said == {f" {f'the {rows} rows of the model suffice' if more else adds}: model.vocab_size = {rows}"}
    shutil.rmtree(start / "tokenizer")
    words = ["tokenizer", "extend", start, "--output", tmp_path / "new"]
    assert "no tokenizer beside this checkpoint; name the tokenizer's folder" in refusal(capsys, *words, code=2)


@pytest.mark.parametrize(
    ("controls", "lacks", "rate"),
    [
        (SENTINELS["qwen"], "<|User|>, <|Assistant|>, <|EOT|> (some chat formats, not ChatML)", ""),
        (
            ["<|User|>", "<|Assistant|>", "<|EOT|>"], f"{', '.join(ADDED[:3])} (fill-in-the-middle)",
            ", and data.stream.fim.rate (0.5 in the paper)",
        ),
        ([], f"{', '.join(ADDED[:3])} (fill-in-the-middle);\n# {', '.join(ADDED[3:])} (some chat formats, not ChatML)",
         ", and data.stream.fim.rate (0.5 in the paper)"),
    ],
)  # fmt: skip
def test_an_import_says_what_the_missing_tokens_are_for(tmp_path, capsys, controls, lacks, rate):
    folder = write_folder(tmp_path, LLAMA3, ["<|end|>", *controls], eos_token="<|end|>")
    export_model(small_model(Tokenizer.load(folder).vocab_size), tmp_path / "hf", tokenizer_folder=folder)
    assert run_command(capsys, "checkpoint", "import", tmp_path / "hf", tmp_path / "start")[0] == 0
    assert (
        f"\n# Its tokenizer lacks {lacks}. A run that uses any of these needs\n"
        f"#   megacoder tokenizer extend {tmp_path / 'hf'} --output NEW\n"
        f"# with data.tokenizer set to NEW, model.vocab_size to what that says{rate}.\n"
    ) in (tmp_path / "start" / "train.toml").read_text()


def test_a_base_without_control_tokens_becomes_one_that_fills_in_and_chats(llama3, tmp_path, capsys):
    """The whole way: import, extend, preprocess, train with fill-in-the-middle, tune, export."""
    pytest.importorskip("transformers")
    size = Tokenizer.load(llama3).vocab_size
    model = small_model(size)
    source, start, tokenizer = (tmp_path / name for name in ("source", "start", "tokenizer"))
    export_model(model, source, dtype=torch.float32, tokenizer_folder=llama3)
    assert run_command(capsys, "checkpoint", "import", source, start)[0] == 0
    assert f"#   megacoder tokenizer extend {source} --output NEW\n" in (start / "train.toml").read_text()
    assert extend(capsys, source, "--output", tokenizer)[-1].endswith(f"model.vocab_size = {size + 6}")
    rows = write_jsonl(tmp_path / "in.jsonl", [{"content": text} for text in source_texts(4)])
    preprocess(PreprocessConfig(input=(rows,), tokenizer=tokenizer, output=tmp_path / "train", workers=1))
    base = changed(
        load_toml(RunConfig, start / "train.toml"), output=tmp_path / "run", steps=2, global_batch_size=2,
        micro_batch_size=1, device="cpu", dtype="float32", model={"vocab_size": size + 6},
        data={"train": (tmp_path / "train",), "tokenizer": tokenizer, "stream": {"fim": FimConfig(rate=1.0)}},
        schedule={"warmup_steps": 1, "peak_lr": 1e-2},
    )  # fmt: skip
    Trainer(base, ALONE).run()
    answers = write_jsonl(tmp_path / "answers.jsonl", [{"instruction": f"say {n}", "output": f"{n}"} for n in range(9)])
    chat = FormatConfig(
        kind="custom", system="", instruction="<|User|>{content}", response="<|Assistant|>", end="<|EOT|>"
    )
    tuned = changed(
        base, output=tmp_path / "tuned", init_from=base.output,
        data={"train": (), "conversations": {"train": (answers,), "format": chat},
              "stream": {"document_masks": True, "fim": FimConfig(rate=0.0)}},
    )  # fmt: skip
    Trainer(prepare(tuned), ALONE).run()
    for folder in (base.output, tuned.output):
        assert np.isfinite([row["loss"] for row in read_metrics(folder / "metrics.jsonl")]).all()
    assert capsys.readouterr().err.count(f"vocabulary enlarged from {size} to {size + 6} rows") == 1
    run_command(capsys, "checkpoint", "export", tuned.output, tmp_path / "out", "--dtype", "fp32")
    exported, tokens = Tokenizer.load(tmp_path / "out"), Tokenizer.load(tokenizer)
    assert exported.end_ids == {tokens.eos_id, size + 5}
    assert exported.digest == tokens.digest, "the datasets of the base serve the tuned model, too"
    assert chat_template_in(tmp_path / "out") == chat.jinja
    text = [tokens.bos_id, tokens.fim_begin_id, *tokens.encode("x = 1\n"), tokens.fim_hole_id, tokens.eot_id]
    ours, _ = load_model(tuned.output, Loading(dtype="float32"), tp=TP_ALONE)
    assert largest_logit_difference(ours, tmp_path / "out", text) < 1e-4
