"""Turns of a conversation to the tokens of the published template (`megacoder.data.chat_template`).

Its control tokens are ids; what people and models say is literal text: a user who types `<|EOT|>` ends nothing. Every
line break is a token of its own, so that pieces tokenize as the whole would.
"""

from collections.abc import Sequence

from megacoder.core.errors import ConfigError
from megacoder.data.chat_template import SYSTEM
from megacoder.data.tokenizer import Tokenizer

__all__ = ["Turn", "chat_tokens"]

Turn = tuple[str, str]
"""(role, text); roles are system, user and assistant."""


def chat_tokens(tokenizer: Tokenizer, turns: Sequence[Turn]) -> list[int]:
    """The prompt that the model continues with its answer to the last turn; ConfigError for an unknown role.

    Without a system turn the built-in one comes first. Equal to transformers' `apply_chat_template` with
    `add_generation_prompt`, except where text contains the strings of control tokens.
    """
    tokens, text = [tokenizer.bos_id], ""
    if not any(role == "system" for role, _ in turns):
        text = SYSTEM + "\n"
    for role, said in turns:
        if role == "system":
            text += said
        elif role == "user":
            text += f"### Instruction:\n{said}\n"
        elif role == "assistant":
            tokens += [*tokenizer.encode(f"{text}### Response:\n{said}\n"), tokenizer.eot_id]
            text = "\n"
        else:
            raise ConfigError(f"role {role!r}: not system, user or assistant")
    return [*tokens, *tokenizer.encode(f"{text}### Response:\n")]
