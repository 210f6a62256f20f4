"""How RoPE is stretched to a longer context: settings alone, checked without torch.

All three kinds stretch RoPE by the model's `rope_factor` s, so that positions up to s times those of pre-training get
angles that training has seen. `linear` (arXiv:2306.15595) divides every frequency by s. The others keep the high
frequencies, which tell neighbors apart, divide the low ones by s, and mix both between: `llama3` (Llama 3.1 and later)
by how often a frequency turns within the original length, `yarn` (arXiv:2309.00071) by its index, as in that paper's
published code and all that followed it, where the paper's own formula has the number of turns. YaRN also makes
attention sharper, by a factor on cos and sin: it is in queries and keys, thus squared in their products.
"""

import math
from dataclasses import dataclass, fields
from typing import Literal

from megacoder.core.config import check_at_least
from megacoder.core.errors import ConfigError

__all__ = ["READ_BY", "RopeScaling", "default_attention_factor"]

READ_BY: dict[str, tuple[str, ...]] = {
    "linear": (),
    "llama3": ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
    "yarn": ("original_max_position_embeddings", "beta_fast", "beta_slow", "attention_factor", "truncate"),
}
"""The settings that a kind reads."""


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How RoPE is stretched by `rope_factor`. What another kind reads must be left out."""

    kind: Literal["linear", "llama3", "yarn"] = "linear"
    """linear interpolation, Llama 3.1's or YaRN; with a factor of 1, linear is no scaling"""
    original_max_position_embeddings: int | None = None
    """llama3, yarn: positions of the model before it was extended"""
    low_freq_factor: float = 1.0
    """llama3: frequencies that turn less often than this in the original positions are divided by the factor"""
    high_freq_factor: float = 4.0
    """llama3: those that turn more often than this are kept"""
    beta_fast: float = 32.0
    """yarn: frequencies that turn more often than this in the original positions are kept"""
    beta_slow: float = 1.0
    """yarn: those that turn less often than this are divided by the factor"""
    attention_factor: float | None = None
    """yarn: multiplies queries and keys; 0.1 ln(factor) + 1 unless given"""
    truncate: bool = True
    """yarn: the range between both betas ends at whole indices"""

    def __post_init__(self) -> None:
        used = READ_BY[self.kind]
        for setting in fields(self)[1:]:
            value = getattr(self, setting.name)
            if setting.name not in used and value != setting.default:
                raise ConfigError(
                    f"model.rope_scaling.{setting.name} = {value}: not read where kind = {self.kind!r}; leave it out, "
                    "or choose another kind"
                )
        if used and self.original_max_position_embeddings is None:
            raise ConfigError(
                f"model.rope_scaling.kind = {self.kind!r}: needs original_max_position_embeddings, the positions "
                "before the extension"
            )
        check_at_least(self, 1, "original_max_position_embeddings", prefix="model.rope_scaling.")
        for low, high in (("low_freq_factor", "high_freq_factor"), ("beta_slow", "beta_fast")):
            if not 0 < getattr(self, low) < getattr(self, high) < math.inf:
                raise ConfigError(
                    f"model.rope_scaling.{low} = {getattr(self, low)} and {high} = {getattr(self, high)}: both must be "
                    "positive and finite, the second larger"
                )
        sharper = self.attention_factor
        if sharper is not None and not 0 < sharper < math.inf:
            raise ConfigError(f"model.rope_scaling.attention_factor = {sharper}: must be positive and finite")

    def check(self, *, head_dim: int, theta: float, factor: float) -> None:
        """ConfigError where a model with these settings, named as in its configuration, cannot be scaled so."""
        if self.kind == "linear":
            return
        if factor < 1:
            raise ConfigError(f"model.rope_factor = {factor}: below 1, with rope_scaling.kind = {self.kind!r}")
        if self.kind == "yarn":
            if theta <= 1:
                raise ConfigError(f"model.rope_theta = {theta}: not above 1, with rope_scaling.kind = 'yarn'")
            low, high = self.mixed_range(head_dim, theta)
            if low > high:
                original = self.original_max_position_embeddings
                raise ConfigError(
                    f"model.rope_scaling.original_max_position_embeddings = {original}: no frequency turns between "
                    f"beta_slow = {self.beta_slow} and beta_fast = {self.beta_fast} times in it"
                )

    def mixed_range(self, head_dim: int, theta: float) -> tuple[float, float]:
        """YaRN: the first and the last index of the frequencies, fractions of which are kept."""
        assert self.original_max_position_embeddings is not None
        turns = self.original_max_position_embeddings / (2 * math.pi)
        low, high = (head_dim * math.log(turns / beta, theta) / 2 for beta in (self.beta_fast, self.beta_slow))
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        return max(low, 0), min(high, head_dim - 1)

    def magnitude(self, factor: float) -> float:
        """What cos and sin are multiplied by."""
        if self.kind != "yarn":
            return 1.0
        return default_attention_factor(factor) if self.attention_factor is None else self.attention_factor


def default_attention_factor(factor: float, share: float = 1.0) -> float:
    """YaRN's own, which grows with the context; `share` is how much of that growth there is."""
    return 0.1 * share * math.log(max(factor, 1.0)) + 1
