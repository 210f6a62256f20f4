"""DeepSeek-Coder's byte-level BPE: the published pre-tokenizer, every byte in the alphabet, control ids out of reach.

Text goes through five splits in a fixed order and then through bytes, so that a line break is always a token of its
own: lines tokenize independently of each other.

Two faults of the published tokenizer are not repeated. Its alphabet was derived from the corpus, so that 13 bytes were
missing and came back as literal characters (u-umlaut decodes to a broken byte); ours starts from all 256. And source
text that contains a control token's string became that control id; here `encode` takes every text literally, and
callers insert control ids explicitly (`bos_id`, `fim_begin_id`, ...).

Other models' tokenizers can be used if they are byte-level BPE, too, such as Llama 3's and Qwen's. Their control tokens
are those that the tokenizer_config.json beside them names. What needs more than begin, end and padding (fill-in-the-
middle, chat formats) asks for it where it is used.

Source of the splits and strings: DeepSeek-Coder (arXiv:2401.14196, section 3.1), its tokenizer.json, llama.cpp's
LLAMA_VOCAB_PRE_TYPE_DEEPSEEK_CODER.
"""

import functools
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from megacoder.core.console import say
from megacoder.core.errors import ConfigError, FormatError
from megacoder.core.files import write_json, write_text
from megacoder.data.control_tokens import (
    HUGGING_FACE_CONFIG,
    SPECIAL_TOKENS,
    for_literal_text,
    named_bos,
    sentinels_among,
    text_begin,
    text_end,
    token_in_front,
)
from megacoder.data.folder_settings import SETTINGS, chat_template_in, read_object, read_text, token_text

__all__ = ["MIN_VOCAB_SIZE", "Tokenizer", "say_if_changed"]

MIN_VOCAB_SIZE = 256
"""One token for each byte."""

_DEEPSEEKS = {SPECIAL_TOKENS["bos"], SPECIAL_TOKENS["eos"]}
_UTF8_BYTES = [*range(0xC0), *range(0xC2, 0xF5)]
_SELDOM = {0x7F, 0xF1, 0xF2, *range(0x20)} - {*b"\t\n\v\f\r"}
"""Bytes that an alphabet may lack, as StarCoder's and SmolLM2's do: control characters, and what begins the characters
from U+40000 to U+BFFFF, of which there are none."""
_PER_BYTE = 1 << 18  # characters that begin with the same byte, from 0xF1 on
_PLAIN = " A b\n\n  \tC1.\r\n('中' 👍) "
"""A text that every tokenizer must give back."""
_NORMALIZED = ("e\u0301", "\u00e9", "\u212b", "\ufb01", "\u2460", "\u00a0")
"""Texts that some normal form of Unicode changes."""


class Tokenizer:
    """Text to ids and back.

    EOS must be there, other control tokens only where they are used. `beginning` is what a text begins with: BOS,
    nothing where there is none, or none that is put in front (`has_bos`; `bos_id` then is EOS, for a model that must be
    given a first token). `end_ids` end a generated text: EOS, which ends documents, what the settings name instead,
    such as the end of a turn, and what a model's folder adds.

    `control_ids` are the ids of all control tokens by their strings, `added_texts` are other added tokens, which texts
    may hold; `by_spelling` are control tokens that the file does not mark and only their spelling shows.
    `control_texts` are the strings of the control tokens in `SPECIAL_TOKENS` that it has or would have.

    `vocab_size` counts all ids, `token_bytes[i]` are the bytes that id i stands for (a control token's are its
    string's), `definition` is its tokenizer.json.
    """

    def __init__(self, definition: str, named: Mapping[str, str] | None = None, folder: Path | None = None) -> None:
        """`definition` is the text of a tokenizer.json, `named` are its eos and pad where it lacks DeepSeek's, and its
        bos where texts begin with it (`named_bos`); `folder` is where it lies, for messages.

        Raises FormatError where it is not such a tokenizer, or loses text.
        """
        self._named, self._folder = dict(named or {}), folder
        self.definition, self.by_spelling = for_literal_text(definition, self._named.values())
        try:
            self._backend = tokenizers.Tokenizer.from_str(self.definition)
        except Exception as error:  # the library raises bare Exceptions
            raise FormatError(f"not a tokenizer: {error}") from None
        self._backend.encode_special_tokens = True
        self.num_regular_tokens = self._backend.get_vocab_size(with_added_tokens=False)
        added = self._backend.get_added_tokens_decoder().items()
        ids = {token.content: index for index, token in added}
        self.control_ids = {token.content: index for index, token in added if token.special}
        self.added_texts = [token.content for _, token in added if not token.special]
        for _, token in added:
            _check_takes_only_itself(token)
        bos = text_begin(self._named.get("bos"), token_in_front(self._backend), ids)
        eos = text_end(self._named.get("eos", ""), ids)
        pad = SPECIAL_TOKENS["pad"] if SPECIAL_TOKENS["pad"] in ids else self._named.get("pad")
        chosen = {"bos": bos, "eos": eos, "pad": pad}
        self._controls = {name: text for name, text in chosen.items() if text is not None and text in ids}
        self.control_texts = SPECIAL_TOKENS | sentinels_among(ids)
        if "eos" not in self._controls:
            raise FormatError(f"no control token {SPECIAL_TOKENS['eos']!r}, nor an eos_token of tokenizer_config.json")
        self.eos_id = ids[self._controls["eos"]]
        self.bos_id, self.pad_id = (ids[self._controls.get(name, self._controls["eos"])] for name in ("bos", "pad"))
        self.has_bos = "bos" in self._controls
        self.beginning = [self.bos_id] if self.has_bos else []
        self.end_ids = {self.eos_id, ids.get(self._named.get("eos", ""), self.eos_id)}
        self.token_bytes = self._byte_table()
        self.vocab_size = len(self.token_bytes)
        self._missing = self._missing_bytes()
        firsts = [_first_with(byte) for byte in self._missing if byte > 0x7F]
        planes = "".join(f"{first}-{chr(ord(first) + _PER_BYTE - 1)}" for first in firsts)
        self._unspelled = re.compile(f"[{planes}]") if planes else None
        self._check_keeps_text()

    @classmethod
    def load(cls, path: Path) -> "Tokenizer":
        """Reads a tokenizer folder, or the tokenizer.json in it; FormatError names what is wrong with the file."""
        file = path / "tokenizer.json" if path.is_dir() else path
        definition, named = read_text(file), _named_controls(file.parent)
        try:
            return cls(definition, named, file.parent)
        except FormatError as error:
            raise FormatError(f"{file}: {error}") from None

    def save(self, folder: Path) -> None:
        """Writes what `load` and Hugging Face's `AutoTokenizer` read; other files in `folder` are left alone.

        Hugging Face's tokenizer puts BOS in front; `encode` does not. ConfigError where the folder holds another
        tokenizer: ids on disk and in models mean nothing without the one that made them.
        """
        self._check_no_other_in(folder / "tokenizer.json")
        names = {f"{name}_token": self._controls.get(name) for name in ("bos", "eos", "pad")}
        write_json(folder / "tokenizer_config.json", HUGGING_FACE_CONFIG | names)
        write_text(
            folder / "tokenizer.json", self._backend.to_str(pretty=True)
        )  # last: it says that the folder is complete

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, taken literally: no BOS, and no control id whatever the text contains."""
        return self._backend.encode(self.spelled(text), add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text, on all cores unless TOKENIZERS_PARALLELISM=false."""
        spelled = [self.spelled(text) for text in texts]
        return [encoding.ids for encoding in self._backend.encode_batch_fast(spelled, add_special_tokens=False)]

    def spelled(self, text: str) -> str:
        """`text` with U+FFFD for characters of which the alphabet has only a part, whose ids would be no UTF-8."""
        return text if self._unspelled is None or text.isascii() else self._unspelled.sub("\ufffd", text)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The exact bytes that `ids` stand for, control tokens as their strings; a model's further ids are no bytes."""
        table = self.token_bytes
        return b"".join([table[index] for index in ids if index < len(table)])

    def decode(self, ids: Iterable[int]) -> str:
        """`decode_bytes` as text; bytes that are not UTF-8, such as half a character, become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def characters_per_token(self) -> np.ndarray:
        """int32 (vocab_size,): characters that begin in each token, that is bytes other than UTF-8 continuations."""
        return np.array([sum(byte & 0xC0 != 0x80 for byte in token) for token in self.token_bytes], dtype=np.int32)

    def splits(self, text: str) -> list[str]:
        """The pieces of `text` that are encoded each on its own."""
        splitter = self._backend.pre_tokenizer
        return [text[start:end] for _, (start, end) in splitter.pre_tokenize_str(text)] if splitter else [text]

    @functools.cached_property
    def splits_lines(self) -> bool:
        """Whether each line break is a token of its own, so that lines tokenize independently of each other."""
        pieces = self.splits("x \n\n  y\r\nz")
        if any(set(text) & {*"\r\n"} for text in self.added_texts):  # these are found before a text is split
            return False
        return [piece for piece in pieces if "\n" in piece or "\r" in piece] == ["\n", "\n", "\r", "\n"]

    def changed_text(self) -> tuple[str, str] | None:
        """A text that does not come back, and what does: a lost one, else as with Qwen's NFC; None if none is known."""
        texts = (*map(_first_with, self._missing), *_NORMALIZED)
        pairs = ((text, self.decode(self.encode(text))) for text in texts)
        return next((pair for pair in pairs if pair[0] != pair[1]), None)

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 over what decides the ids, all but `by_spelling`; takes a sixth of a second, the first time."""
        ends = {name: self._controls.get(name) for name in ("bos", "eos")}
        return _digest(json.loads(self._backend.to_str()), {} if set(ends.values()) <= _DEEPSEEKS else ends)

    def token_id(self, spelling: str) -> int | None:
        """The id of a token as tokenizer.json spells it: GPT-2's stand-ins for bytes, or a control token's string."""
        return self._backend.token_to_id(spelling)

    def control_id(self, name: str) -> int:
        """The id of a control token by its name in `SPECIAL_TOKENS`; FormatError where the tokenizer lacks it."""
        index = self.token_id(self.control_texts[name])
        if index is None:
            raise FormatError(
                f"the tokenizer has no control token {self.control_texts[name]!r}; to train with it, add it by "
                f"{self.how_to_extend()}"
            )
        return index

    def how_to_extend(self) -> str:
        """The command that adds control tokens to a copy."""
        return f"megacoder tokenizer extend {self._folder or 'TOKENIZER'} --output NEW"

    @property
    def fim_hole_id(self) -> int:
        return self.control_id("fim_hole")

    @property
    def fim_begin_id(self) -> int:
        return self.control_id("fim_begin")

    @property
    def fim_end_id(self) -> int:
        return self.control_id("fim_end")

    @property
    def eot_id(self) -> int:
        """EOS where nothing but that ends an answer."""
        index = self.token_id(SPECIAL_TOKENS["eot"])
        return self.eos_id if index is None else index

    def __reduce__(self) -> tuple[type["Tokenizer"], tuple[str, dict[str, str], Path | None]]:
        return Tokenizer, (self.definition, self._named, self._folder)

    def _check_no_other_in(self, file: Path) -> None:
        if not file.exists():
            return
        try:
            there = Tokenizer.load(file)
        except FormatError as error:
            raise ConfigError(f"{error}; choose another --output, or remove it") from None
        if there.digest != self.digest:
            raise ConfigError(
                f"{file} holds another tokenizer ({there.vocab_size:,} ids, digest {there.digest[:12]}); "
                "choose another --output, or remove it"
            )

    def _byte_table(self) -> list[bytes]:
        byte_of = {character: byte for byte, character in enumerate(_byte_characters())}
        spellings = {index: token for token, index in self._backend.get_vocab(with_added_tokens=True).items()}
        added = {index: token.content for index, token in self._backend.get_added_tokens_decoder().items()}
        table = [b""] * (1 + max(spellings))  # some numbers may have no token, as 100256 of cl100k
        for index, token in sorted(spellings.items()):
            try:
                table[index] = token.encode() if index in added else bytes([byte_of[character] for character in token])
            except KeyError:
                raise FormatError(
                    f"token {token!r} (id {index}) is not byte-level, as in SentencePiece's tokenizers (Llama 2's); "
                    "only byte-level BPE can be used"
                ) from None
        return table

    def _missing_bytes(self) -> list[int]:
        """Bytes of UTF-8 without a token, of which text has next to none; FormatError where it has others, or where
        a control token would stand for them."""
        added = self._backend.get_added_tokens_decoder()
        alphabet = {token for index, token in enumerate(self.token_bytes) if index not in added}
        missing = [byte for byte in _UTF8_BYTES if bytes([byte]) not in alphabet]
        if needed := [byte for byte in missing if byte not in _SELDOM]:
            raise FormatError(
                f"no token for {len(needed)} of the bytes of UTF-8, such as {needed[0]:#04x}: characters with them "
                "would be lost"
            )
        if missing and (unknown := getattr(self._backend.model, "unk_token", None)) is not None:
            raise FormatError(
                f"no token for the byte {missing[0]:#04x}, for which its model gives {unknown!r} (unk_token); remove "
                "that from the model in tokenizer.json, so that it gives none"
            )
        return missing

    def _check_keeps_text(self) -> None:
        for text in (_PLAIN, _PLAIN.strip()):  # a tokenizer may put a space in front of what has none
            if (found := self.decode(self.encode(text))) != text:
                raise FormatError(f"text does not come back from its ids: {text!r} as {found!r}")


def say_if_changed(tokenizer: Tokenizer, path: Path) -> None:
    """Says which texts the tokenizer in `path` changes, if any."""
    if (changed := tokenizer.changed_text()) is not None:
        before, after = map(ascii, changed)
        say(f"{path}: the tokenizer changes text: {before} comes back as {after}")


def _named_controls(folder: Path) -> dict[str, str]:
    """bos, eos and pad as `folder` names them, but no bos that begins no text; FormatError where a file is damaged."""
    settings = read_object(folder / SETTINGS) if (folder / SETTINGS).exists() else {}
    texts = {name: token_text(settings.get(f"{name}_token")) for name in ("eos", "pad")}
    texts["bos"] = named_bos(settings, chat_template_in(folder))
    return {name: text for name, text in texts.items() if text is not None}


def _check_takes_only_itself(token: tokenizers.AddedToken) -> None:
    if not token.special and (token.lstrip or token.rstrip or token.single_word):
        raise FormatError(
            f"the added token {token.content!r} is lstrip, rstrip or single_word: white space around it would be lost, "
            "or its ids depend on what is around; only control tokens can be so"
        )


def _digest(parsed: dict[str, Any], ends: dict[str, str | None]) -> str:
    decisive = {key: parsed[key] for key in ("model", "normalizer", "pre_tokenizer")}
    if ends:
        decisive["ends"] = ends
    decisive["added_tokens"] = [(token["id"], token["content"]) for token in parsed["added_tokens"]]
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()


def _first_with(byte: int) -> str:
    """The first character whose UTF-8 begins with `byte`: one of ASCII's, or one of those from 0xF1 on."""
    return chr(byte if byte < 0x80 else (byte & 7) * _PER_BYTE)


def _byte_characters() -> list[str]:
    """GPT-2's printable stand-in for each byte: itself where printable, else the next character from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) if byte in printable else chr(0x100 + others.index(byte)) for byte in range(256)]
