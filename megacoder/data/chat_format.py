"""Conversations as text and as ids: which parts a model is asked, and which it is trained to answer.

A conversation becomes segments of ids, asked and trained in turn: everything through `### Response:` and its line break
is asked, the answer with its end marker is trained. An answer without loss is part of what is asked. The lengths of the
segments alone tell which tokens are trained. A mask by id would also hide every token with the id of padding, above all
the marker that ends a text (with DeepSeek-Coder's base tokenizer the two share an id), and the model would never learn
to stop.

Segments end after a line break or a control token, where the texts on both sides tokenize independently, so that the
ids of a conversation are those of its rendered text. Text is taken literally: a message that quotes `<|EOT|>` ends
nothing here, where Hugging Face's tokenizer would insert the control token itself.

Two formats are DeepSeek-Coder's own and differ slightly. `chat` is its tokenizer's template (`chat_template.py`);
`script` is that of its published fine-tuning script, for one instruction and one answer: it has a different system
text, strips white space around the instruction, and stops right after the end marker.

A tuned model is asked in the format that it was trained with. Its run records the settings; a Hugging Face folder has
the template alone, which `from_jinja` reads back. No template is executed: it may come from anywhere.
"""

import re
from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import Literal

from megacoder.core.errors import ConfigError
from megacoder.data.chat_template import CHAT_TEMPLATE, SYSTEM
from megacoder.data.tokenizer import SPECIAL_TOKENS, Tokenizer

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

    kind: Literal["chat", "script", "custom"] = "chat"
    """chat (DeepSeek-Coder's chat template), script (its fine-tuning script), or the settings below"""
    system: str = SYSTEM + "\n"
    """custom: text before a conversation that has no system message"""
    instruction: str = "### Instruction:\n{content}\n"
    """custom: how a user's message is written"""
    response: str = "### Response:\n"
    """custom: text before an answer; must end with a line break or a control token"""
    end: str = "\n<|EOT|>"
    """custom: text that ends an answer, trained with it; must end with a control token"""
    after: str = "\n"
    """custom: text after `end`, not trained"""

    def __post_init__(self) -> None:
        if (count := self.instruction.count("{content}")) != 1:
            raise ConfigError(
                f"data.conversations.format.instruction = {self.instruction!r}: has {{content}} {count} times; must "
                "have it once, for the message"
            )
        if not self.end.endswith(tuple(SPECIAL_TOKENS.values())):
            raise ConfigError(
                f"data.conversations.format.end = {self.end!r}: does not end with a control token such as "
                f"{SPECIAL_TOKENS['eot']}, so the model would never learn to stop"
            )
        if not self.response.endswith(("\n", *SPECIAL_TOKENS.values())):
            raise ConfigError(
                f"data.conversations.format.response = {self.response!r}: must end with a line break or a control "
                "token, else its tokens would depend on the answer after it"
            )

    @property
    def resolved(self) -> "FormatConfig":
        """This configuration with the texts of its kind filled in."""
        if self.kind == "chat":
            return FormatConfig()
        if self.kind == "script":
            return FormatConfig(kind="script", system=_SCRIPT_SYSTEM, after="")
        return self

    @property
    def end_token(self) -> str:
        """The control token that ends an answer."""
        return next(token for token in SPECIAL_TOKENS.values() if self.resolved.end.endswith(token))

    @property
    def jinja(self) -> str:
        """The same format as a Hugging Face chat template."""
        if self.kind == "chat":
            return CHAT_TEMPLATE
        chosen = self.resolved
        before, _, behind = chosen.instruction.partition("{content}")
        content = "message.content | trim" if self.kind == "script" else "message.content"
        texts = (chosen.system, before, behind, chosen.response, chosen.end + chosen.after)
        return _jinja(*map(_quoted, texts), content=content)

    @classmethod
    def from_jinja(cls, template: str) -> "FormatConfig | None":
        """The format of a template that `jinja` has made, or that has the texts of `chat`; None for any other."""
        if template == (script := cls(kind="script")).jinja:
            return script
        chat = cls()
        before, _, behind = chat.instruction.partition("{content}")
        if found := re.fullmatch(_own_template(), template):
            text = {name: _unquoted(literal) for name, literal in found.groupdict().items()}
            ending = text["ending"]
            cut = max((ending.rfind(end) + len(end) for end in SPECIAL_TOKENS.values() if end in ending), default=0)
            return cls(
                kind="custom", system=text["system"], instruction=f"{text['before']}{{content}}{text['behind']}",
                response=text["response"], end=ending[:cut], after=ending[cut:],
            )  # fmt: skip
        texts = (chat.system, before, behind, chat.response, chat.end + chat.after)
        return chat if all(_quoted(text) in template for text in texts) else None


@dataclass(frozen=True)
class Segment:
    """Consecutive ids, either all trained or none."""

    ids: list[int]
    trained: bool


class ChatFormat:
    """Conversations to ids."""

    def __init__(self, config: FormatConfig, tokenizer: Tokenizer) -> None:
        self.config, self.tokenizer = config.resolved, tokenizer
        used = (self.config.system, self.config.instruction, self.config.response, self.config.end, self.config.after)
        self._controls = {
            text: tokenizer.control_id(name)
            for name, text in SPECIAL_TOKENS.items()
            if any(text in part for part in used)
        }
        if self.config.response.endswith("\n"):
            tokenizer.check_splits_lines(
                "a chat format whose response ends with one, not with <|Assistant|> or the like,"
            )
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
        """Asked and trained segments in turn, asked first, BOS in front; the last is asked and may be empty.

        `trained` has the numbers of the answers with loss, by default all. With `asking` the last segment ends with the
        text before an answer.
        """
        config, segments = self.config, list[Segment]()
        asked: _Runs = [self.tokenizer.bos_id]
        if all(role != "system" for role, _ in messages):
            self._add_format(asked, config.system)
        for number, (role, content) in enumerate(messages):
            if role == "system":
                _add_text(asked, content)
            elif role == "user":
                before, _, behind = config.instruction.partition("{content}")
                self._add_format(asked, before)
                _add_text(asked, content.strip() if config.kind == "script" else content)
                self._add_format(asked, behind)
            else:
                self._add_format(asked, config.response)
                has_loss = trained is None or number in trained
                answer: _Runs = [] if has_loss else asked
                _add_text(answer, content)
                self._add_format(answer, config.end)
                if has_loss:
                    segments += [Segment(self._ids(asked), False), Segment(self._ids(answer), True)]
                    asked = []
                self._add_format(asked, config.after)
        if asking:
            self._add_format(asked, config.response)
        return [*segments, Segment(self._ids(asked), False)]

    def _add_format(self, runs: "_Runs", text: str) -> None:
        """Adds text of the format itself, in which the string of a control token stands for that token."""
        while text:
            found = [(text.find(control), control) for control in self._controls if control in text]
            place, control = min(found, default=(len(text), ""))
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


def _jinja(system: str, before: str, behind: str, response: str, ending: str, *, content: str) -> str:
    """A template of Jinja literals, and of the expression for what a user says."""
    return (
        "{{- bos_token -}}\n"
        "{%- if messages | selectattr('role', 'equalto', 'system') | list | length == 0 -%}\n"
        f"  {{{{- {system} -}}}}\n"
        "{%- endif -%}\n"
        "{%- for message in messages -%}\n"
        "  {%- if message.role == 'system' -%}\n"
        "    {{- message.content -}}\n"
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
    """A regular expression for what `_jinja` makes of a custom format's texts."""
    names = ("system", "before", "behind", "response", "ending")
    pattern = re.escape(_jinja(*(f"_{name}_" for name in names), content="message.content"))
    for name in names:
        pattern = pattern.replace(f"_{name}_", rf"(?P<{name}>'(?:[^'\\]|\\.)*')", 1)
        pattern = pattern.replace(f"_{name}_", f"(?P={name})")
    return pattern


def _quoted(text: str) -> str:
    """As a Jinja string literal."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n") + "'"


def _unquoted(literal: str) -> str:
    return re.sub(r"\\(.)", lambda escape: {"n": "\n"}.get(escape[1], escape[1]), literal[1:-1])
