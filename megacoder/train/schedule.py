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
    """three_stage (pre-training), cosine (to a tenth of the peak), constant; all after the warm-up"""
    peak_lr: float = 4.2e-4
    """learning rate after the warm-up"""
    warmup_steps: int = 2000
    """steps of linear warm-up"""

    def __post_init__(self) -> None:
        if not 0 < self.peak_lr < math.inf:
            raise ConfigError(f"schedule.peak_lr = {self.peak_lr}: must be positive")
        if self.warmup_steps < 0:
            raise ConfigError(f"schedule.warmup_steps = {self.warmup_steps}: must not be negative")


def learning_rate(step: int, total_steps: int, config: ScheduleConfig) -> float:
    """The rate of update `step` (1 .. total_steps)."""
    if step <= config.warmup_steps:
        return config.peak_lr * step / config.warmup_steps
    if config.kind == "constant":
        return config.peak_lr
    if config.kind == "cosine":
        progress = (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
        return config.peak_lr * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))
    stage = (step > 0.8 * total_steps) + (step > 0.9 * total_steps)
    return config.peak_lr * math.sqrt(0.1) ** stage
