"""Rows of a data set as conversations: columns and roles by the names that it gives them, and which answers have loss.

A row has `messages`, or `instruction` and `output`; `ColumnsConfig` says what a data set calls these. Rows of
ShareGPT's form (`conversations` of `from` and `value`, perhaps with the system message in `system`) need no settings,
unless they also have what the settings name.

A message, or a row of `instruction` and `output`, may have a `weight`, as in mistral-finetune: an answer of weight 0 is
read by the model and not trained.
"""

import itertools
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from megacoder.core.errors import ConfigError, DataError
from megacoder.core.text import is_unicode
from megacoder.data.chat_format import Message

__all__ = ["ColumnsConfig", "Conversation", "RolesConfig", "UnknownRole", "read_conversation"]

_ROLES = ("system", "user", "assistant")
_SHAREGPT = ("conversations", "from", "value")
_SHAREGPT_SYSTEM = "system"
_WEIGHT = "weight"


class UnknownRole(DataError):
    """A message's role has a name that the settings do not give it."""


@dataclass(frozen=True, kw_only=True)
class RolesConfig:
    """What a data set calls who speaks, beside system, user and assistant."""

    system: tuple[str, ...] = ()
    """further names of the system's role"""
    user: tuple[str, ...] = ("human",)
    """further names of the user's role"""
    assistant: tuple[str, ...] = ("gpt",)
    """further names of the assistant's role"""

    def __post_init__(self) -> None:
        for role in _ROLES:
            for name in getattr(self, role):
                others = [other for other in _ROLES if other != role and name in (other, *getattr(self, other))]
                if others:
                    raise ConfigError(f"data.conversations.columns.roles: {name!r} is both {role} and {others[0]}")

    @property
    def described(self) -> str:
        """The names of roles."""
        *first, last = (
            role + (f" (also {', '.join(map(repr, names))})" if (names := getattr(self, role)) else "")
            for role in _ROLES
        )
        return f"{', '.join(first)} or {last}"

    def __getitem__(self, name: Any) -> str | None:
        """The role of this name, if any."""
        return next((role for role in _ROLES if name == role or name in getattr(self, role)), None)


@dataclass(frozen=True, kw_only=True)
class ColumnsConfig:
    """What a data set calls the parts of its rows; those in ShareGPT's form are recognized."""

    instruction: str = "instruction"
    """what is asked"""
    input: str = "input"
    """what follows the instruction, in the rows that have it"""
    output: str = "output"
    """the answer"""
    messages: str = "messages"
    """a conversation of several turns, instead of instruction and output"""
    role: str = "role"
    """of a turn: who speaks"""
    content: str = "content"
    """of a turn: what is said"""
    roles: RolesConfig = field(default_factory=RolesConfig)
    """who speaks"""

    def __post_init__(self) -> None:
        for names in (("instruction", "input", "output", "messages"), ("role", "content")):
            for one, other in itertools.combinations(names, 2):
                if getattr(self, one) == getattr(self, other):
                    raise ConfigError(f"data.conversations.columns: {getattr(self, one)!r} is both {one} and {other}")

    @property
    def described(self) -> str:
        """What a row needs."""
        return f"{self.messages!r}, or {self.instruction!r} and {self.output!r}"

    def used(self, names: Collection[str]) -> list[str]:
        """Which of a row's `names` a conversation is read from; none where it lacks what it needs."""
        if self.messages in names or {self.instruction, self.output} <= set(names):
            wanted = (self.messages, self.instruction, self.input, self.output, _WEIGHT)
            return [name for name in dict.fromkeys(wanted) if name in names]
        return [name for name in (_SHAREGPT[0], _SHAREGPT_SYSTEM) if name in names] if self._is_sharegpt(names) else []

    def of_turns(self, row: Mapping[str, Any]) -> tuple[str, str, str] | None:
        """The names of a row's turns, and of the role and the content of one; None where it has no turns."""
        if row.get(self.messages) is not None:
            return self.messages, self.role, self.content
        return _SHAREGPT if self._is_sharegpt(row) else None

    def _is_sharegpt(self, names: Iterable[str]) -> bool:
        return _SHAREGPT[0] in names and {self.messages, self.instruction, self.output}.isdisjoint(names)


@dataclass(frozen=True)
class Conversation:
    """Turns of user and assistant, perhaps a system message before them, and an answer at the end."""

    messages: list[Message]
    trained: frozenset[int]
    """numbers of the answers with loss, at least one"""


def read_conversation(
    row: Mapping[str, Any], columns: ColumnsConfig, *, where: str, train_on: Literal["all", "last"] = "all"
) -> Conversation:
    """The conversation of a row; DataError, beginning with `where`, for a row that is none or has nothing to train."""
    names = columns.of_turns(row)
    if names is None:
        messages, weightless = _pair(row, columns, where)
    else:
        turns = row[names[0]]
        messages, weightless = _turns(turns, names, columns.roles, where, system=_system(row, names, where))
    for number, (role, content) in enumerate(messages):
        if not is_unicode(content):
            raise DataError(f"{where}: message {number}, the {role}'s, holds half a surrogate pair, not valid Unicode")
    last = len(messages) - 1
    answers = {last} if train_on == "last" else {at for at, (role, _) in enumerate(messages) if role == "assistant"}
    if answers <= weightless:
        which = "the last answer" if train_on == "last" else "every answer"
        raise DataError(f"{where}: {which} has weight 0; there is no answer to train on")
    return Conversation(messages, frozenset(answers - weightless))


def _system(row: Mapping[str, Any], names: tuple[str, str, str], where: str) -> str | None:
    """The system message that a row of ShareGPT's form has beside its turns."""
    system = row.get(_SHAREGPT_SYSTEM) if names is _SHAREGPT else None
    if system is not None and not isinstance(system, str):
        raise DataError(f"{where}: {_SHAREGPT_SYSTEM!r} is {system!r}, expected text")
    return system or None


def _turns(
    messages: Any, names: tuple[str, str, str], roles: RolesConfig, where: str, *, system: str | None
) -> tuple[list[Message], frozenset[int]]:
    """The turns, after the `system` message, and the numbers of those with weight 0."""
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{where}: {names[0]} are {messages!r}, expected a list of turns")
    turns = [_turn(message, names, roles, f"{where}: message {number}") for number, message in enumerate(messages)]
    expected = "user"
    for number, (role, content) in enumerate(turns):
        if role == "system" and number == 0:
            continue
        if role != expected:
            raise DataError(f"{where}: message {number} is the {role}'s, expected the {expected}'s")
        if role == "assistant" and not content.strip():
            raise DataError(f"{where}: message {number} is an empty answer")
        expected = "assistant" if role == "user" else "user"
    if turns[-1][0] != "assistant":
        raise DataError(f"{where}: the last message is the {turns[-1][0]}'s; there is no answer to train on")
    weightless = [number for number, message in enumerate(messages) if message.get(_WEIGHT) == 0]
    if system is None:
        return turns, frozenset(weightless)
    if turns[0][0] == "system":
        raise DataError(f"{where}: has the column {_SHAREGPT_SYSTEM!r}, and message 0 is the system's, too")
    return [("system", system), *turns], frozenset(number + 1 for number in weightless)


def _turn(message: Any, names: tuple[str, str, str], roles: RolesConfig, where: str) -> Message:
    _, role_name, content_name = names
    if not isinstance(message, dict) or not isinstance(message.get(content_name), str):
        raise DataError(f"{where} is {message!r}, expected {role_name} and {content_name}")
    role = roles[message.get(role_name)]
    if role is None:
        raise UnknownRole(
            f"{where} has the role {message.get(role_name)!r}, expected {roles.described}; "
            "data.conversations.columns.roles gives a role further names"
        )
    _check_weight(message, where)
    return role, message[content_name]


def _check_weight(weighted: Mapping[str, Any], where: str) -> None:
    weight = weighted.get(_WEIGHT)
    if weight is not None and weight not in (0, 1):
        raise DataError(f"{where} has the weight {weight!r}, expected 0 or 1")


def _pair(row: Mapping[str, Any], columns: ColumnsConfig, where: str) -> tuple[list[Message], frozenset[int]]:
    """Question and answer, and the answer's number if it has weight 0."""
    for name in (columns.instruction, columns.output):
        if not isinstance(row.get(name), str):
            there = f"is {row[name]!r}, expected text" if name in row else "is missing"
            raise DataError(f"{where}: {name!r} {there}; a row has {columns.described}")
    instruction, given, output = row[columns.instruction], row.get(columns.input), row[columns.output]
    if not output.strip():
        raise DataError(f"{where}: {columns.output!r} is empty; there is no answer to train on")
    question = instruction if not given else f"{instruction}\n{given}"  # Alpaca's third field
    _check_weight(row, where)
    return [("user", question), ("assistant", output)], frozenset({1} if row.get(_WEIGHT) == 0 else ())
