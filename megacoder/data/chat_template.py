"""Chat templates in Jinja, which exported tokenizers carry: DeepSeek-Coder's, and those of other texts.

A template is read by its form alone and never executed: it may come from anywhere.
"""

import re
from collections.abc import Iterable
from typing import Any

from megacoder.data.control_tokens import SPECIAL_TOKENS

__all__ = ["CHAT_TEMPLATE", "STRING", "SYSTEM", "holds_texts", "read_template", "unquoted", "write_template"]

SYSTEM = (
    "You are an AI programming assistant, utilizing the Deepseek Coder model, developed by Deepseek Company, and you "
    "only answer questions related to computer science. For politically sensitive questions, security and privacy "
    "issues, and other non-computer science questions, you will refuse to answer"
)
"""DeepSeek-Coder's system text where the caller has no system message."""

CHAT_TEMPLATE = (
    "{{- bos_token -}}\n"
    "{%- if messages | selectattr('role', 'equalto', 'system') | list | length == 0 -%}\n"
    f"  {{{{- '{SYSTEM}\\n' -}}}}\n"
    "{%- endif -%}\n"
    "{%- for message in messages -%}\n"
    "  {%- if message.role == 'system' -%}\n"
    "    {{- message.content -}}\n"
    "  {%- elif message.role == 'user' -%}\n"
    "    {{- '### Instruction:\\n' + message.content + '\\n' -}}\n"
    "  {%- else -%}\n"
    "    {{- '### Response:\\n' + message.content + '\\n<|EOT|>\\n' -}}\n"
    "  {%- endif -%}\n"
    "{%- endfor -%}\n"
    "{%- if add_generation_prompt -%}\n"
    "  {{- '### Response:\\n' -}}\n"
    "{%- endif -%}\n"
)
"""Renders as DeepSeek-Coder-Instruct's does, character for character, with what transformers passes to it: bos_token,
messages, add_generation_prompt. Two quirks must be reproduced in training: the built-in system text ends without a full
stop, and a system message of the caller's own is not followed by a line break."""

STRING = r"""(?:'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")"""
"""A regular expression for a string of Jinja's."""
_BOS = "{{- bos_token -}}\n"


def write_template(
    *, system: str, system_message: str, instruction: str, response: str, end: str, after: str, bos: bool,
    trim: bool = False,
) -> str:  # fmt: skip
    """A template of the texts of a `FormatConfig`; `trim` strips white space around what a user says."""
    before, _, behind = instruction.partition("{content}")
    opening, _, closing = system_message.partition("{content}")
    wrapped = [_quoted(opening)] * bool(opening) + ["message.content"] + [_quoted(closing)] * bool(closing)
    ending = [end + after] if _cut(end + after) == (end, after) else [end, after]
    return _layout(
        bos=_BOS if bos else "", system=_quoted(system), wrapped=" + ".join(wrapped),
        content="message.content | trim" if trim else "message.content", before=_quoted(before),
        behind=_quoted(behind), response=_quoted(response), ending=" + ".join(map(_quoted, ending)),
    )  # fmt: skip


def read_template(template: str) -> dict[str, Any] | None:
    """What `write_template` made a template of, without `trim`; None for any other."""
    found = re.fullmatch(_own_template(), template)
    if found is None:
        return None
    text = {name: unquoted(found[name] or "''") for name in found.groupdict()}
    end, after = _cut(text["end"]) if found["after"] is None else (text["end"], text["after"])
    return {
        "system": text["system"], "system_message": f"{text['opening']}{{content}}{text['closing']}",
        "instruction": f"{text['before']}{{content}}{text['behind']}", "response": text["response"], "end": end,
        "after": after, "bos": bool(found["bos"]),
    }  # fmt: skip


def holds_texts(template: str, texts: Iterable[str]) -> bool:
    """Whether each of `texts` is a string of the template."""
    return all(_quoted(text) in template for text in texts)


def unquoted(string: str) -> str:
    """What a string of Jinja's says; it reads escapes as Python does."""
    try:
        return string[1:-1].encode("ascii", "backslashreplace").decode("unicode-escape")
    except UnicodeDecodeError:  # Jinja would refuse it
        return string[1:-1]


def _layout(
    *, bos: str, system: str, wrapped: str, content: str, before: str, behind: str, response: str, ending: str
) -> str:
    """A template of Jinja's strings, and of the expressions for what system and user say."""
    return (
        f"{bos}"
        "{%- if messages | selectattr('role', 'equalto', 'system') | list | length == 0 -%}\n"
        f"  {{{{- {system} -}}}}\n"
        "{%- endif -%}\n"
        "{%- for message in messages -%}\n"
        "  {%- if message.role == 'system' -%}\n"
        f"    {{{{- {wrapped} -}}}}\n"
        "  {%- elif message.role == 'user' -%}\n"
        f"    {{{{- {before} + ({content}) + {behind} -}}}}\n"
        "  {%- else -%}\n"
        f"    {{{{- {response} + message.content + {ending} -}}}}\n"
        "  {%- endif -%}\n"
        "{%- endfor -%}\n"
        "{%- if add_generation_prompt -%}\n"
        f"  {{{{- {response} -}}}}\n"
        "{%- endif -%}\n"
    )


def _own_template() -> str:
    """A regular expression for what `_layout` makes of a custom format's texts."""
    text = {name: f"(?P<{name}>{STRING})" for name in ("system", "before", "behind", "response")}
    parts = text | {
        "bos": f"(?P<bos>{re.escape(_BOS)})?",
        "wrapped": rf"(?:(?P<opening>{STRING}) \+ )?message\.content(?: \+ (?P<closing>{STRING}))?",
        "content": r"message\.content",
        "ending": rf"(?P<end>{STRING})(?: \+ (?P<after>{STRING}))?",
    }
    pattern = re.escape(_layout(**{name: f"_{name}_" for name in parts}))
    for name, part in parts.items():
        pattern = pattern.replace(f"_{name}_", part, 1).replace(f"_{name}_", f"(?P={name})")
    return pattern


def _cut(ending: str) -> tuple[str, str]:
    """The text through the last of DeepSeek-Coder's control tokens, all of it where there is none, and the rest."""
    ends = (ending.rfind(token) + len(token) for token in SPECIAL_TOKENS.values() if token in ending)
    place = max(ends, default=len(ending))
    return ending[:place], ending[place:]


def _quoted(text: str) -> str:
    """As a string of Jinja's."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n") + "'"
