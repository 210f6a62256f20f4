"""Tokenizers of other models: control tokens from their folder, no text lost, what they lack refused where needed."""

import dataclasses
import importlib.util
import itertools
import json
import pickle
import types

import numpy as np
import pytest
import tokenizers
import torch
from command_line import run_command
from data_samples import NASTY_TEXTS, small_tokenizer, source_texts, write_jsonl
from tiny_models import make_model, tiny_config
from tokenizer_folders import LLAMA3, O200K, number_added, remove_bytes, with_controls, write_folder
from tokenizers import decoders, models, pre_tokenizers

from megacoder.core.config import load_toml
from megacoder.core.errors import ConfigError, FormatError
from megacoder.data import cutting_places
from megacoder.data.chat_format import ChatFormat, FormatConfig
from megacoder.data.cuts import CharacterCutter
from megacoder.data.cutting_places import CuttingPlaces
from megacoder.data.encoders import fast_encoder
from megacoder.data.fim import FillInTheMiddle, FimConfig
from megacoder.data.folder_settings import chat_template_in
from megacoder.data.indexed import IndexedDataset
from megacoder.data.merging import MergeConfig, merge
from megacoder.data.preprocess import PreprocessConfig, preprocess
from megacoder.data.sidecar import Sidecar, open_dataset
from megacoder.data.stream import StreamConfig, TokenStream
from megacoder.data.tokenizer import Tokenizer
from megacoder.data.tokenizer_folder import read_tokenizer_files
from megacoder.evaluate import infill
from megacoder.evaluate.prompts import completion_prompt, infill_prompt
from megacoder.model.config import ModelConfig
from megacoder.model.huggingface import export_model, import_model
from megacoder.model.init import init_weights
from megacoder.model.transformer import Transformer
from megacoder.parallel.world import World
from megacoder.train.config import RunConfig
from megacoder.train.loop import Trainer
from megacoder.train.metrics_log import read_metrics


def test_the_folder_names_the_control_tokens(llama3, qwen):
    tokenizer = Tokenizer.load(llama3)
    ids = tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id
    assert [tokenizer.token_bytes[index] for index in ids] == [
        b"<|begin_of_text|>", b"<|end_of_text|>", b"<|end_of_text|>"
    ]  # fmt: skip
    tokenizer = Tokenizer.load(qwen / "tokenizer.json")
    ids = tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id
    assert [tokenizer.token_bytes[index] for index in ids] == [b"<|endoftext|>", b"<|endoftext|>", b"<|pad|>"]


@pytest.mark.parametrize("text", [*NASTY_TEXTS, "<|end_of_text|> in a text", source_texts()[0]])
def test_text_comes_back_and_never_holds_a_control_id(llama3, text):
    tokenizer = Tokenizer.load(llama3)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not {tokenizer.bos_id, tokenizer.eos_id} & {*ids}


@pytest.mark.parametrize("folder", ["llama3", "qwen"])
def test_texts_are_cut_only_where_no_id_changes(folder, request, monkeypatch):
    tokenizer = Tokenizer.load(request.getfixturevalue(folder))
    places = CuttingPlaces(tokenizer)
    monkeypatch.setattr(cutting_places, "_PART_CHARACTERS", 7)
    for text in (*source_texts(4), *NASTY_TEXTS):
        parts = places.cut(text)
        assert [index for part in parts for index in tokenizer.encode(part)] == tokenizer.encode(text)
    assert len(places.cut(source_texts()[0])) > 100


@pytest.mark.parametrize("split", [LLAMA3, O200K])
def test_no_text_is_cut_inside_of_a_contraction_or_an_added_token(split, tmp_path, monkeypatch):
    folder = write_folder(tmp_path, split, ["<|end|>", "<tool_call>", "<k9>"], eos_token="<|end|>")
    tokenizer = Tokenizer.load(folder)
    places, cutter = CuttingPlaces(tokenizer), CharacterCutter(tokenizer)
    text = "it's <tool_call>{we'll}</tool_call> Don'T ab'x_y<k9> " * 2
    ids = np.array(tokenizer.encode(text))
    assert tokenizer.encode("<tool_call>") == [tokenizer.token_id("<tool_call>")]
    assert [bool(places.pattern.search(f"it{mark}")) for mark in "' ."] == [split == LLAMA3, True, True]
    for size in range(1, 20):
        monkeypatch.setattr(cutting_places, "_PART_CHARACTERS", size)
        assert [index for part in places.cut(text) for index in tokenizer.encode(part)] == ids.tolist()
    for first, last in itertools.combinations(range(0, len(text), 3), 2):
        parts = cutter.cut(ids, cutter.character_ends(ids), [first, last])
        expected = [tokenizer.encode(part) for part in (text[:first], text[first:last], text[last:])]
        assert [np.concatenate(part).tolist() for part in parts] == expected, (first, last)


def test_a_copy_is_the_same_and_other_ends_are_another_tokenizer(llama3, tmp_path):
    tokenizer = Tokenizer.load(llama3)
    copied = pickle.loads(pickle.dumps(tokenizer))
    tokenizer.save(tmp_path)
    for other in (copied, Tokenizer.load(tmp_path)):
        assert (other.bos_id, other.eos_id, other.digest) == (tokenizer.bos_id, tokenizer.eos_id, tokenizer.digest)
    named = {"bos": "<|begin_of_text|>", "eos": "<|begin_of_text|>"}
    assert Tokenizer(tokenizer.definition, named).digest != tokenizer.digest
    deepseeks = small_tokenizer()
    assert Tokenizer(deepseeks.definition, {"eos": "<|EOT|>"}).digest == deepseeks.digest
    assert Tokenizer(deepseeks.definition, {"eos": "<|EOT|>"}).eos_id == deepseeks.eos_id


@pytest.mark.parametrize(
    ("controls", "turn", "text"),
    [
        (["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"], "<|eot_id|>", "<|end_of_text|>"),
        (["<|endoftext|>", "<|im_start|>", "<|im_end|>"], "<|im_end|>", "<|endoftext|>"),
        (["<|im_start|>", "<|im_end|>"], "<|im_end|>", "<|im_end|>"),
    ],
)
def test_documents_of_a_tuned_model_end_as_in_its_pretraining(controls, turn, text, tmp_path):
    """Its folder names what ends a turn, which ends what it generates, too; datasets serve the base model and it."""
    folder = write_folder(tmp_path, LLAMA3, controls, eos_token=turn)
    tokenizer = Tokenizer.load(folder)
    ids = {tokenizer.control_ids[turn], tokenizer.control_ids[text]}
    assert (tokenizer.eos_id, tokenizer.end_ids) == (tokenizer.control_ids[text], ids)
    assert tokenizer.digest == Tokenizer(tokenizer.definition, {"eos": text}).digest
    exported = read_tokenizer_files(folder, max_length=8).ids["eos_token_id"]
    assert {*(exported if isinstance(exported, list) else [exported])} == ids


def test_without_a_token_that_ends_a_text_nothing_can_be_trained(llama3, tmp_path):
    definition = (llama3 / "tokenizer.json").read_text()
    for named in ({}, {"eos": "<|absent|>"}):
        with pytest.raises(FormatError, match=r"no control token .*, nor an eos_token of tokenizer_config\.json"):
            Tokenizer(definition, named)
    (tmp_path / "tokenizer.json").write_text(definition)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(FormatError, match=r"tokenizer_config\.json: not readable as JSON"):
        Tokenizer.load(tmp_path)


def without(*absent):
    """The small tokenizer's definition without tokens that have one of these bytes; as in DeepSeek's file, the
    characters that stand for them are added tokens."""
    definition = json.loads(small_tokenizer().definition)
    like = {**definition["added_tokens"][0], "special": False, "normalized": True}
    definition["added_tokens"] += [{**like, "content": letter} for letter in remove_bytes(definition, *absent)]
    number_added(definition)
    definition["post_processor"] = None
    return json.dumps(definition)


def test_bytes_without_a_token_are_refused_unless_no_text_has_them():
    deepseeks = Tokenizer(without(0xC0, 0xC1, *range(0xF5, 0x100)))
    assert deepseeks.num_regular_tokens == small_tokenizer().num_regular_tokens - 13
    for text in NASTY_TEXTS:
        assert deepseeks.decode(deepseeks.encode(text)) == text
    with pytest.raises(FormatError, match="no token for 2 of the bytes of UTF-8, such as 0x0a: characters with them"):
        Tokenizer(without(0x00, 0x0A, 0x9F))


def test_characters_that_next_to_no_text_has_may_be_lost_and_preprocess_says_so(starcoder, tmp_path, capsys):
    """Of one whose first byte has no token, the library would keep the others: ids that are no text."""
    tokenizer = Tokenizer.load(starcoder)
    assert tokenizer.decode(tokenizer.encode("a\x04b\U00040000c\U0007ffff\x16")) == "ab\ufffdc\ufffd"
    kept = "\U0003ffff \U00080000 \U0010ffff \x05"
    assert tokenizer.decode(tokenizer.encode(kept)) == kept
    text = "def f():\n    return '\U00040000'\n" * 20
    rows = write_jsonl(tmp_path / "in.jsonl", [{"content": text}])
    for encoder in ("tokenizers", "auto"):
        output = tmp_path / encoder
        preprocess(PreprocessConfig(input=(rows,), tokenizer=starcoder, output=output, workers=1, encoder=encoder))
        assert "the tokenizer changes text: '\\x04' comes back as ''" in capsys.readouterr().err
        ids = IndexedDataset(output).document(0)
        assert ids.tolist() == [*tokenizer.encode(text), tokenizer.eos_id]
        transform = FillInTheMiddle(FimConfig(rate=1.0), CharacterCutter(tokenizer), seed=0)
        for file in range(20):
            assert tokenizer.decode_bytes(transform(ids, epoch=0, file=file).tolist()).decode("utf-8")


@pytest.mark.skipif(importlib.util.find_spec("fastokens") is None, reason="fastokens is not installed")
def test_fastokens_keeps_no_part_of_a_character_that_has_no_token(tmp_path):
    """With StarCoder's splits it keeps the character's other bytes; with others it raises, and the reference serves."""
    folder = write_folder(tmp_path, LLAMA3, ["<|endoftext|>"], eos_token="<|endoftext|>")
    definition = json.loads((folder / "tokenizer.json").read_text())
    remove_bytes(definition, 0xF1)
    splits = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    backend = tokenizers.Tokenizer.from_str(json.dumps(definition))
    backend.pre_tokenizer = pre_tokenizers.Sequence(splits)
    backend.save(str(folder / "tokenizer.json"))
    tokenizer, text = Tokenizer.load(folder), "a\U00040000b\U0007ffff"
    ids, counts = fast_encoder("fastokens", tokenizer, threads=1)([text, "x"])
    assert (ids.tolist(), counts.tolist()) == ([*tokenizer.encode(text), *tokenizer.encode("x")], [len(ids) - 1, 1])
    assert tokenizer.decode(ids.tolist()) == "a\ufffdb\ufffdx"


def test_a_bos_that_begins_no_text_is_put_in_front_of_none(starcoder, llama3, tmp_path):
    """It is StarCoder's end of texts, and what begins SmolLM2's turns; a template that prints it begins a chat."""
    tokenizer = Tokenizer.load(starcoder)
    assert (tokenizer.beginning, tokenizer.has_bos, tokenizer.bos_id) == ([], False, tokenizer.eos_id)
    assert read_tokenizer_files(starcoder, max_length=8).ids["bos_token_id"] is None
    definition = json.loads((llama3 / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(definition | {"post_processor": None}))
    settings = json.loads((llama3 / "tokenizer_config.json").read_text())
    bos, template = tmp_path / "tokenizer_config.json", "{{ bos_token }}{{ messages[0].content }}"
    for added, begins in (({}, 0), ({"add_bos_token": True}, 1), ({"chat_template": template}, 1)):
        bos.write_text(json.dumps(settings | added))
        assert len(Tokenizer.load(tmp_path).beginning) == begins
        assert (read_tokenizer_files(tmp_path, max_length=8).ids["bos_token_id"] is not None) == begins
    bos.write_text(json.dumps(settings))
    (tmp_path / "chat_template.jinja").write_text(template)
    assert Tokenizer.load(tmp_path).has_bos


def test_numbers_without_a_token_are_no_text():
    """As 100256 of cl100k."""
    definition, usual = json.loads(small_tokenizer().definition), small_tokenizer()
    for token in definition["added_tokens"]:
        token["id"] += 1
        definition["model"]["vocab"][token["content"]] = token["id"]
    definition["post_processor"] = None
    tokenizer = Tokenizer(json.dumps(definition))
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (usual.vocab_size + 1, usual.eos_id + 1)
    assert tokenizer.decode([*tokenizer.encode("a"), usual.num_regular_tokens, *tokenizer.encode("b")]) == "ab"


def test_what_is_spelled_as_a_control_token_is_one(llama3, tmp_path):
    """DeepSeek-V3's file does not mark <｜User｜> and <｜Assistant｜>; <think> is a part of text."""
    definition = json.loads((llama3 / "tokenizer.json").read_text())
    like = {**definition["added_tokens"][0], "special": False}
    definition["added_tokens"] += [{**like, "content": text} for text in ("<｜User｜>", "<｜Assistant｜>", "<think>")]
    number_added(definition)
    tokenizer = Tokenizer(json.dumps(definition), {"eos": "<|end_of_text|>"})
    user, assistant, think = range(tokenizer.vocab_size - 3, tokenizer.vocab_size)
    assert not {user, assistant} & {*tokenizer.encode("a <｜User｜> b<｜Assistant｜>")}
    assert tokenizer.encode("<think>") == [think]
    settings = {"system": "", "instruction": "<｜User｜>{content}", "response": "<｜Assistant｜>", "after": ""}
    chat = ChatFormat(FormatConfig(kind="custom", end="<|end_of_text|>", **settings), tokenizer)
    assert chat.prompt([("user", "<｜User｜>")]) == [
        *tokenizer.beginning, user, *tokenizer.encode("<｜User｜>"), assistant
    ]  # fmt: skip


def test_ids_are_counted_up_to_the_highest(tmp_path):
    """A model must have a row for it, whatever the holes below."""
    tokenizers.Tokenizer(models.BPE({"a": 0, "b": 7}, [])).save(str(tmp_path / "tokenizer.json"))
    assert read_tokenizer_files(tmp_path, max_length=8).vocab_size == 8


@pytest.mark.parametrize("adds", [True, False])
def test_bos_comes_first_in_an_export_as_in_training(tmp_path, adds):
    """DeepSeek-V4's settings leave it to whoever asks, but DeepSeek's BOS begins all texts here."""
    tokenizer = small_tokenizer()
    tokenizer.save(tmp_path)
    definition = json.loads((tmp_path / "tokenizer.json").read_text()) | {"post_processor": None}
    (tmp_path / "tokenizer.json").write_text(json.dumps(definition))
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text()) | {"add_bos_token": adds}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    exported = read_tokenizer_files(tmp_path, max_length=64).files
    assert json.loads(exported["tokenizer_config.json"])["add_bos_token"]
    ids = tokenizers.Tokenizer.from_str(exported["tokenizer.json"]).encode("x").ids
    assert ids == [*Tokenizer.load(tmp_path).beginning, *tokenizer.encode("x")] == [tokenizer.bos_id, *ids[1:]]


def test_white_space_that_does_not_come_back_is_refused():
    definition = json.loads(small_tokenizer().definition)
    definition["pre_tokenizer"]["pretokenizers"][-1]["add_prefix_space"] = True
    with pytest.raises(FormatError, match='text does not come back from its ids: " A b'):
        Tokenizer(json.dumps(definition))


def test_what_is_not_there_is_refused_where_it_is_used(llama3):
    tokenizer = Tokenizer.load(llama3)
    with pytest.raises(FormatError, match=r"the tokenizer has no control token '<\|EOT\|>'"):
        ChatFormat(FormatConfig(), tokenizer)
    extended = with_controls(tokenizer)
    assert extended.bos_id == 903, "DeepSeek's come first"
    ChatFormat(FormatConfig(), extended)


@pytest.mark.parametrize("folder", ["llama3", "qwen"])
def test_files_are_cut_as_if_each_part_were_encoded_in_full(folder, request):
    """Where tokens hold line breaks with what is around them."""
    tokenizer = with_controls(Tokenizer.load(request.getfixturevalue(folder)))
    assert not tokenizer.splits_lines
    cutter, rng = CharacterCutter(tokenizer), np.random.default_rng(0)
    short = "é = f();\n\n\r\n\tdef it's(): \n\n   x  \n  中 ab12+3\n"
    texts = [(short, (first, last)) for last in range(len(short) + 1) for first in range(last + 1)]
    texts += [(text, np.sort(rng.integers(0, len(text) + 1, 9))) for text in source_texts(4) for _ in range(3)]
    for text, cuts in texts:
        ids = np.array(tokenizer.encode(text))
        parts = cutter.cut(ids, cutter.character_ends(ids), cuts)
        expected = [tokenizer.encode(text[start:stop]) for start, stop in itertools.pairwise([0, *cuts, len(text)])]
        assert [np.concatenate(part).tolist() for part in parts] == expected, (text, cuts)


def test_files_are_transformed_by_their_name_and_in_parts(llama3):
    tokenizer = with_controls(Tokenizer.load(llama3))
    text = "/* a/b.c */\n\n" + "int f() {\n\n  return 1;\n}\n" * 30
    tokens = np.array([*tokenizer.encode(text), tokenizer.eos_id])
    for only, changes in (((".c",), True), ((".py",), False)):
        transform = FillInTheMiddle(FimConfig(rate=1.0, only=only), CharacterCutter(tokenizer), seed=1)
        assert (len(transform(tokens, epoch=0, file=0)) > len(tokens)) == changes
    transform = FillInTheMiddle(FimConfig(rate=1.0, context_tokens=64), CharacterCutter(tokenizer), seed=1)
    found = transform(tokens, epoch=0, file=0)
    parts = np.split(found, np.flatnonzero(found == tokenizer.fim_begin_id))[1:]
    assert len(parts) == -(-len(tokens) // 64)
    whole = b""
    for part in parts:
        hole, end = (int(np.flatnonzero(part == index)[0]) for index in (tokenizer.fim_hole_id, tokenizer.fim_end_id))
        sides = part[1:hole], part[end + 1 : -1], part[hole + 1 : end]
        whole += b"".join(tokenizer.decode_bytes(side.tolist()) for side in sides)
    assert whole.decode() == text


def test_an_infilling_prompt_has_the_ids_of_its_texts_in_full(llama3):
    ids = with_controls(Tokenizer.load(llama3))
    prefix, suffix = "def f(x):\n\n    if x:\n\n\n        return (\n", "\n\n  \n    )\n\n"
    assert infill_prompt(ids, prefix, suffix, max_tokens=500).tokens == [
        ids.bos_id, ids.fim_begin_id, *ids.encode(prefix), ids.fim_hole_id, *ids.encode(suffix), ids.fim_end_id
    ]  # fmt: skip


def test_a_prompt_is_no_longer_than_asked_where_lines_have_more_tokens_together(tmp_path):
    """A merge across line breaks prevents those within the lines."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ċ", "Ġ"), ("Ġ", "Ġ"), ("ĠĠ", "Ċ")]
    vocab = {token: index for index, token in enumerate([*alphabet, *map("".join, merges)])}
    backend = tokenizers.Tokenizer(models.BPE(vocab, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>"])
    tokenizer = with_controls(Tokenizer(backend.to_str(), {"eos": "<s>"}))
    assert len(tokenizer.encode("  \n" * 4)) > 4 * len(tokenizer.encode("  \n"))
    for room in range(4, 40):
        assert len(infill_prompt(tokenizer, "  \n" * 9, "  \n" * 9, max_tokens=room).tokens) <= room
        assert len(completion_prompt(tokenizer, "  \n" * 9, max_tokens=room).tokens) <= room


def test_an_imported_model_is_trained_on_and_exported(llama3, tmp_path, capsys):
    torch.manual_seed(0)
    size = Tokenizer.load(llama3).vocab_size
    model = Transformer(ModelConfig(
        vocab_size=size, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=64,
    ))  # fmt: skip
    init_weights(model, seed=0)
    export_model(model, tmp_path / "source", dtype=torch.float32, tokenizer_folder=llama3)
    code, _, err = run_command(capsys, "checkpoint", "import", tmp_path / "source", tmp_path / "start")
    assert (code, "cannot be used" in err) == (0, False), err
    rows = write_jsonl(tmp_path / "in.jsonl", [{"content": text} for text in source_texts(4)])
    preprocess(PreprocessConfig(
        input=(rows,), tokenizer=tmp_path / "start" / "tokenizer", output=tmp_path / "train", workers=1
    ))  # fmt: skip
    assert IndexedDataset(tmp_path / "train").document(0)[-1] == Tokenizer.load(llama3).eos_id
    start = load_toml(RunConfig, tmp_path / "start" / "train.toml")
    assert start.data.stream.fim.rate == 0.0, "it has no tokens for it"
    config = dataclasses.replace(
        start, output=tmp_path / "run", steps=2, global_batch_size=2, micro_batch_size=1, device="cpu",
        dtype="float32", data=dataclasses.replace(start.data, train=(tmp_path / "train",)),
        schedule=dataclasses.replace(start.schedule, warmup_steps=1),
    )  # fmt: skip
    Trainer(config, World(0, 1, 0, torch.device("cpu"), None)).run()
    assert np.isfinite([row["loss"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl")]).all()
    code, _, err = run_command(capsys, "checkpoint", "export", tmp_path / "run", tmp_path / "out", "--dtype", "fp32")
    assert code == 0, err
    assert Tokenizer.load(tmp_path / "out").digest == Tokenizer.load(llama3).digest
    assert chat_template_in(tmp_path / "out") is None, "DeepSeek-Coder's has control tokens that are not there"
    (tmp_path / "start" / "tokenizer" / "chat_template.jinja").write_text("{{ 1 }}")
    run_command(capsys, "checkpoint", "export", tmp_path / "run", tmp_path / "asked")
    assert chat_template_in(tmp_path / "asked") == "{{ 1 }}", "the one that came with the model"
    fim = dataclasses.replace(config.data.stream, fim=dataclasses.replace(config.data.stream.fim, rate=0.5))
    with pytest.raises(ConfigError, match=r"fim\.rate = 0\.5: the tokenizer has no control token .*, or set it to 0"):
        Trainer(
            dataclasses.replace(config, output=tmp_path / "other", data=dataclasses.replace(config.data, stream=fim)),
            World(0, 1, 0, torch.device("cpu"), None),
        )


@pytest.mark.parametrize(
    ("name", "architecture"),
    [("qwen", "Qwen2ForCausalLM"), ("llama3", "LlamaForCausalLM"), ("deepseeks", "LlamaForCausalLM")],
)
def test_a_model_with_biases_has_its_own_tokenizer_in_transformers(name, architecture, request, tmp_path):
    """To every Qwen2, transformers 5 gives Qwen's splits."""
    transformers = pytest.importorskip("transformers")
    small_tokenizer().save(tmp_path / "deepseeks")
    folder = tmp_path / name if name == "deepseeks" else request.getfixturevalue(name)
    tokenizer = Tokenizer.load(folder)
    model = make_model(tiny_config(vocab_size=tokenizer.vocab_size, qkv_bias=True, head_dim=8))
    export_model(model, tmp_path / "hf", tokenizer_folder=folder)
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["architectures"] == [architecture]
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    for text in (*source_texts(2), *NASTY_TEXTS[1:7], *NASTY_TEXTS[8:]):
        assert theirs(text, add_special_tokens=False).input_ids == tokenizer.encode(text)
    assert len(theirs) == tokenizer.vocab_size
    computed = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    tokens = torch.arange(40)[None]
    with torch.no_grad():
        torch.testing.assert_close(model.logits(model(tokens)), computed(tokens).logits, rtol=0, atol=1e-4)
    again = import_model(tmp_path / "hf")
    assert again.config == dataclasses.replace(model.config, vocab_multiple=again.config.vocab_multiple)


def test_a_tokenizer_that_normalizes_says_so(qwen, llama3, tmp_path, capsys):
    rows = write_jsonl(tmp_path / "in.jsonl", [{"content": "e\u0301\n"}])
    for folder, said in ((qwen, True), (llama3, False)):
        preprocess(PreprocessConfig(input=(rows,), tokenizer=folder, output=tmp_path / folder.name, workers=1))
        line = f"{folder}: the tokenizer changes text: 'e\\u0301' comes back as '\\xe9'\n"
        assert (line in capsys.readouterr().err) == said


def test_output_of_before_control_tokens_were_known_by_spelling_is_read_but_not_up_to_date(qwen, tmp_path):
    """Its ids stand for the same, but a text that spells one of them was not literal."""
    rows = write_jsonl(tmp_path / "in.jsonl", [{"content": "a <|im_start|> b"}])
    config = PreprocessConfig(input=(rows,), tokenizer=qwen, output=tmp_path / "out", workers=1)
    assert preprocess(config).controls == ("<|im_start|>",)
    assert preprocess(config).controls == Tokenizer.load(qwen).by_spelling
    preprocess(dataclasses.replace(config, output=tmp_path / "new"))
    described = json.loads((tmp_path / "out.json").read_text())
    del described["controls"]
    (tmp_path / "out.json").write_text(json.dumps(described))
    open_dataset(tmp_path / "out", Tokenizer.load(qwen))
    for parts, controls in ((("new", "new"), ("<|im_start|>",)), (("new", "out"), ())):
        both = tmp_path / f"{'-'.join(parts)}-merged"
        merge(MergeConfig(prefixes=tuple(tmp_path / name for name in parts), output=both))
        assert Sidecar.read(both).controls == controls
    with pytest.raises(ConfigError, match=r"a text that spells '<\|im_start\|>' became that control token; remove it"):
        preprocess(config)


def test_nothing_is_put_in_front_where_there_is_no_bos(qwen, llama3, tmp_path):
    """EOS alone ends a document there, and nothing begins one, as such models are trained and asked."""
    for folder in (qwen, llama3):
        tokenizer = Tokenizer.load(folder)
        ids = tokenizer.encode("x = 1")
        bos = [tokenizer.bos_id] if folder == llama3 else []
        assert completion_prompt(tokenizer, "x = 1", max_tokens=50).tokens == [*bos, *ids]
        assert completion_prompt(tokenizer, "", max_tokens=50).tokens == (bos or [tokenizer.eos_id])
        rows = write_jsonl(tmp_path / f"{folder.name}.jsonl", [{"content": "x = 1"}] * 40)
        prefix = tmp_path / f"{folder.name}-data"
        preprocess(PreprocessConfig(input=(rows,), tokenizer=folder, output=prefix))
        config = StreamConfig(seq_length=16, num_streams=1, fim=FimConfig(rate=0.0))
        stream = TokenStream(
            [IndexedDataset(prefix)], tokenizer, config, global_batch_size=2, dp_rank=0, dp_size=1
        )  # fmt: skip
        served = stream.next_batch().tokens.flatten().tolist()
        document = [*bos, *ids, tokenizer.eos_id]
        assert served == (document * 40)[: len(served)]
        assert stream.state_dict()["order"]["add_bos"] == bool(bos)


def test_an_answer_ends_with_its_line_whatever_holds_the_line_break(llama3, monkeypatch):
    tokenizer, task = (
        with_controls(Tokenizer.load(llama3)),
        infill.InfillTask(repo="r", path="p", line=1, prefix="a\n", truth="f(x):", suffix="\nb\n"),
    )
    answer = tokenizer.encode("f(x):\n\n    y")
    assert b"\n" not in {tokenizer.token_bytes[index] for index in answer}, "it is within tokens"

    def generate(model, prompts, *, watcher, **_):
        return [list(itertools.takewhile(lambda token: not watcher(0, [token]), answer))]

    monkeypatch.setattr(infill, "generate", generate)
    model = types.SimpleNamespace(config=ModelConfig())
    [result] = infill.fill_lines(model, tokenizer, [task])
    assert (result.completion, result.exact_match) == ("f(x):", True)
