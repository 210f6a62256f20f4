"""Learning rates as pure functions of the step.

`three_stage` is DeepSeek's: linear warm-up, the peak until 80% of training, sqrt(1/10) of it until 90%, a tenth of it
to the end (arXiv:2401.02954, 2.3; arXiv:2401.14196, 3.4). `wsd` is warm-up, the peak, and a decay over a share of the
steps at the end (MiniCPM, arXiv:2404.06395, section 4), linear or 1 - sqrt (arXiv:2405.18392): until the decay begins
its rates are those of `constant`, so that a run can be extended, and several decays can branch from one. Steps count
from 1, as in AdamW's bias correction.
"""

import math
from dataclasses import dataclass
from typing import Literal

from megacoder.core.errors import ConfigError

__all__ = ["ScheduleConfig", "learning_rate"]


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """How the learning rate moves over a run."""

    kind: Literal["three_stage", "cosine", "wsd", "constant"] = "three_stage"
    """shape after the warm-up: three_stage (pre-training), cosine, wsd (constant, then a decay at the end), constant"""
    peak_lr: float = 4.2e-4
    """learning rate after the warm-up"""
    warmup_steps: int = 2000
    """steps of linear warm-up"""
    warmup_tokens: int | None = None
    """tokens of linear warm-up, instead of `warmup_steps`"""
    final_share: float = 0.1
    """share of the peak at which cosine and wsd end"""
    decay_share: float = 0.1
    """share of the steps that the decay of wsd takes"""
    decay: Literal["linear", "sqrt"] = "linear"
    """shape of the decay of wsd: linear, or sqrt (1 - sqrt, which falls faster at first)"""

    def __post_init__(self) -> None:
        if not 0 < self.peak_lr < math.inf:
            raise ConfigError(f"schedule.peak_lr = {self.peak_lr}: must be positive")
        if self.warmup_steps < 0:
            raise ConfigError(f"schedule.warmup_steps = {self.warmup_steps}: must not be negative")
        if self.warmup_tokens is not None and self.warmup_tokens < 0:
            raise ConfigError(f"schedule.warmup_tokens = {self.warmup_tokens}: must not be negative")
        if not 0 <= self.final_share <= 1:
            raise ConfigError(f"schedule.final_share = {self.final_share}: must be between 0 and 1")
        if not 0 < self.decay_share <= 1:
            raise ConfigError(f"schedule.decay_share = {self.decay_share}: must be above 0, at most 1")

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
    if config.kind == "wsd":
        begin = max(warmup, total_steps - round(config.decay_share * total_steps))
        if step <= begin:
            return config.peak_lr
        progress = (step - begin) / (total_steps - begin)
        fallen = progress if config.decay == "linear" else math.sqrt(progress)
        return config.peak_lr * (1 - (1 - config.final_share) * fallen)
    stage = (step > 0.8 * total_steps) + (step > 0.9 * total_steps)
    return config.peak_lr * math.sqrt(0.1) ** stage
