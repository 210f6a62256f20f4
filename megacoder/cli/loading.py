"""The options of loading a model. Without torch, since scoring finished answers must start at once."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Optional

from megacoder.core.errors import ConfigError

__all__ = ["Loading"]


# `Optional[X]`, since at the first `X | None` tyro imports a type checker, which takes as long as ten programs.
@dataclass(frozen=True, kw_only=True)
class Loading:
    """How the model is loaded."""

    tokenizer: Optional[Path] = None
    """folder with tokenizer.json; if unset, the model's"""
    tp: int = 1
    """tensor-parallel processes that share the model"""
    dtype: Literal["stored", "float32", "bfloat16"] = "stored"
    """dtype to compute in; stored: the model's own"""

    def __post_init__(self) -> None:
        if self.tp < 1:
            raise ConfigError(f"--tp {self.tp}: must be at least 1")
