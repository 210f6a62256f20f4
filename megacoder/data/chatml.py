r"""ChatML, `<|im_start|>role\ncontent<|im_end|>\n`: the format of Qwen's instruct models and of most data since.

Published templates are written in many ways, with branches for tools that a conversation without tools never enters.
One is recognized where all that it prints outside of these is a turn in ChatML, a system text, or the beginning of an
answer. It is not executed.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from megacoder.data.chat_template import STRING, unquoted

__all__ = ["QWEN_SYSTEM", "chatml_texts", "read_chatml"]

QWEN_SYSTEM = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
"""The system text of Qwen2.5's published template."""


def chatml_texts(system: str) -> dict[str, str]:
    """ChatML as texts of a `FormatConfig`; with an empty `system` a conversation may be without a system message."""
    turn = "<|im_start|>{}\n{{content}}<|im_end|>\n"
    system_message = turn.format("system")
    return {
        "system": system_message.replace("{content}", system) if system else "", "system_message": system_message,
        "instruction": turn.format("user"), "response": "<|im_start|>assistant\n", "end": "<|im_end|>", "after": "\n",
    }  # fmt: skip


def read_chatml(template: str) -> tuple[str, bool] | None:
    """The system text of a ChatML template, and whether it begins with BOS; None for other templates."""
    try:
        printed = list(_printed(template))
    except _OtherFormError:
        return None
    bos = printed[:1] == [_Printed("bos_token", "")]
    *said, asking = printed[bos:] or [_Printed("", "")]
    codes = {one.code for one in said}
    systems = {found[1] for code in codes if (found := re.fullmatch(_SYSTEM, code))}
    others = {code for code in codes if not re.fullmatch(_SYSTEM, code)}
    if asking != _Printed(_ASKING, "add_generation_prompt") or len(systems) > 1 or not {_TURN} <= others <= _KNOWN:
        return None
    return (systems or {""}).pop(), bos


_TAG = re.compile(rf"\{{([{{%])(-?)((?:{STRING}|[^'\"])*?)(-?)([}}%])\}}", re.DOTALL)
_TOKEN = re.compile(rf"{STRING}|\w+|[^\s\w]", re.DOTALL)
_OPEN, _CLOSE = "\x01", "\x02"
"""Around strings in normalized code."""


class _OtherFormError(Exception):
    """A template that is none of ChatML's."""


@dataclass(frozen=True)
class _Printed:
    code: str
    """an expression, normalized"""
    condition: str
    """of the innermost `if` or `for` around it"""


@dataclass
class _Block:
    """An `if` or `for` that is open."""

    condition: str
    of_tools: bool
    """whether it is entered only with tools"""
    plain_answers: bool = False
    """whether an earlier condition of it has taken all answers that call no tool"""


def _printed(template: str) -> Iterator[_Printed]:
    """What the template prints without tools, in its order; _OtherFormError where it does what cannot be judged."""
    blocks: list[_Block] = []
    previous: re.Match[str] | None = None
    for tag in _TAG.finditer(template):
        _check_gap(template[previous.end() if previous else 0 : tag.start()], previous, tag)
        code, previous = _normalized(tag[3]), tag
        without_tools = not any(block.of_tools for block in blocks)
        if (tag[1], tag[5]) == ("{", "}"):
            if without_tools:
                yield _Printed(code, blocks[-1].condition if blocks else "")
        else:
            _enter(code, blocks, without_tools=without_tools)
    _check_gap(template[previous.end() if previous else 0 :].removesuffix("\n"), previous, None)


def _check_gap(text: str, before: re.Match[str] | None, behind: re.Match[str] | None) -> None:
    """_OtherFormError where `text` between two tags is printed, as transformers sets Jinja up (`trim_blocks`)."""
    trimmed = (before is not None and before[4] == "-") or (behind is not None and behind[2] == "-")
    if before is not None and before[1] == "%" and text.startswith("\n"):
        text = text[1:].lstrip(" \t" if behind is not None and behind[1] == "%" else "")
    if text.strip() or (text and not trimmed):
        raise _OtherFormError


def _enter(code: str, blocks: list[_Block], *, without_tools: bool) -> None:
    """Follows a statement."""
    if code.startswith("for") and (code == "formessageinmessages" or not without_tools):
        blocks.append(_Block(code, of_tools=False))
    elif code.startswith("if"):
        condition = code.removeprefix("if")
        blocks.append(_Block(condition, _asks_for_tools(condition), _TAKES_PLAIN_ANSWERS in condition))
    elif code.startswith(("elif", "else")) and blocks:
        condition, block = code.removeprefix("elif"), blocks[-1]
        block.of_tools = _asks_for_tools(condition) or (block.plain_answers and condition == _IS_ANSWER)
        block.plain_answers |= _TAKES_PLAIN_ANSWERS in condition
        block.condition = condition
    elif code in ("endif", "endfor") and blocks:
        blocks.pop()
    elif code != "setadd_generation_prompt=false" and without_tools:
        raise _OtherFormError


def _asks_for_tools(condition: str) -> bool:
    """Whether a condition, other than by `or`, needs tools, a call of one, or what one has answered."""
    return condition in ("tools", "message.tool_calls", f"message.role=={_OPEN}tool{_CLOSE}")


def _normalized(code: str) -> str:
    """`code` without white space, its strings in one spelling, sums of strings joined, and `a['b']` as `a.b`."""
    tokens = _TOKEN.findall(code)
    written = "".join(f"{_OPEN}{unquoted(token)}{_CLOSE}" if token[0] in "'\"" else token for token in tokens)
    joined = written.replace(f"{_CLOSE}+{_OPEN}", "")
    return re.sub(rf"\[{_OPEN}(\w+){_CLOSE}\]", r".\1", joined)


_IS_ANSWER = f"message.role=={_OPEN}assistant{_CLOSE}"
_TAKES_PLAIN_ANSWERS = f"{_IS_ANSWER}andnotmessage.tool_calls"
_TURN = _normalized(r"'<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n'")
_ASKING = _normalized(r"'<|im_start|>assistant\n'")
_SYSTEM = rf"{_OPEN}<\|im_start\|>system\n([^{_OPEN}{_CLOSE}]*)<\|im_end\|>\n{_CLOSE}"
_KNOWN = {_TURN, _normalized(r"'<|im_start|>system\n' + messages[0].content + '<|im_end|>\n'")}
