"""Conversations as text and as ids: which parts a model is asked, and which it is trained to answer.

A conversation becomes segments of ids, asked and trained in turn: everything through `### Response:` and its line break
is asked, the answer with its end marker is trained. An answer without loss is part of what is asked. The lengths of the
segments alone tell which tokens are trained. A mask by id would also hide every token with the id of padding, above all
the marker that ends a text (with DeepSeek-Coder's base tokenizer the two share an id), and the model would never learn
to stop.

A question and its answer are encoded apart, as they are when a model is asked: the prompt is a prefix of what was
trained. Where a control token or a line break that is a token of its own is between them, the ids of a conversation are
those of its rendered text. With a tokenizer whose tokens hold a line break and what follows (Llama 3's, Qwen's), they
differ where an answer begins with white space, which `apply_chat_template` would join to the line break of its prompt.

Text is taken literally: a message that quotes `<|EOT|>` ends nothing here, where Hugging Face's tokenizer would insert
the control token itself.

Two formats are DeepSeek-Coder's own and differ slightly. `chat` is its tokenizer's template (`chat_template.py`);
`script` is that of its published fine-tuning script, for one instruction and one answer: it has a different system
text, strips white space around the instruction, and stops right after the end marker. `chatml` is Qwen's (`chatml.py`).

A tuned model is asked in the format that it was trained with. Its run records the settings; a Hugging Face folder has
the template alone, which `from_jinja` reads back. No template is executed: it may come from anywhere.
"""

import re
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from megacoder.core.errors import ConfigError, FormatError
from megacoder.data.chat_template import CHAT_TEMPLATE, SYSTEM, holds_texts, read_template, write_template
from megacoder.data.chatml import QWEN_SYSTEM, chatml_texts, read_chatml
from megacoder.data.control_tokens import ADDED_NAMES, CONTROL, SPECIAL_TOKENS
from megacoder.data.tokenizer import Tokenizer

__all__ = ["ChatFormat", "FormatConfig", "Message", "Segment"]

_SCRIPT_SYSTEM = (
    "You are an AI programming assistant, utilizing the DeepSeek Coder model, developed by DeepSeek Company, and you "
    "only answer questions related to computer science. For politically sensitive questions, security and privacy "
    "issues, and other non-computer science questions, you will refuse to answer.\n"
)
Message = tuple[str, str]
"""(role, content); the role is system, user or assistant"""


@dataclass(frozen=True, kw_only=True)
class FormatConfig:
    """How conversations are written."""

    kind: Literal["chat", "script", "chatml", "custom"] = "chat"
    """chat (DeepSeek-Coder's chat template), script (its fine-tuning script), chatml (Qwen's), or the settings below"""
    system: str | None = None
    """custom: text before a conversation that has no system message. chatml: its system message; "" for none. If unset,
    DeepSeek-Coder's or Qwen's"""
    system_message: str = "{content}"
    """custom: how a system message is written"""
    instruction: str = "### Instruction:\n{content}\n"
    """custom: how a user's message is written"""
    response: str = "### Response:\n"
    """custom: text before an answer; must end with a line break or a control token"""
    end: str = "\n<|EOT|>"
    """custom: text that ends an answer, trained with it; must end with a control token"""
    after: str = "\n"
    """custom: text after `end`, not trained"""
    bos: bool = True
    """custom and chatml: begin with the tokenizer's BOS, where it has one"""

    def __post_init__(self) -> None:
        if self.system is None:
            object.__setattr__(self, "system", QWEN_SYSTEM if self.kind == "chatml" else SYSTEM + "\n")
        for name in ("system_message", "instruction"):
            if (count := getattr(self, name).count("{content}")) != 1:
                raise ConfigError(
                    f"data.conversations.format.{name} = {getattr(self, name)!r}: has {{content}} {count} times; must "
                    "have it once, for the message"
                )

    @property
    def resolved(self) -> "FormatConfig":
        """This configuration with the texts of its kind filled in."""
        if self.kind == "chat":
            return FormatConfig()
        if self.kind == "script":
            return FormatConfig(kind="script", system=_SCRIPT_SYSTEM, after="")
        if self.kind == "chatml":
            return FormatConfig(kind="custom", bos=self.bos, **chatml_texts(self.system or ""))
        return self

    @property
    def texts(self) -> dict[str, str]:
        """name of a setting -> the text it stands for"""
        names = ("response", "end", "instruction", "system_message", "after", "system")
        return {name: getattr(self.resolved, name) for name in names}

    def end_token(self, controls: Iterable[str]) -> str | None:
        """Which of a tokenizer's control tokens ends an answer; None where none of them does."""
        return max((text for text in controls if self.resolved.end.endswith(text)), key=len, default=None)

    @property
    def jinja(self) -> str:
        """The same format as a Hugging Face chat template."""
        if self.kind == "chat":
            return CHAT_TEMPLATE
        return write_template(**self.texts, bos=self.resolved.bos, trim=self.kind == "script")

    @classmethod
    def from_jinja(cls, template: str) -> "FormatConfig | None":
        """The format of a template that `jinja` has made, that is ChatML's, or that has the texts of `chat`; else None.

        It has the same `resolved` texts.
        """
        if template == (script := cls(kind="script")).jinja:
            return script
        if (found := read_template(template)) is not None:
            return cls(kind="custom", **found)
        if (chatml := read_chatml(template)) is not None:
            return cls(kind="chatml", system=chatml[0], bos=chatml[1])
        chat = cls().texts
        before, _, behind = chat["instruction"].partition("{content}")
        texts = (chat["system"], before, behind, chat["response"], chat["end"] + chat["after"])
        return cls() if holds_texts(template, texts) else None


@dataclass(frozen=True)
class Segment:
    """Consecutive ids, either all trained or none."""

    ids: list[int]
    trained: bool


class ChatFormat:
    """Conversations to ids."""

    def __init__(self, config: FormatConfig, tokenizer: Tokenizer) -> None:
        """FormatError where the tokenizer lacks a control token of the format; ConfigError where an answer would not
        begin or end at one of those that it has."""
        self.config, self.tokenizer = config.resolved, tokenizer
        self._system = self.config.texts["system"]
        used = self.config.texts.values()
        _check_controls(self.config.texts, tokenizer)
        self._controls = {
            text: index for text, index in tokenizer.control_ids.items() if any(text in part for part in used)
        }
        ending: _Runs = []
        self._add_format(ending, self.config.end)
        self._end_text = next((run for run in ending[:1] if isinstance(run, str)), "")
        self.end_id = next(run for run in ending if isinstance(run, int))
        """the token after an answer"""

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """What the model continues with its answer to the last message: `apply_chat_template`'s generation prompt."""
        return [token for segment in self.segments(messages, asking=True) for token in segment.ids]

    def answer(self, text: str) -> str:
        """An answer as it appears among messages, given what the model has said before `end_id`."""
        return text.removesuffix(self._end_text)

    def segments(
        self, messages: Sequence[Message], *, trained: Container[int] | None = None, asking: bool = False
    ) -> list[Segment]:
        """Asked and trained segments in turn, asked first, any BOS in front; the last is asked and may be empty.

        `trained` has the numbers of the answers with loss, by default all. With `asking` the last segment ends with the
        text before an answer.
        """
        config, segments = self.config, list[Segment]()
        asked = [*self.tokenizer.beginning] if config.bos else list[int]()
        runs: _Runs = []
        if all(role != "system" for role, _ in messages):
            self._add_format(runs, self._system)
        for number, (role, content) in enumerate(messages):
            if role == "system":
                self._add_message(runs, config.system_message, content)
            elif role == "user":
                self._add_message(runs, config.instruction, content.strip() if config.kind == "script" else content)
            else:
                self._add_format(runs, config.response)
                answer: _Runs = []
                _add_text(answer, content)
                self._add_format(answer, config.end)
                asked, answered = [*asked, *self._ids(runs)], self._ids(answer)
                if trained is None or number in trained:
                    segments += [Segment(asked, False), Segment(answered, True)]
                    asked = []
                else:
                    asked += answered
                runs = []
                self._add_format(runs, config.after)
        if asking:
            self._add_format(runs, config.response)
        return [*segments, Segment([*asked, *self._ids(runs)], False)]

    def _add_message(self, runs: "_Runs", written: str, content: str) -> None:
        before, _, behind = written.partition("{content}")
        self._add_format(runs, before)
        _add_text(runs, content)
        self._add_format(runs, behind)

    def _add_format(self, runs: "_Runs", text: str) -> None:
        """Adds text of the format itself, in which the string of a control token stands for that token."""
        while text:
            found = [(text.find(control), -len(control), control) for control in self._controls if control in text]
            place, _, control = min(found, default=(len(text), 0, ""))
            _add_text(runs, text[:place])
            if control:
                runs.append(self._controls[control])
            text = text[place + len(control) :]

    def _ids(self, runs: "_Runs") -> list[int]:
        return [token for run in runs for token in ([run] if isinstance(run, int) else self.tokenizer.encode(run))]


_Runs = list[str | int]
"""Control ids, and texts that are each encoded in one piece, since tokens may cross the borders of their parts."""


def _add_text(runs: _Runs, text: str) -> None:
    last = runs[-1] if runs else None
    if isinstance(last, str):
        runs[-1] = last + text
    elif text:
        runs.append(text)


_CONTROL = re.compile("|".join([*map(re.escape, SPECIAL_TOKENS.values()), CONTROL]))
"""What looks like a control token."""
_MOST_NAMED = 6


def _check_controls(texts: Mapping[str, str], tokenizer: Tokenizer) -> None:
    controls = tokenizer.control_ids
    named = ", ".join([*map(repr, list(controls)[:_MOST_NAMED]), *["..."] * (len(controls) > _MOST_NAMED)])
    lacking: dict[str, str] = {}
    for text in texts.values():
        for token in _CONTROL.findall(text):
            if token not in controls and token.encode() not in tokenizer.token_bytes:
                lacking.setdefault(token, text)
    if lacking:
        token, text = next(iter(lacking.items()))
        added = [repr(one) for one in lacking if one not in {SPECIAL_TOKENS[name] for name in ADDED_NAMES}]
        options = f" --add {' '.join(added)}" if added else ""
        raise FormatError(
            f"chat format, {text!r}: the tokenizer has no control token {token!r}, only {named}; "
            f"to add what is missing: {tokenizer.how_to_extend()}{options}"
        )
    if not texts["end"].endswith(tuple(controls)):
        raise ConfigError(
            f"chat format, end = {texts['end']!r}: does not end with a control token of the tokenizer ({named}), so "
            "the model would never learn to stop"
        )
    if not texts["response"].endswith(("\n", *controls)):
        raise ConfigError(
            f"chat format, response = {texts['response']!r}: must end with a line break or a control token of the "
            f"tokenizer ({named}), else its tokens would depend on the answer after it"
        )
