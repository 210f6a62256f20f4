"""A tokenizer's folder on its way into and out of a Hugging Face model folder.

transformers chooses a class by `tokenizer_class` and lets it change what tokenizer.json says: `LlamaTokenizerFast`,
which DeepSeek's folders name, puts BOS in front by itself, and transformers 5 doubts that it is meant. So what leaves
here names the one class that changes nothing, and tokenizer.json itself says that BOS comes first. Beside a Qwen2 that
name is not heeded (`TokenizerFiles.is_qwens`).
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import processors

from megacoder.core.errors import FormatError
from megacoder.data.chat_format import FormatConfig
from megacoder.data.chat_template import CHAT_TEMPLATE
from megacoder.data.control_tokens import (
    HUGGING_FACE_CONFIG,
    SPECIAL_TOKENS,
    named_bos,
    text_begin,
    text_end,
    token_in_front,
)
from megacoder.data.folder_settings import (
    CHAT_TEMPLATE_FILE,
    SETTINGS,
    chat_template_in,
    checked_object,
    end_ids_in,
    object_in,
    read_object,
    read_text,
    token_text,
)

__all__ = ["TokenizerFiles", "extended_files", "read_tokenizer_files"]

_DEFINITION = "tokenizer.json"
_ADDED, _SPECIAL = "added_tokens.json", "special_tokens_map.json"
_BESIDE = (_SPECIAL, _ADDED, CHAT_TEMPLATE_FILE)
"""Further files of some folders; copied unchanged, but for a BOS that begins no text."""
_NAMED = ("bos_token", "eos_token", "pad_token")
_QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN_END = "<|endoftext|>"


@dataclass(frozen=True, kw_only=True)
class TokenizerFiles:
    """What a model folder says about its tokenizer."""

    files: dict[str, str]
    """name -> text"""
    ids: dict[str, int | list[int] | None]
    """bos_token_id, eos_token_id (a list where several ids end a text), pad_token_id"""
    vocab_size: int
    """ids, control tokens included"""
    is_qwens: bool
    """whether it normalizes and splits text as Qwen2's and has its end token: transformers 5 gives these to the
    tokenizer of every Qwen2"""


def extended_files(files: dict[str, str], ids: dict[str, int], folder: Path) -> dict[str, str]:
    """`TokenizerFiles.files` of `folder` with further control tokens, whose ids follow the others.

    <|EOT|> must be there or among them: where the folder has no chat template, it gets DeepSeek-Coder's. FormatError
    where one of the files that list added tokens is damaged.
    """
    definition, settings = json.loads(files[_DEFINITION]), json.loads(files[SETTINGS])
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    tokens = {index: {"content": text, **flags} for text, index in ids.items()}
    definition["added_tokens"] += [{"id": index, **token} for index, token in tokens.items()]
    if "added_tokens_decoder" in settings:  # lists of the same, which other programs may read
        listed = checked_object(settings["added_tokens_decoder"], f"{folder / SETTINGS}: added_tokens_decoder")
        settings["added_tokens_decoder"] = listed | {str(index): token for index, token in tokens.items()}
    if _ADDED in files:
        files = files | {_ADDED: _as_json(object_in(files[_ADDED], folder / _ADDED) | ids)}
    if CHAT_TEMPLATE_FILE not in files:
        settings.setdefault("chat_template", CHAT_TEMPLATE)
    return files | {_DEFINITION: _as_json(definition), SETTINGS: _as_json(settings)}


def read_tokenizer_files(folder: Path, *, max_length: int | None, chat: FormatConfig | None = None) -> TokenizerFiles:
    """The files of a tokenizer folder as an exported model has them; `max_length` is the model's in tokens, None where
    there is no model.

    Settings are added where there are none. The chat template is that of `chat`, the format that a model was tuned
    with, whose end marker then ends a text, beside what ends documents, such as what a tuned model fills in. Without
    `chat` it is the folder's own or, where its control tokens are there, DeepSeek-Coder's. Raises FormatError naming
    the file that is missing or wrong.
    """
    beside = _BESIDE if chat is None else ()  # they say how the folder's own model ends a text and is asked
    files = {name: read_text(folder / name) for name in beside if (folder / name).is_file()}
    definition = read_text(folder / _DEFINITION)
    backend = _parsed(definition, folder / _DEFINITION)
    if backend.padding is not None or backend.truncation is not None:
        backend.no_padding()
        backend.no_truncation()
        definition = backend.to_str(pretty=True)
    settings = read_object(folder / SETTINGS) if (folder / SETTINGS).exists() else _usual_settings(backend)
    added = {token.content: index for index, token in backend.get_added_tokens_decoder().items()}
    in_front = token_in_front(backend)
    bos = text_begin(named_bos(settings, chat_template_in(folder)), in_front, added)
    settings = _with_bos(settings, bos)
    if _SPECIAL in files and (named := object_in(files[_SPECIAL], folder / _SPECIAL)) != _with_bos(named, bos):
        files[_SPECIAL] = _as_json(_with_bos(named, bos))
    if chat is not None:
        end = chat.end_token(added)
        if end is None:
            raise FormatError(f"{folder / _DEFINITION}: no token that ends {chat.texts['end']!r}, as answers do")
        settings |= {"chat_template": chat.jinja, "eos_token": end}
    eos, pad = (token_text(settings.get(f"{name}_token")) for name in ("eos", "pad"))
    bos_id, eos_id, pad_id = (None if text is None else backend.token_to_id(text) for text in (bos, eos, pad))
    own_ends = end_ids_in(folder) if chat is None else []
    document_end = added.get(text_end(eos or "", added))
    ends = list(dict.fromkeys(end for end in (eos_id, *own_ends, document_end) if end is not None))
    if bos is not None and in_front != bos:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, added[bos])]
        )
        definition = backend.to_str(pretty=True)
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast"}
    settings |= {} if max_length is None else {"model_max_length": max_length}
    if CHAT_TEMPLATE_FILE not in files and backend.token_to_id(SPECIAL_TOKENS["eot"]) is not None:
        settings.setdefault("chat_template", CHAT_TEMPLATE)
    files |= {_DEFINITION: definition, SETTINGS: _as_json(settings)}
    eos_ids = ends[0] if len(ends) == 1 else ends or None
    ids = {"bos_token_id": bos_id, "eos_token_id": eos_ids, "pad_token_id": pad_id}
    return TokenizerFiles(files=files, ids=ids, vocab_size=_num_ids(backend), is_qwens=_is_qwens(backend))


def _with_bos(settings: dict[str, Any], bos: str | None) -> dict[str, Any]:
    """`settings` that name and add the BOS that texts begin with, or none."""
    named = {} if token_text(settings.get("bos_token")) == bos else {"bos_token": bos}
    adds = {"add_bos_token": bos is not None} if "add_bos_token" in settings else {}
    return settings | named | adds


def _as_json(value: dict[str, Any]) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def _parsed(definition: str, path: Path) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_str(definition)
    except Exception as error:  # the library raises bare Exceptions
        raise FormatError(f"{path}: not a tokenizer: {error}") from None


def _is_qwens(backend: tokenizers.Tokenizer) -> bool:
    definition = json.loads(backend.to_str())
    steps = (definition["pre_tokenizer"] or {}).get("pretokenizers", [])
    splits = [(step["type"], step.get("pattern")) for step in steps]
    return (
        (definition["normalizer"] or {}).get("type") == "NFC"
        and splits == [("Split", {"Regex": _QWEN_SPLIT}), ("ByteLevel", None)]
        and not definition["model"].get("ignore_merges")
        and backend.token_to_id(_QWEN_END) is not None
    )


def _num_ids(backend: tokenizers.Tokenizer) -> int:
    """Ids from 0 to the highest, of which some may have no token."""
    return 1 + max(backend.get_vocab(with_added_tokens=True).values(), default=-1)


def _usual_settings(backend: tokenizers.Tokenizer) -> dict[str, Any]:
    """The settings of tokenizers made here, without the control tokens that this one lacks."""
    missing = {key for key in _NAMED if backend.token_to_id(str(HUGGING_FACE_CONFIG[key])) is None}
    missing |= {"add_bos_token"} if "bos_token" in missing else set()
    return {key: value for key, value in HUGGING_FACE_CONFIG.items() if key not in missing}
