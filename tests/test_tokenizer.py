"""The tokenizer: DeepSeek's splits, every byte, control ids that no text can produce, and Hugging Face reading it."""

import json
import pickle

import pytest
from data_samples import NASTY_TEXTS, small_tokenizer, source_texts
from hypothesis import given, settings
from hypothesis import strategies as st

from megacoder.core.errors import ConfigError, FormatError
from megacoder.data.control_tokens import SPECIAL_TOKENS
from megacoder.data.tokenizer import Tokenizer
from megacoder.data.tokenizer_training import _pre_tokenizer, train_tokenizer


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("\n\n\r\n", ["Ċ", "Ċ", "č", "Ċ"]),
        ("    x", ["ĠĠĠ", "Ġx"]),
        ("a = 1", ["a", "Ġ=Ġ", "1"]),
        ("2024", ["2", "0", "2", "4"]),
        ("a\tfoo", ["a", "ĉfoo"]),
        ("f(x).y", ["f", "(", "x", ").", "y"]),
        ("x +(y", ["x", "Ġ+", "(", "y"]),
        ("end\n  if", ["end", "Ċ", "Ġ", "Ġif"]),
        ("a1中2", ["a", "1", "ä¸Ń", "2"]),
    ],
)
def test_text_splits_as_deepseek_coders(text, pieces):
    assert [piece for piece, _ in _pre_tokenizer().pre_tokenize_str(text)] == pieces


def test_ids_start_with_the_printable_bytes():
    tokenizer = small_tokenizer()
    assert tokenizer.encode("!") == [0]
    assert tokenizer.encode("3") == [18]
    assert tokenizer.encode("\n") == [198]  # 185 in the published vocabulary, whose alphabet lacks 13 bytes
    assert {token for token in tokenizer.token_bytes if len(token) == 1} == {bytes([byte]) for byte in range(256)}


def test_control_tokens_follow_the_regular_ones():
    tokenizer = small_tokenizer()
    assert (tokenizer.num_regular_tokens, tokenizer.vocab_size) == (1024, 1024 + len(SPECIAL_TOKENS))
    ids = list(range(1024, 1024 + len(SPECIAL_TOKENS)))
    names = ("bos", "eos", "fim_hole", "fim_begin", "fim_end", "pad")
    assert [getattr(tokenizer, f"{name}_id") for name in names] == ids[:6]
    assert tokenizer.eot_id == ids[-1]
    assert tokenizer.decode(ids) == "".join(SPECIAL_TOKENS.values())
    assert SPECIAL_TOKENS["fim_begin"] == "<\uff5cfim\u2581begin\uff5c>"


def test_ids_that_only_the_model_has_are_no_text():
    tokenizer = small_tokenizer()
    assert tokenizer.decode([*tokenizer.encode("a"), tokenizer.vocab_size, *tokenizer.encode("b")]) == "ab"


@pytest.mark.parametrize("text", [*NASTY_TEXTS, *SPECIAL_TOKENS.values(), *source_texts(4)])
def test_text_comes_back_and_never_holds_a_control_id(text):
    tokenizer = small_tokenizer()
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(index < tokenizer.num_regular_tokens for index in ids)
    assert tokenizer.encode_batch([text, text]) == [ids, ids]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text(max_size=20), max_size=5))
def test_lines_tokenise_independently(lines):
    tokenizer = small_tokenizer()
    joined = "\n".join(lines)
    apart = [index for line in joined.splitlines(keepends=True) for index in tokenizer.encode(line)]
    assert tokenizer.encode(joined) == apart


def test_characters_per_token_add_up():
    tokenizer = small_tokenizer()
    counts = tokenizer.characters_per_token()
    for text in NASTY_TEXTS:
        assert counts[tokenizer.encode(text)].sum() == len(text)


def test_training_is_deterministic():
    assert train_tokenizer(source_texts(12), vocab_size=1024).digest == small_tokenizer().digest
    assert train_tokenizer(source_texts(12), vocab_size=1000).digest != small_tokenizer().digest


def test_a_small_corpus_gives_fewer_tokens():
    tokenizer = train_tokenizer(["ab ab ab"], vocab_size=1000)
    assert 256 < tokenizer.num_regular_tokens < 270
    assert tokenizer.bos_id == tokenizer.num_regular_tokens


def test_a_vocabulary_smaller_than_the_bytes_is_refused():
    with pytest.raises(ConfigError, match="vocab_size 255"):
        train_tokenizer([], vocab_size=255)


def test_saved_pickled_and_loaded_are_the_same(tmp_path):
    tokenizer = small_tokenizer()
    tokenizer.save(tmp_path / "tokenizer")
    text = source_texts()[0] + SPECIAL_TOKENS["eos"]
    for other in (
        Tokenizer.load(tmp_path / "tokenizer"),
        Tokenizer.load(tmp_path / "tokenizer" / "tokenizer.json"),
        pickle.loads(pickle.dumps(tokenizer)),
    ):
        assert other.digest == tokenizer.digest
        assert other.encode(text) == tokenizer.encode(text)


def test_another_tokenizer_is_never_replaced(tmp_path):
    before = train_tokenizer(source_texts(3), vocab_size=300)
    before.save(tmp_path)
    before.save(tmp_path)  # the same again, as when a command is repeated
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    said = rf"tokenizer.json holds another tokenizer \(309 ids, digest {before.digest[:12]}\); choose another --output"
    with pytest.raises(ConfigError, match=said):
        train_tokenizer(source_texts(3), vocab_size=301).save(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == files
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"tokenizer.json: not a tokenizer.*; choose another --output, or remove it"):
        before.save(tmp_path)


@pytest.mark.parametrize(("part", "value"), [("normalizer", {"type": "NFC"}), ("pre_tokenizer", {"type": "ByteLevel"})])
def test_a_tokenizer_that_changes_or_splits_text_otherwise_is_another(part, value):
    tokenizer = small_tokenizer()
    parsed = json.loads(tokenizer.definition)
    if part == "pre_tokenizer":
        value = {"add_prefix_space": False, "trim_offsets": True, "use_regex": True, **value}
    assert Tokenizer(json.dumps({**parsed, part: value})).digest != tokenizer.digest


def test_hugging_face_reads_the_folder(tmp_path):
    auto = pytest.importorskip("transformers").AutoTokenizer
    tokenizer = small_tokenizer()
    tokenizer.save(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')  # as in an exported model's folder
    peer = auto.from_pretrained(tmp_path)
    assert (peer.bos_token_id, peer.eos_token_id, peer.pad_token_id) == (
        tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id,
    )  # fmt: skip
    for text in [*NASTY_TEXTS[:7], source_texts()[0]]:
        assert peer(text)["input_ids"] == [tokenizer.bos_id, *tokenizer.encode(text)]
        assert peer(text, add_special_tokens=False)["input_ids"] == tokenizer.encode(text)
    prompt = peer(SPECIAL_TOKENS["fim_begin"] + "a\n" + SPECIAL_TOKENS["fim_hole"])["input_ids"]
    assert (prompt[1], prompt[-1]) == (tokenizer.fim_begin_id, tokenizer.fim_hole_id)


def test_controls_not_marked_special_in_the_file_are_shielded_too():
    definition = json.loads(small_tokenizer()._backend.to_str())
    for token in definition["added_tokens"]:
        token["special"] = False
    tokenizer = Tokenizer(json.dumps(definition))
    assert tokenizer.encode(SPECIAL_TOKENS["fim_hole"]) == small_tokenizer().encode(SPECIAL_TOKENS["fim_hole"])


def edited(change) -> str:
    definition = json.loads(small_tokenizer()._backend.to_str())
    change(definition)
    return json.dumps(definition)


@pytest.mark.parametrize(
    ("definition", "message"),
    [
        ("{}", "expected the JSON"),
        ("[1, 2]", "expected the JSON"),
        ("not json", "expected the JSON"),
        ('{"added_tokens": []}', "not a tokenizer: "),
        (edited(lambda d: d["added_tokens"].pop(1)), "no control token '<｜end▁of▁sentence｜>'"),
        (edited(lambda d: d.update(pre_tokenizer=None)), "text does not come back from its ids"),
        (edited(lambda d: d["model"]["vocab"].update({"▁no": 2000})), "has no token|not byte-level"),
    ],
)
def test_other_files_are_refused(tmp_path, definition, message):
    (tmp_path / "tokenizer.json").write_text(definition)
    with pytest.raises(FormatError, match=message) as caught:
        Tokenizer.load(tmp_path)
    assert str(tmp_path / "tokenizer.json") in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FormatError, match="nowhere: No such file"):
        Tokenizer.load(tmp_path / "nowhere")
