"""The tool that compares published tokenizers finds no difference in sound ones, and the faults that are planted."""

import types

import check_tokenizer
import numpy as np
import pytest
import tokenizers
from data_samples import NASTY_TEXTS, source_texts

from megacoder.data.cutting_places import CuttingPlaces

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
    monkeypatch.setattr(CuttingPlaces, "borders", lambda self, ids: np.arange(len(ids) + 1))
    assert {line[:11] for line in compare(llama3).differences} == {"characters "}
