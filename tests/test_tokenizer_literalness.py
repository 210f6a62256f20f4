"""What other tokenizer.json files hold that would change the ids of texts, or what is read back: ignored or refused."""

import itertools
import json

import numpy as np
import pytest
import tokenizers
from data_samples import small_tokenizer
from tokenizer_folders import LLAMA3, remove_bytes, write_folder
from tokenizers import AddedToken, pre_tokenizers, processors

from megacoder.core.errors import FormatError
from megacoder.data import cutting_places
from megacoder.data.cuts import CharacterCutter
from megacoder.data.cutting_places import CuttingPlaces
from megacoder.data.tokenizer import Tokenizer
from megacoder.data.tokenizer_folder import read_tokenizer_files

END = "<|endoftext|>"


def changed_folder(folder, change):
    """A tokenizer's folder whose tokenizer.json is as `change` has left the library's object."""
    write_folder(folder, LLAMA3, [END], eos_token=END)
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    change(backend)
    backend.save(str(folder / "tokenizer.json"))
    return folder


def with_added(*texts, **flags):
    """The small tokenizer with tokens that are a part of text."""
    backend = tokenizers.Tokenizer.from_str(small_tokenizer().definition)
    backend.add_tokens([AddedToken(text, special=False, normalized=False, **flags) for text in texts])
    return backend.to_str()


@pytest.mark.parametrize(
    "change",
    [
        lambda backend: backend.enable_truncation(3),
        lambda backend: backend.enable_padding(pad_id=900, pad_token=END),
        lambda backend: backend.enable_padding(length=64, pad_id=900, pad_token=END),
    ],
)
def test_no_text_is_cut_short_or_padded(change, tmp_path):
    folder = changed_folder(tmp_path, change)
    tokenizer, texts = Tokenizer.load(folder), ["a", "def f(x):\n    return x + 1\n"]
    assert [tokenizer.decode(tokenizer.encode(text)) for text in texts] == texts
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]
    exported = read_tokenizer_files(folder, max_length=8).files["tokenizer.json"]
    for definition in (exported, tokenizer.definition):  # fastokens reads the latter
        read = tokenizers.Tokenizer.from_str(definition)
        assert (read.padding, read.truncation) == (None, None)


def test_a_space_put_in_front_is_refused(tmp_path):
    def change(backend):
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)

    with pytest.raises(FormatError, match=r"""text does not come back from its ids: "A b.* as " A b"""):
        Tokenizer.load(changed_folder(tmp_path, change))


def test_what_is_put_behind_a_text_is_no_bos(tmp_path):
    def change(backend):
        ids = [(END, backend.token_to_id(END))]
        backend.post_processor = processors.TemplateProcessing(single=f"$A {END}", special_tokens=ids)

    folder = changed_folder(tmp_path, change)
    assert not Tokenizer.load(folder).has_bos
    assert read_tokenizer_files(folder, max_length=8).ids["bos_token_id"] is None


def test_a_control_token_that_stands_for_a_missing_byte_is_refused(starcoder):
    definition = json.loads((starcoder / "tokenizer.json").read_text())
    definition["model"]["unk_token"] = END
    with pytest.raises(FormatError, match=r"no token for the byte 0x04, .* gives '<\|endoftext\|>' \(unk_token\)"):
        Tokenizer(json.dumps(definition), {"eos": END})


def test_an_added_token_is_no_part_of_the_alphabet():
    definition = json.loads(with_added("\t"))
    remove_bytes(definition, 0x09)
    definition["post_processor"] = None
    with pytest.raises(FormatError, match="no token for 1 of the bytes of UTF-8, such as 0x09"):
        Tokenizer(json.dumps(definition))


def test_a_loss_is_told_before_a_normal_form(starcoder):
    definition = json.loads((starcoder / "tokenizer.json").read_text()) | {"normalizer": {"type": "NFC"}}
    assert Tokenizer(json.dumps(definition), {"eos": END}).changed_text() == ("\x04", "")


@pytest.mark.parametrize("flag", ["lstrip", "rstrip", "single_word"])
def test_a_part_of_text_that_takes_what_is_around_is_refused(flag):
    with pytest.raises(FormatError, match=r"the added token '<sep>' is lstrip, rstrip or single_word"):
        Tokenizer(with_added("<sep>", **{flag: True}))


@pytest.mark.parametrize(
    ("added", "text"),
    [(["\n\n", "<br>\n"], "a\n\n\n\nb <br>\n\nx1\n\n"), (["<k9>"], "a<k9>b k9> <k9 91\n<k9>")],
)
def test_no_text_is_cut_inside_of_an_added_token_with_a_line_break_or_a_digit(added, text, monkeypatch):
    tokenizer = Tokenizer(with_added(*added))
    places, cutter, ids = CuttingPlaces(tokenizer), CharacterCutter(tokenizer), np.array(tokenizer.encode(text))
    assert {*map(tokenizer.token_id, added)} <= {*ids.tolist()}
    for first, last in itertools.combinations(range(len(text) + 1), 2):
        parts = cutter.cut(ids, cutter.character_ends(ids), [first, last])
        expected = [tokenizer.encode(part) for part in (text[:first], text[first:last], text[last:])]
        assert [np.concatenate(part).tolist() for part in parts] == expected, (first, last)
    for size in range(1, 8):
        monkeypatch.setattr(cutting_places, "_PART_CHARACTERS", size)
        assert [index for part in places.cut(text) for index in tokenizer.encode(part)] == ids.tolist()
