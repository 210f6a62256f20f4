"""The chat template that exported tokenizers carry: renders as DeepSeek-Coder-Instruct's does, character for character.

Two of its quirks must be reproduced in training: the built-in system text ends without a full stop, and a system
message of the caller's own is not followed by a line break.
"""

__all__ = ["CHAT_TEMPLATE", "SYSTEM"]

SYSTEM = (
    "You are an AI programming assistant, utilizing the Deepseek Coder model, developed by Deepseek Company, and you "
    "only answer questions related to computer science. For politically sensitive questions, security and privacy "
    "issues, and other non-computer science questions, you will refuse to answer"
)
"""The system text where the caller has no system message."""

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
"""In Jinja, with what transformers passes to it: bos_token, messages, add_generation_prompt."""
