"""The tool that compares published tokenizers finds no difference in sound ones, and the faults that are planted."""

import types

import check_tokenizer
import numpy as np
import pytest
import tokenizers
from data_samples import NASTY_TEXTS, source_texts, write_jsonl

from megacoder.core.errors import ConfigError
from megacoder.data.cutting_places import CuttingPlaces
from megacoder.data.tokenizer import Tokenizer

TEXTS = [*NASTY_TEXTS, "<|endoftext|> in a text", *source_texts(3)]


def compare(folder):
    return check_tokenizer.compare(folder, iter(TEXTS), tokens=1_000_000, seed=0)


@pytest.mark.parametrize(("folder", "with_controls"), [("llama3", 0), ("qwen", 1), ("starcoder", 1)])
def test_sound_tokenizers_differ_nowhere(folder, with_controls, request):
    found = compare(request.getfixturevalue(folder))
    assert found.differences == []
    assert (found.texts, found.with_controls, found.changed) == (len(TEXTS), with_controls, folder == "qwen")
    assert found.parts == 15 * (found.texts - 1), "of all but the empty one"


def test_other_ids_and_wrong_cuts_are_found(llama3, qwen, monkeypatch):
    other = tokenizers.Tokenizer.from_file(str(qwen / "tokenizer.json"))
    with monkeypatch.context() as patch:
        theirs = types.SimpleNamespace(from_file=lambda path: other)
        patch.setattr(check_tokenizer, "tokenizers", types.SimpleNamespace(Tokenizer=theirs))
        assert {line[:7] for line in compare(llama3).differences} == {"ids of "}

    def padded(self, texts):
        return [self.encode(texts[0]), [*self.encode(texts[1]), 0]]

    with monkeypatch.context() as patch:
        patch.setattr(Tokenizer, "encode_batch", padded)
        patch.setattr(check_tokenizer, "fast_encoder", lambda *_, **__: None)
        assert {line[:15] for line in compare(llama3).differences} == {"ids in a batch "}
    monkeypatch.setattr(CuttingPlaces, "borders", lambda self, ids: np.arange(len(ids) + 1))
    assert {line[:11] for line in compare(llama3).differences} == {"characters "}


def test_padding_of_the_file_does_not_count_and_it_may_be_named_itself(llama3, tmp_path):
    backend = tokenizers.Tokenizer.from_file(str(llama3 / "tokenizer.json"))
    backend.enable_truncation(3)
    backend.enable_padding(length=8)
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_bytes((llama3 / "tokenizer_config.json").read_bytes())
    assert compare(tmp_path / "tokenizer.json").differences == []


def test_nothing_to_compare_is_refused(llama3, tmp_path, monkeypatch):
    rows = write_jsonl(tmp_path / "in.jsonl", [])
    for words, reason in (([], "no text in 'content' to compare"), (["--tokens", "-5"], "--tokens -5: must be at")):
        monkeypatch.setattr("sys.argv", ["check_tokenizer.py", str(llama3), "--input", str(rows), *words])
        with pytest.raises(ConfigError, match=reason):
            check_tokenizer.main()
