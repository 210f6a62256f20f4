"""Other models' sentinels of fill-in-the-middle: found, used and sent as each model has learned them."""

import pickle
import re

import numpy as np
import pytest
from command_line import refusal, run_command
from data_samples import source_texts
from evaluation_samples import make_model
from tokenizer_folders import LLAMA3, SENTINELS, write_folder, write_llama3

from megacoder.core.errors import ConfigError, FormatError
from megacoder.data import encoders
from megacoder.data.control_tokens import SPECIAL_TOKENS, infill_text
from megacoder.data.cuts import CharacterCutter
from megacoder.data.fim import FillInTheMiddle, FimConfig
from megacoder.data.tokenizer import Tokenizer
from megacoder.evaluate.benchmarks.base import Task
from megacoder.evaluate.benchmarks.completions import Decoding, Request
from megacoder.evaluate.benchmarks.endpoint import EndpointSource
from megacoder.evaluate.benchmarks.local import TransformersSource
from megacoder.evaluate.prompts import infill_prompt
from megacoder.model.huggingface import export_model

DEEPSEEKS = {name: SPECIAL_TOKENS[name] for name in ("fim_begin", "fim_hole", "fim_end")}


@pytest.fixture(params=SENTINELS)
def with_sentinels(request, tmp_path):
    """(folder of a tokenizer that has them, in the order of begin, hole, end; their strings)"""
    names = SENTINELS[request.param]
    controls = ["<|endoftext|>", names[0], names[2], names[1]]
    return write_folder(tmp_path, LLAMA3, controls, eos_token="<|endoftext|>"), names


def test_fill_in_the_middle_has_a_models_own_sentinels(with_sentinels):
    folder, names = with_sentinels
    tokenizer = Tokenizer.load(folder)
    begin, hole, end = (tokenizer.token_bytes.index(name.encode()) for name in names)
    fim = FillInTheMiddle(FimConfig(rate=1.0), CharacterCutter(tokenizer), seed=3)
    text = source_texts(1)[0]
    ids = fim(np.array([*tokenizer.encode(text), tokenizer.eos_id]), epoch=0, file=0).tolist()
    assert [index for index in ids if index in (begin, hole, end)] == [begin, hole, end]
    prefix, suffix = (tokenizer.decode(ids[ids.index(a) + 1 : ids.index(b)]) for a, b in ((begin, hole), (hole, end)))
    assert prefix + tokenizer.decode(ids[ids.index(end) + 1 : -1]) + suffix == text
    prompt = infill_prompt(tokenizer, "x = ", "\n", max_tokens=50).tokens
    assert prompt == [begin, *tokenizer.encode("x = "), hole, *tokenizer.encode("\n"), end]


def test_a_sentinel_in_a_text_is_text(with_sentinels):
    folder, names = with_sentinels
    tokenizer = Tokenizer.load(folder)
    for name in names:
        ids = tokenizer.encode(f"a {name}b")
        assert tokenizer.decode(ids) == f"a {name}b"
        assert tokenizer.token_bytes.index(name.encode()) not in ids


def test_sentinels_that_are_there_are_not_added(with_sentinels, tmp_path, capsys):
    folder, _ = with_sentinels
    _, _, said = run_command(capsys, "tokenizer", "extend", folder, "--output", tmp_path / "new")
    assert [line.split()[-1] for line in said.splitlines()[:-1]] == ["<|User|>", "<|Assistant|>", "<|EOT|>"]
    assert Tokenizer.load(tmp_path / "new").token_bytes[-3:] == [b"<|User|>", b"<|Assistant|>", b"<|EOT|>"]
    assert Tokenizer.load(tmp_path / "new").control_id("fim_hole") == Tokenizer.load(folder).control_id("fim_hole")


@pytest.mark.parametrize("spm", [False, True])
def test_transformers_is_asked_with_its_models_sentinels(with_sentinels, tmp_path, monkeypatch, spm):
    pytest.importorskip("transformers")
    folder, names = with_sentinels
    tokenizer = Tokenizer.load(folder)
    export_model(make_model(tokenizer), tmp_path / "model", tokenizer_folder=folder)
    source, seen = TransformersSource(tmp_path / "model", Decoding(spm=spm), device="cpu"), []
    monkeypatch.setattr(source.model, "generate", lambda ids, **options: seen.append(ids[0].tolist()) or ids)
    list(source.complete([Request(task=Task(id="0", prompt="x = ", suffix="\n"), sample=0, stops=())]))
    begin, hole, end = (tokenizer.token_bytes.index(name.encode()) for name in names)
    before, after = tokenizer.encode("x = "), tokenizer.encode("\n")
    assert seen == [[begin, hole, *after, end, *before] if spm else [begin, *before, hole, *after, end]]


def test_the_check_of_an_encoder_spells_out_a_models_own_sentinels(with_sentinels):
    """A vocabulary's tokens stand on lines of their own there; control tokens also within other text."""
    folder, names = with_sentinels
    texts = encoders._check_texts(Tokenizer.load(folder))
    for name in names:
        assert {f"{left}{name}{right}" for left in "a " for right in "1\n"} <= {*texts}


def test_what_to_do_without_sentinels_is_said_where_they_are_needed(tmp_path, capsys):
    """The folder of the tokenizer, also after a copy to another process."""
    tokenizer = Tokenizer.load(write_llama3(tmp_path))
    added = f"to train with it, add it by megacoder tokenizer extend {tmp_path} --output NEW"
    message = f"the tokenizer has no control token '<｜fim▁begin｜>'; {added}"
    with pytest.raises(FormatError, match=f"^{re.escape(message)}$"):
        pickle.loads(pickle.dumps(tokenizer)).control_id("fim_begin")
    with pytest.raises(FormatError, match=r"by megacoder tokenizer extend TOKENIZER --output NEW$"):
        Tokenizer(tokenizer.definition, {"eos": "<|end_of_text|>"}).control_id("fim_begin")
    (tmp_path / "gap.py").write_text("x = <FILL>\n")
    export_model(make_model(tokenizer), tmp_path / "model", tokenizer_folder=tmp_path)
    said = refusal(capsys, "infill", "--model", tmp_path / "model", tmp_path / "gap.py")
    assert f"megacoder tokenizer extend {tmp_path / 'model'} --output NEW" in said


def test_sentinels_are_of_one_model(tmp_path):
    """A part of another's, as when text has trained one of them, is none; DeepSeek-Coder's own come first."""
    deepseeks = list(DEEPSEEKS.values())
    for number, (controls, found) in enumerate(
        [
            ([*SENTINELS["qwen"][:2], *SENTINELS["starcoder"]], SENTINELS["starcoder"]),
            ([*SENTINELS["qwen"], *deepseeks], deepseeks),
            ([*SENTINELS["qwen"][:2], SENTINELS["starcoder"][2]], None),
        ]
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        tokenizer = Tokenizer.load(write_folder(folder, LLAMA3, ["<|end|>", *controls], eos_token="<|end|>"))
        if found is None:
            with pytest.raises(FormatError, match=f"no control token '{deepseeks[0]}'"):
                tokenizer.control_id("fim_begin")
        else:
            ids = [tokenizer.control_id(name) for name in ("fim_begin", "fim_hole", "fim_end")]
            assert [tokenizer.token_bytes[index].decode() for index in ids] == found


def test_a_server_whose_tokenizer_has_no_sentinels_is_not_asked(tmp_path):
    folder = write_llama3(tmp_path)
    source = EndpointSource("http://localhost:1/v1", Decoding(), model="m", tokenizer=folder)
    request = Request(task=Task(id="0", prompt="x = ", suffix="\n"), sample=0, stops=())
    with pytest.raises(ConfigError, match="the tokenizer of --tokenizer has no <｜fim▁begin｜>, nor marks of other"):
        list(source.complete([request]))


def test_a_server_is_asked_with_its_models_sentinels(with_sentinels, monkeypatch, capsys):
    folder, (begin, hole, end) = with_sentinels
    task = Task(id="0", prompt="x = ", suffix="\n")
    request = Request(task=task, sample=0, stops=())
    host = folder.name.replace("_", "-")  # a line is said once for each server
    for tokenizer, spm, expected in (
        (folder, False, f"{begin}x = {hole}\n{end}"),
        (folder, True, f"{begin}{hole}\n{end}x = "),
        (None, False, infill_text("x = ", "\n", DEEPSEEKS)),
    ):
        source = EndpointSource(f"http://{host}:1/v1", Decoding(spm=spm), model="m", tokenizer=tokenizer)
        asked = []
        monkeypatch.setattr(
            source, "_call", lambda path, body, asked=asked: asked.append(body) or {"choices": [{"text": "1"}]}
        )
        assert [text for _, text in source.complete([request])] == ["1"]
        assert asked[0]["prompt"] == expected
        assert ("asked to fill in with <｜fim▁begin｜>" in capsys.readouterr().err) == (tokenizer is None)
