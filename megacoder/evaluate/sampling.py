"""How the next token is picked. Without torch, since scoring finished answers must start at once."""

from dataclasses import dataclass

from megacoder.core.errors import ConfigError

__all__ = ["Sampling"]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is picked."""

    temperature: float = 0.0
    """divides the logits before sampling; 0 takes the likeliest token"""
    top_k: int = 0
    """sample from this many likeliest tokens; 0 samples from all"""
    top_p: float = 1.0
    """sample from the fewest tokens that together are this likely (arXiv:1904.09751), above 0 and at most 1"""
    seed: int = 0
    """the same seed samples the same tokens"""

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < float("inf"):
            raise ConfigError(f"temperature = {self.temperature}: must be 0 (greedy) or positive")
        if self.top_k < 0:
            raise ConfigError(f"top_k = {self.top_k}: must be 0 (all tokens) or positive")
        if not 0.0 < self.top_p <= 1.0:
            raise ConfigError(f"top_p = {self.top_p}: must be above 0 and at most 1")
