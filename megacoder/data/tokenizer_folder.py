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
from megacoder.data.tokenizer import (
    CHAT_TEMPLATE_FILE,
    HUGGING_FACE_CONFIG,
    SPECIAL_TOKENS,
    puts_bos_in_front,
    text_end,
    token_text,
)

__all__ = [
    "GENERATION", "TokenizerFiles", "chat_template_in", "end_ids_in", "extended_files", "num_rows_in",
    "read_tokenizer_files",
]  # fmt: skip

_DEFINITION, _SETTINGS = "tokenizer.json", "tokenizer_config.json"
_MODEL = "config.json"
GENERATION = "generation_config.json"
"""Names the ids that end a text, as config.json may."""
_ADDED = "added_tokens.json"
_BESIDE = ("special_tokens_map.json", _ADDED, CHAT_TEMPLATE_FILE)
"""Further files of some folders; copied unchanged."""
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


def chat_template_in(folder: Path) -> str | None:
    """The chat template that transformers finds in `folder`, if any; FormatError where a file is damaged."""
    if (folder / CHAT_TEMPLATE_FILE).is_file():
        return _read(folder / CHAT_TEMPLATE_FILE)
    found = _settings(folder / _SETTINGS).get("chat_template") if (folder / _SETTINGS).is_file() else None
    if isinstance(found, list):  # several, by name
        found = next((one["template"] for one in found if one["name"] == "default"), None)
    return found


def end_ids_in(folder: Path) -> list[int]:
    """The ids that end a text according to a model folder's configuration; FormatError where that is damaged.

    A model may end on others than its tokenizer names, as instruction-tuned ones do. As in transformers, what
    config.json says counts where generation_config.json says nothing.
    """
    for path in (folder / GENERATION, folder / _MODEL):
        named = _settings(path).get("eos_token_id") if path.is_file() else None
        if named is not None:
            listed = named if isinstance(named, list) else [named]
            if not all(type(index) is int for index in listed):
                raise FormatError(f"{path}: eos_token_id = {named!r}: expected a number or a list of numbers")
            return listed
    return []


def num_rows_in(folder: Path) -> int | None:
    """The ids that the model in `folder` knows, None where there is no model; FormatError where its file is damaged."""
    path = folder / _MODEL
    rows = _settings(path).get("vocab_size") if path.is_file() else None
    if rows is not None and type(rows) is not int:
        raise FormatError(f"{path}: vocab_size = {rows!r}: expected a number")
    return rows


def extended_files(files: dict[str, str], ids: dict[str, int], folder: Path) -> dict[str, str]:
    """`TokenizerFiles.files` of `folder` with further control tokens, whose ids follow the others.

    <|EOT|> must be there or among them: where the folder has no chat template, it gets DeepSeek-Coder's. FormatError
    where one of the files that list added tokens is damaged.
    """
    definition, settings = json.loads(files[_DEFINITION]), json.loads(files[_SETTINGS])
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    tokens = {index: {"content": text, **flags} for text, index in ids.items()}
    definition["added_tokens"] += [{"id": index, **token} for index, token in tokens.items()]
    if "added_tokens_decoder" in settings:  # lists of the same, which other programs may read
        listed = _checked_object(settings["added_tokens_decoder"], f"{folder / _SETTINGS}: added_tokens_decoder")
        settings["added_tokens_decoder"] = listed | {str(index): token for index, token in tokens.items()}
    if _ADDED in files:
        files = files | {_ADDED: _as_json(_object_in(files[_ADDED], folder / _ADDED) | ids)}
    if CHAT_TEMPLATE_FILE not in files:
        settings.setdefault("chat_template", CHAT_TEMPLATE)
    return files | {_DEFINITION: _as_json(definition), _SETTINGS: _as_json(settings)}


def read_tokenizer_files(folder: Path, *, max_length: int | None, chat: FormatConfig | None = None) -> TokenizerFiles:
    """The files of a tokenizer folder as an exported model has them; `max_length` is the model's in tokens, None where
    there is no model.

    Settings are added where there are none. The chat template is that of `chat`, the format that a model was tuned
    with, whose end marker then ends a text, beside what ends documents, such as what a tuned model fills in. Without
    `chat` it is the folder's own or, where its control tokens are there, DeepSeek-Coder's. Raises FormatError naming
    the file that is missing or wrong.
    """
    beside = _BESIDE if chat is None else ()  # they say how the folder's own model ends a text and is asked
    files = {name: _read(folder / name) for name in beside if (folder / name).is_file()}
    definition = _read(folder / _DEFINITION)
    backend = _parsed(definition, folder / _DEFINITION)
    if backend.padding is not None or backend.truncation is not None:
        backend.no_padding()
        backend.no_truncation()
        definition = backend.to_str(pretty=True)
    settings = _settings(folder / _SETTINGS) if (folder / _SETTINGS).exists() else _usual_settings(backend)
    if not _begins_texts(settings, backend, folder):
        settings["bos_token"] = None
    if chat is not None:
        end = chat.end_token(token.content for token in backend.get_added_tokens_decoder().values())
        if end is None:
            raise FormatError(f"{folder / _DEFINITION}: no token that ends {chat.texts['end']!r}, as answers do")
        settings |= {"chat_template": chat.jinja, "eos_token": end}
    named = {key: token_text(settings.get(key)) for key in _NAMED}
    bos_id, eos_id, pad_id = (None if text is None else backend.token_to_id(text) for text in named.values())
    own_ends = end_ids_in(folder) if chat is None else []
    all_ends = [*([] if eos_id is None else [eos_id]), *own_ends, *_document_ends(named["eos_token"], backend)]
    ends = list(dict.fromkeys(all_ends))
    bos = named["bos_token"]
    if settings.get("add_bos_token") and bos_id is not None and backend.encode("").ids != [bos_id]:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, bos_id)]
        )
        definition = backend.to_str(pretty=True)
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast"}
    settings |= {} if max_length is None else {"model_max_length": max_length}
    if CHAT_TEMPLATE_FILE not in files and backend.token_to_id(SPECIAL_TOKENS["eot"]) is not None:
        settings.setdefault("chat_template", CHAT_TEMPLATE)
    files |= {_DEFINITION: definition, _SETTINGS: _as_json(settings)}
    eos_ids = ends[0] if len(ends) == 1 else ends or None
    ids = {"bos_token_id": bos_id, "eos_token_id": eos_ids, "pad_token_id": pad_id}
    return TokenizerFiles(files=files, ids=ids, vocab_size=_num_ids(backend), is_qwens=_is_qwens(backend))


def _begins_texts(settings: dict[str, Any], backend: tokenizers.Tokenizer, folder: Path) -> bool:
    """Whether texts begin with the BOS of `settings`, if they name one: chat templates here then print it."""
    bos = token_text(settings.get("bos_token"))
    in_front = puts_bos_in_front(settings, folder) or backend.encode("").ids[:1] == [backend.token_to_id(bos or "")]
    return in_front or bos in (None, SPECIAL_TOKENS["bos"])


def _document_ends(named: str | None, backend: tokenizers.Tokenizer) -> list[int]:
    """The id that ends documents where settings name `named`, as far as there is one."""
    ids = {token.content: index for index, token in backend.get_added_tokens_decoder().items()}
    end = ids.get(text_end(named or "", ids))
    return [] if end is None else [end]


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


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise FormatError(f"{path}: {reason}; expected a tokenizer folder") from None


def _settings(path: Path) -> dict[str, Any]:
    return _object_in(_read(path), path)


def _object_in(text: str, path: Path) -> dict[str, Any]:
    try:
        return _checked_object(json.loads(text), str(path))
    except ValueError as error:
        raise FormatError(f"{path}: not readable as JSON: {error}") from None


def _checked_object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise FormatError(f"{where}: expected a JSON object, got {type(value).__name__}")
    return value


def _usual_settings(backend: tokenizers.Tokenizer) -> dict[str, Any]:
    """The settings of tokenizers made here, without the control tokens that this one lacks."""
    missing = {key for key in _NAMED if backend.token_to_id(str(HUGGING_FACE_CONFIG[key])) is None}
    missing |= {"add_bos_token"} if "bos_token" in missing else set()
    return {key: value for key, value in HUGGING_FACE_CONFIG.items() if key not in missing}
