"""Learning rates as pure functions of the step.

`three_stage` is DeepSeek's: linear warm-up, the peak until 80% of training, sqrt(1/10) of it until 90%, a tenth of it
to the end (arXiv:2401.02954, 2.3; arXiv:2401.14196, 3.4). Steps count from 1, as in AdamW's bias correction.
"""

import math
from dataclasses import dataclass
from typing import Literal

from megacoder.core.errors import ConfigError

__all__ = ["ScheduleConfig", "learning_rate"]


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """How the learning rate moves over a run."""

    kind: Literal["three_stage", "cosine", "constant"] = "three_stage"
    """shape after the warm-up: three_stage (pre-training), cosine or constant"""
    peak_lr: float = 4.2e-4
    """learning rate after the warm-up"""
    warmup_steps: int = 2000
    """steps of linear warm-up"""
    warmup_tokens: int | None = None
    """tokens of linear warm-up, instead of `warmup_steps`"""
    final_share: float = 0.1
    """share of the peak at which a cosine ends"""

    def __post_init__(self) -> None:
        if not 0 < self.peak_lr < math.inf:
            raise ConfigError(f"schedule.peak_lr = {self.peak_lr}: must be positive")
        if self.warmup_steps < 0:
            raise ConfigError(f"schedule.warmup_steps = {self.warmup_steps}: must not be negative")
        if self.warmup_tokens is not None and self.warmup_tokens < 0:
            raise ConfigError(f"schedule.warmup_tokens = {self.warmup_tokens}: must not be negative")
        if not 0 <= self.final_share <= 1:
            raise ConfigError(f"schedule.final_share = {self.final_share}: must be between 0 and 1")

    def warmup(self, tokens_per_step: int) -> float:
        """Steps of warm-up, however they are given."""
        return self.warmup_steps if self.warmup_tokens is None else self.warmup_tokens / tokens_per_step


def learning_rate(step: int, total_steps: int, config: ScheduleConfig, *, tokens_per_step: int = 1) -> float:
    """The rate of update `step` (1 .. total_steps), of `tokens_per_step` tokens."""
    warmup = config.warmup(tokens_per_step)
    if step <= warmup:
        return config.peak_lr * step / warmup
    if config.kind == "constant":
        return config.peak_lr
    if config.kind == "cosine":
        progress = (step - warmup) / max(1.0, total_steps - warmup)
        falling = (1 - config.final_share) / 2 * (1 + math.cos(math.pi * progress))
        return config.peak_lr * (config.final_share + falling)
    stage = (step > 0.8 * total_steps) + (step > 0.9 * total_steps)
    return config.peak_lr * math.sqrt(0.1) ** stage
