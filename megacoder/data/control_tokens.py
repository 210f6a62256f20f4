"""Control tokens by their strings: what models call them, which begin and end texts, and which no text may become.

Each rule stands here once, for the tokenizers that encode (`megacoder.data.tokenizer`), the folders that are exported,
and the servers that are asked in text.
"""

import json
import re
from collections.abc import Container, Iterable, Mapping
from typing import Any

import tokenizers

from megacoder.core.errors import FormatError
from megacoder.data.folder_settings import token_text

__all__ = [
    "ADDED_NAMES", "CONTROL", "HUGGING_FACE_CONFIG", "SPECIAL_TOKENS", "for_literal_text", "infill_text", "named_bos",
    "sentinels_among", "text_begin", "text_end", "token_in_front",
]  # fmt: skip

SPECIAL_TOKENS = {
    "bos": "<｜begin▁of▁sentence｜>",
    "eos": "<｜end▁of▁sentence｜>",
    "fim_hole": "<｜fim▁hole｜>",
    "fim_begin": "<｜fim▁begin｜>",
    "fim_end": "<｜fim▁end｜>",
    "pad": "<pad>",
    "user": "<|User|>",
    "assistant": "<|Assistant|>",
    "eot": "<|EOT|>",
}
"""Control tokens by name, in the order of their ids. Bars are U+FF5C and gaps U+2581, except in the ASCII four."""

_SENTINELS = (
    {name: SPECIAL_TOKENS[name] for name in ("fim_begin", "fim_hole", "fim_end")},
    {"fim_begin": "<|fim_prefix|>", "fim_hole": "<|fim_suffix|>", "fim_end": "<|fim_middle|>"},
    {"fim_begin": "<fim_prefix>", "fim_hole": "<fim_suffix>", "fim_end": "<fim_middle>"},
)
"""What models call the sentinels of fill-in-the-middle: DeepSeek-Coder, Qwen2.5-Coder, StarCoder. The others' are named
after what follows them, and stand in the same places."""

ADDED_NAMES = tuple(name for name in SPECIAL_TOKENS if name not in ("bos", "eos", "pad"))
"""What `megacoder tokenizer extend` adds: what fill-in-the-middle and chat formats use. Begin, end and padding stay the
model's own, which it has learned."""
CONTROL = "<[|｜][^<>|｜]+[|｜]>"
"""A regular expression for how control tokens are spelled. What else a tokenizer adds may be part of a text, such as
Qwen's <think> and other models' runs of spaces."""
_TURN_ENDS = {"<|im_end|>", "<|eot_id|>", SPECIAL_TOKENS["eot"], "<|return|>", "<|end|>"}
"""What ends turns, which the folders of tuned models name instead of what ends texts."""
_TEXT_ENDS = (SPECIAL_TOKENS["eos"], "<|endoftext|>", "<|end_of_text|>")
"""What ends texts beside these; DeepSeek's wherever it is there."""
_PRINTS_BOS = re.compile(r"\{\{[-+]?\s*\(?\s*bos_token\b|(?<![=!<>])=\s*bos_token\b|\bbos_token\s*[+~]")
_COMMENT = re.compile(r"\{#.*?#\}", re.DOTALL)
"""Of a chat template in Jinja: where it prints BOS, and what it does not run."""
HUGGING_FACE_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "add_bos_token": True,
    "add_eos_token": False,
    "bos_token": SPECIAL_TOKENS["bos"],
    "eos_token": SPECIAL_TOKENS["eos"],
    "pad_token": SPECIAL_TOKENS["pad"],
    "clean_up_tokenization_spaces": False,
    "model_max_length": 16384,
}
"""tokenizer_config.json of a tokenizer with these control tokens."""


def sentinels_among(texts: Container[str]) -> dict[str, str]:
    """fim_begin, fim_hole and fim_end as a tokenizer with the tokens `texts` has them; else DeepSeek-Coder's."""
    return next((names for names in _SENTINELS if all(text in texts for text in names.values())), _SENTINELS[0])


def infill_text(prefix: str, suffix: str, sentinels: Mapping[str, str], *, spm: bool = False) -> str:
    """The two sides of a hole between `sentinels`, prefix first or (`spm`) last, for a tokenizer that recognizes these
    in text."""
    begin, hole, end = (sentinels[name] for name in ("fim_begin", "fim_hole", "fim_end"))
    return f"{begin}{hole}{suffix}{end}{prefix}" if spm else f"{begin}{prefix}{hole}{suffix}{end}"


def token_in_front(backend: tokenizers.Tokenizer) -> str | None:
    """What a tokenizer.json itself puts in front of a text, if anything."""
    text = backend.encode("a")
    return next((token for token, added in zip(text.tokens[:1], text.special_tokens_mask, strict=False) if added), None)


def text_begin(named: str | None, in_front: str | None, tokens: Container[str]) -> str | None:
    """The BOS that the texts of a tokenizer that has `tokens` begin with, if any: DeepSeek's, what its tokenizer.json
    puts `in_front`, or the one `named` by `named_bos`."""
    return next(
        (text for text in (SPECIAL_TOKENS["bos"], in_front, named) if text is not None and text in tokens), None
    )


def named_bos(settings: Mapping[str, Any], template: str | None) -> str | None:
    """The BOS that the `settings` of a tokenizer_config.json put in front of texts, or else a chat `template`.

    Others name one that begins no text: GPT-2's and StarCoder's ends each, SmolLM2's begins the turns of a chat.
    """
    bos, eos = (token_text(settings.get(name)) for name in ("bos_token", "eos_token"))
    adds = settings.get("add_bos_token")
    if adds is None:
        printed = _PRINTS_BOS.search(_COMMENT.sub("", template or "")) is not None
        adds = printed and bos not in (eos, *_TEXT_ENDS)
    return bos if adds else None


def text_end(named: str, tokens: Container[str]) -> str:
    """What ends the documents of a tokenizer that has `tokens`, where its settings name `named`."""
    ends = _TEXT_ENDS if named in _TURN_ENDS else _TEXT_ENDS[:1]
    return next((text for text in ends if text in tokens), named)


def for_literal_text(definition: str, named: Iterable[str]) -> tuple[str, tuple[str, ...]]:
    """(`definition` as it is used here, the control tokens that it does not mark and only their spelling shows).

    Padding and truncation, which it may ask for, are left out, and its control tokens are marked special:
    `encode_special_tokens` shields text only from those that are.

    DeepSeek's own file marks three of the nine, so that a file holding "<｜fim▁hole｜>" would become a control id, and
    Qwen's none of its sentinels.
    """
    known = {*SPECIAL_TOKENS.values(), *(text for names in _SENTINELS for text in names.values()), *named}
    try:
        parsed = json.loads(definition)
        unmarked = [
            token for token in parsed["added_tokens"]
            if not token["special"] and (token["content"] in known or re.fullmatch(CONTROL, token["content"]))
        ]  # fmt: skip
    except (ValueError, KeyError, TypeError):
        raise FormatError("not a tokenizer: expected the JSON that the tokenizers library writes") from None
    for token in unmarked:
        token["special"] = True
    limits = {key: None for key in ("padding", "truncation") if parsed.get(key) is not None}
    by_spelling = tuple(token["content"] for token in unmarked if token["content"] not in known)
    return json.dumps(parsed | limits, ensure_ascii=False) if unmarked or limits else definition, by_spelling
