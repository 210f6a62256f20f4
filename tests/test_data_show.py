"""What a step trains, as text: windows of the run, their documents and padding, and what has loss in conversations."""

import json

import pytest
import torch
from command_line import refusal, run_command
from data_samples import small_tokenizer, write_jsonl
from test_sft import SHORT, run_config
from train_cases import make_case

from megacoder.core.config import to_toml
from megacoder.data.showing import show_windows
from megacoder.data.stream import Batch
from megacoder.model.config import ModelConfig
from megacoder.train.loop import train
from megacoder.train.setup import load_tokenizer, open_stream
from megacoder.train.sft import prepare


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    return make_case(tmp_path_factory.mktemp("show"))


def shown(capsys, path, *words):
    code, out, err = run_command(capsys, "data", "show", path, "--json", *words)
    assert code == 0, err
    return json.loads(out)["windows"]


BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
VARIANTS = {
    # name: (options, how a document after another begins, how one before another ends)
    "plain": ([], BOS, EOS),
    "masked": (["--data.stream.document-masks"], BOS, EOS),
    "best fit": (["--data.stream.packing", "best_fit", "--data.stream.document-masks"], BOS, ""),
    "megatron": (["--data.compat", "megatron", "--data.stream.no-add-bos", "--data.stream.fim.rate", "0"], "", EOS),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_documents_are_those_of_the_runs_windows(case, capsys, variant):
    path = case.toml(f"show-{variant.replace(' ', '-')}")
    options, begins, ends = VARIANTS[variant]
    windows = shown(capsys, path, "--step", "3", "--count", "99", *options)
    assert [window["window"] for window in windows] == list(range(1, 9))
    for window in windows:
        documents = window["documents"]
        lengths = [document["tokens"] for document in documents]
        assert [document["first"] for document in documents] == [1 + sum(lengths[:at]) for at in range(len(lengths))]
        assert sum(lengths) == 32
        texts = [document["text"] for document in documents]
        assert all(text.startswith(begins) for text in texts[1:] if text), "all but padding"
        assert all(text.endswith(ends) for text in texts[:-1])


def test_the_text_is_that_of_the_stream_with_its_sentinels(case, capsys):
    changes = {"data": {"stream": {"seq_length": 64, "fim": {"rate": 1.0}}}}
    config, path = case.config("text", **changes), case.toml("text", **changes)
    stream, tokenizer = open_stream(config, load_tokenizer(config), dp_rank=0, dp_size=1), load_tokenizer(config)
    batches = [stream.next_batch() for _ in range(6)]
    for words, step in (((), 4), (("--data.skip-steps", "2:3"), 6)):
        windows = shown(capsys, path, "--step", "4", "--count", "99", *words)
        texts = ["".join(document["text"] for document in window["documents"]) for window in windows]
        assert texts == [tokenizer.decode(row.tolist()) for row in batches[step - 1].tokens]
    assert any("<｜fim▁" in text for text in texts)


def test_windows_are_printed_and_counted_and_searched(case, capsys):
    path = case.toml("printed")
    code, out, err = run_command(capsys, "data", "show", path, "--step", "2", "--count", "2")
    assert (code, out.count("=== step 2, window "), out.count("--- tokens 1 to ")) == (0, 2, 2)
    assert err.endswith("the first 2 of 8 windows; --count shows more\n")
    found = shown(capsys, path, "--step", "2", "--count", "99", "--grep", "def ")
    every = shown(capsys, path, "--step", "2", "--count", "99")
    expected = [[one for one in window["documents"] if "def " in one["text"]] for window in every]
    assert [window["documents"] for window in found] == [documents for documents in expected if documents]
    code, out, err = run_command(capsys, "data", "show", path, "--step", "1", "--grep", "no such text")
    assert (code, out, err) == (0, "", "0 windows of 8 with 'no such text'\n")


def test_a_checkpoint_is_a_shorter_way_to_a_late_step(case, capsys):
    config = case.config("trained")
    train(config)
    path = config.output / "run.toml"
    late = shown(capsys, path, "--step", "5")
    assert shown(capsys, path, "--step", "5", "--checkpoint", config.output / "checkpoints" / "step-00000003") == late
    said = refusal(
        capsys, "data", "show", path, "--step", "3", "--checkpoint", config.output / "checkpoints" / "step-00000003",
        code=2,
    )  # fmt: skip
    assert "was written after step 3; it serves steps from 4 on" in said
    assert "--step 9: the run ends at step 8\n" in refusal(capsys, "data", "show", path, "--step", "9", code=2)
    assert "--step 7: the run ends at step 6\n" in refusal(
        capsys, "data", "show", path, "--step", "7", "--steps", "6", code=2
    )
    assert "step = 0: must be at least 1" in refusal(capsys, "data", "show", path, "--step", "0", code=2)


def test_what_is_trained_of_conversations_is_marked(tmp_path, capsys):
    small_tokenizer().save(tmp_path / "tokenizer")
    turns = [("user", "one", {}), ("assistant", "nein", {"weight": 0}), ("user", "two", {}), ("assistant", "dos", {})]
    row = {"messages": [{"role": role, "content": content, **more} for role, content, more in turns]}
    data = write_jsonl(tmp_path / "data.jsonl", [row, {"instruction": "three", "output": "tres"}])
    model = ModelConfig(
        vocab_size=small_tokenizer().vocab_size, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, max_position_embeddings=512,
    )  # fmt: skip
    config = run_config(
        tmp_path / "run", tmp_path / "tokenizer", data, chat=SHORT, model=model, stream={"seq_length": 128}
    )
    path = tmp_path / "prepared.toml"
    path.write_text(to_toml(prepare(config)))
    window = shown(capsys, path, "--step", "1")[0]["documents"]
    assert sorted(document["trained"] for document in window[:2]) == [["dos\n<|EOT|>"], ["tres\n<|EOT|>"]]
    assert [document["text"] for document in window[2:]] == [""], "padding"
    out = run_command(capsys, "data", "show", path, "--step", "1")[1]
    assert "### Response:\nnein\n<|EOT|>\n### Instruction:\ntwo\n### Response:\n⟦dos\n<|EOT|>⟧" in out
    assert ": padding\n" in out


def test_documents_trained_across_without_bos_end_at_eos():
    tokenizer = small_tokenizer()
    ids = [*tokenizer.encode("one"), tokenizer.eos_id, *tokenizer.encode("two")]
    batch = Batch(tokens=torch.tensor([ids]), labels=torch.tensor([[*ids[1:], 5]]))
    [window] = show_windows(batch, tokenizer)
    assert [document.text for document in window] == ["one<｜end▁of▁sentence｜>", "two"]
