"""What the files beside a tokenizer.json say: how the folder's own model is asked, and where its texts end."""

import json
from pathlib import Path
from typing import Any

from megacoder.core.errors import FormatError

__all__ = [
    "CHAT_TEMPLATE_FILE", "GENERATION", "SETTINGS", "chat_template_in", "checked_object", "end_ids_in", "num_rows_in",
    "object_in", "read_object", "read_text", "token_text",
]  # fmt: skip

SETTINGS = "tokenizer_config.json"
CHAT_TEMPLATE_FILE = "chat_template.jinja"
"""Where transformers finds a chat template, unless it is in tokenizer_config.json."""
GENERATION = "generation_config.json"
"""Names the ids that end a text, as config.json may."""
_MODEL = "config.json"


def chat_template_in(folder: Path) -> str | None:
    """The chat template that transformers finds in `folder`, if any; FormatError where a file is damaged."""
    if (folder / CHAT_TEMPLATE_FILE).is_file():
        return read_text(folder / CHAT_TEMPLATE_FILE)
    path = folder / SETTINGS
    found = read_object(path).get("chat_template") if path.is_file() else None
    try:
        if isinstance(found, list):  # several, by name
            found = next((one["template"] for one in found if one["name"] == "default"), None)
        if found is None or isinstance(found, str):
            return found
    except (KeyError, TypeError):
        pass
    raise FormatError(f"{path}: chat_template: expected a text, or a list of named ones")


def end_ids_in(folder: Path) -> list[int]:
    """The ids that end a text according to a model folder's configuration; FormatError where that is damaged.

    A model may end on others than its tokenizer names, as instruction-tuned ones do. As in transformers, what
    config.json says counts where generation_config.json says nothing.
    """
    for path in (folder / GENERATION, folder / _MODEL):
        named = read_object(path).get("eos_token_id") if path.is_file() else None
        if named is not None:
            listed = named if isinstance(named, list) else [named]
            if not all(type(index) is int for index in listed):
                raise FormatError(f"{path}: eos_token_id = {named!r}: expected a number or a list of numbers")
            return listed
    return []


def num_rows_in(folder: Path) -> int | None:
    """The ids that the model in `folder` knows, None where there is no model; FormatError where its file is damaged."""
    path = folder / _MODEL
    rows = read_object(path).get("vocab_size") if path.is_file() else None
    if rows is not None and type(rows) is not int:
        raise FormatError(f"{path}: vocab_size = {rows!r}: expected a number")
    return rows


def token_text(value: Any) -> str | None:
    """A token as a tokenizer_config.json names it: a string, or an object around one."""
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else None


def read_text(path: Path) -> str:
    """FormatError where it is missing or not UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise FormatError(f"{path}: {reason}; expected a tokenizer folder") from None


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; FormatError where there is none."""
    return object_in(read_text(path), path)


def object_in(text: str, path: Path) -> dict[str, Any]:
    """The JSON object in the `text` of `path`."""
    try:
        return checked_object(json.loads(text), str(path))
    except ValueError as error:
        raise FormatError(f"{path}: not readable as JSON: {error}") from None


def checked_object(value: Any, where: str) -> dict[str, Any]:
    """`value`, if it is a JSON object; else FormatError, which names `where`."""
    if not isinstance(value, dict):
        raise FormatError(f"{where}: expected a JSON object, got {type(value).__name__}")
    return value
