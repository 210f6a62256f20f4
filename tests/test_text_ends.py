"""Which control token begins texts and which ends them, by what a folder says: once, for training and export alike."""

import json

import pytest
import tokenizers
from tokenizer_folders import LLAMA3, write_folder

from megacoder.core.errors import FormatError
from megacoder.data.chat_format import FormatConfig
from megacoder.data.tokenizer import Tokenizer
from megacoder.data.tokenizer_folder import read_tokenizer_files

LLAMA3S = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
PRINTED = "{{ bos_token }}{{ messages[0].content }}"


def folder_with(folder, **settings):
    """A tokenizer whose file puts no BOS in front."""
    named = {"bos_token": "<s>", "eos_token": "<|endoftext|>", **settings}
    return write_folder(folder, LLAMA3, ["<s>", "<|endoftext|>", "<|im_end|>"], puts_bos=False, **named)


def exported(folder, output, chat=None):
    found = read_tokenizer_files(folder, max_length=8, chat=chat)
    output.mkdir()
    for name, text in found.files.items():
        (output / name).write_text(text)
    return found


@pytest.mark.parametrize(
    ("settings", "begins"),
    [
        ({}, False),
        ({"add_bos_token": True}, True),
        ({"chat_template": PRINTED}, True),
        ({"chat_template": "{{- bos_token }}"}, True),
        ({"chat_template": "{{-bos_token + 'x' }}"}, True),
        ({"chat_template": "{{\n  (bos_token if first else '') + text }}"}, True),
        ({"chat_template": "{% set content = bos_token + content %}"}, True),
        ({"chat_template": "{% if first %}{% set content = bos_token %}{% endif %}"}, True),
        ({"chat_template": "{# {{ bos_token }} is\nfor others #}x"}, False),
        ({"chat_template": "{%- set bos_token = '' -%}x"}, False),
        ({"chat_template": "{% if text == bos_token %}x{% endif %}"}, False),
        ({"chat_template": [{"name": "default", "template": "x"}, {"name": "rag", "template": PRINTED}]}, False),
        ({"chat_template": [{"name": "rag", "template": "x"}, {"name": "default", "template": PRINTED}]}, True),
        ({"chat_template": PRINTED, "add_bos_token": False}, False),
        ({"chat_template": PRINTED, "bos_token": "<|endoftext|>"}, False),
        ({"chat_template": PRINTED, "bos_token": "<|endoftext|>", "eos_token": "<|im_end|>"}, False),
        ({"add_bos_token": True, "bos_token": "<|absent|>"}, False),
        ({"add_bos_token": True, "bos_token": None}, False),
    ],
)
def test_texts_begin_in_an_export_as_they_do_in_training(settings, begins, tmp_path):
    folder = folder_with(tmp_path, **settings)
    named = {"bos_token": {"content": "<s>"}, "eos_token": "<|endoftext|>"}
    (folder / "special_tokens_map.json").write_text(json.dumps(named))
    tokenizer = Tokenizer.load(folder)
    assert (tokenizer.has_bos, tokenizer.beginning) == (begins, [tokenizer.bos_id] if begins else [])
    found = exported(folder, tmp_path / "out")
    ids = tokenizers.Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json")).encode("x").ids
    assert ids == [*tokenizer.beginning, *tokenizer.encode("x")]
    assert found.ids["bos_token_id"] == (tokenizer.bos_id if begins else None)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        written = json.loads(found.files[name])
        assert (written["bos_token"] is not None, written.get("add_bos_token", begins)) == (begins, begins)
    assert Tokenizer.load(tmp_path / "out").digest == tokenizer.digest


def test_early_llama_3_begins_with_its_bos_in_an_export_too(tmp_path):
    """Its file puts none in front, and its settings say nothing but in the template."""
    template = "{% set content = bos_token + content %}"
    folder = write_folder(
        tmp_path, LLAMA3, LLAMA3S, puts_bos=False, bos_token=LLAMA3S[0], eos_token=LLAMA3S[1], chat_template=template
    )  # fmt: skip
    exported(folder, tmp_path / "out")
    text = tokenizers.Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json")).encode("x")
    assert text.tokens == ["<|begin_of_text|>", "x"]


def test_a_damaged_template_is_named(tmp_path):
    folder = folder_with(tmp_path)
    (folder / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(FormatError, match=r"chat_template\.jinja: not UTF-8"):
        Tokenizer.load(folder)
    (folder / "chat_template.jinja").unlink()
    for wrong in ([{"name": "default"}], ["x"], 3):
        settings = json.dumps({"eos_token": "<|endoftext|>", "chat_template": wrong})
        (folder / "tokenizer_config.json").write_text(settings)
        with pytest.raises(FormatError, match=r"tokenizer_config\.json: chat_template: expected a text, or a list"):
            Tokenizer.load(folder)


CHATML = ["<|im_start|>", "<|im_end|>"]


@pytest.mark.parametrize(
    ("controls", "end", "chat"),
    [
        ([*LLAMA3S, "<|EOT|>"], "<|end_of_text|>", FormatConfig()),
        ([*LLAMA3S, *CHATML], "<|end_of_text|>", FormatConfig(kind="chatml")),
        (["<|endoftext|>", *CHATML, "<|EOT|>"], "<|endoftext|>", FormatConfig()),
        (["<|endoftext|>", *CHATML], "<|endoftext|>", FormatConfig(kind="chatml")),
        (["<|endoftext|>", "<|return|>", "<|end|>"], "<|endoftext|>",
         FormatConfig(kind="custom", system="", response="<|end|>", end="<|return|>")),
    ],
)  # fmt: skip
def test_a_tuned_model_keeps_what_ends_documents(controls, end, chat, tmp_path):
    """So that its base's datasets serve it, too."""
    bos = {"bos_token": LLAMA3S[0]} if LLAMA3S[0] in controls else {}
    folder = write_folder(tmp_path, LLAMA3, controls, eos_token=end, **bos)
    base = Tokenizer.load(folder)
    exported(folder, tmp_path / "out", chat)
    tuned = Tokenizer.load(tmp_path / "out")
    turn_end = tuned.token_id(chat.texts["end"].strip())
    assert turn_end != base.eos_id
    assert (tuned.digest, tuned.eos_id, tuned.end_ids) == (base.digest, base.eos_id, {base.eos_id, turn_end})
