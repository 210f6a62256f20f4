"""What the commands that run a model share: loading it from a Hugging Face folder, and the room for its prompt."""

from pathlib import Path
from typing import Literal

import torch

from megacoder.core.device import probe
from megacoder.core.errors import ConfigError
from megacoder.data.tokenizer import Tokenizer
from megacoder.model.huggingface import import_with_tokenizer
from megacoder.model.transformer import Transformer

__all__ = ["ComputeDtype", "load_model", "prompt_room"]

ComputeDtype = Literal["stored", "float32", "bfloat16"]
"""What a model computes in; `stored` is the dtype of its folder."""


def load_model(folder: Path, dtype: ComputeDtype) -> tuple[Transformer, Tokenizer]:
    """The model and tokenizer of a Hugging Face folder, on the GPU if there is one."""
    chosen = {"stored": None, "float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]
    return import_with_tokenizer(folder, dtype=chosen, device=probe().device_type)


def prompt_room(model: Transformer, max_new_tokens: int) -> int:
    """Tokens that a prompt may have; ConfigError where the answer would leave none."""
    positions = model.config.max_position_embeddings
    if not 1 <= max_new_tokens < positions:
        raise ConfigError(
            f"--max-new-tokens {max_new_tokens}: from 1 to {positions - 1}; the model has {positions} positions"
        )
    return positions - max_new_tokens
