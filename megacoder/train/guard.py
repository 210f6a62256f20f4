"""Which updates a run skips, and when it gives up: protection from losses and gradients that spike or are not finite.

An update is skipped, on every rank, if its loss or gradient norm is not finite or exceeds a multiple of the median of
the updates before. The limits are plain numbers known before the step begins, so that a GPU decides by itself (see
`megacoder.parallel.zero`); they depend only on the run's history, which is part of a checkpoint: a resumed run skips
what the uninterrupted one does.

A gradient norm that needs no clipping is never a spike, nor is a loss below LEAST_LOSS: the median loss of a model that
has memorized a few answers is close to 0, and the loss of any other text is many times that.

A median, since one spike would move a mean. Only updates that were applied count in it: if the level has really
changed, the run ends after `max_skipped` steps instead of accepting the new level as normal.
"""

import math
import statistics
import sys
from collections import deque
from dataclasses import dataclass
from typing import Any

from megacoder.core.config import check_at_least
from megacoder.core.errors import AlikeOnAllRanks, ConfigError

__all__ = ["Guard", "GuardConfig", "RunStopped", "UpdateLimits"]

LEAST_LOSS = 1.0
"""Nats per token; the loss of a run that diverges is above."""


@dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """When an update is skipped, when skipped updates end the run, and how often replicas are compared."""

    loss_spike: float = 3.0
    """skip an update whose loss is above 1 nat and above this many times the median; 0: only if it is not finite"""
    grad_norm_spike: float = 10.0
    """the same for the gradient norm before clipping, which must also be above max_grad_norm"""
    window: int = 128
    """number of updates that the medians cover; nothing counts as a spike before a quarter of them"""
    max_skipped: int = 20
    """end the run after this many skipped updates in a row"""
    compare_replicas_every: int = 100
    """steps between comparisons of weights that several ranks hold; also made with each checkpoint; 0: never"""

    def __post_init__(self) -> None:
        for name in ("loss_spike", "grad_norm_spike"):
            factor = getattr(self, name)
            if factor != 0 and not 1.0 < factor < math.inf:
                raise ConfigError(f"guard.{name} = {factor}: must be above 1, or 0 so that nothing counts as a spike")
        check_at_least(self, 1, "window", "max_skipped", prefix="guard.")
        check_at_least(self, 0, "compare_replicas_every", prefix="guard.")


class RunStopped(AlikeOnAllRanks):
    """The run has stopped itself, because its training diverges or one of its machines is faulty."""

    def __init__(self, message: str, *, restart_helps: bool) -> None:
        """`restart_helps`: resuming from the newest checkpoint may end differently."""
        super().__init__(message)
        self.restart_helps = restart_helps


@dataclass(frozen=True, kw_only=True)
class UpdateLimits:
    """The largest values at which an update is applied; by default any that are finite."""

    loss: float = sys.float_info.max
    grad_norm: float = sys.float_info.max


class Guard:
    """Keeps the history that limits follow from; the same on every rank."""

    def __init__(self, config: GuardConfig, *, max_grad_norm: float) -> None:
        """`max_grad_norm` is what gradients are clipped to; inf for none."""
        self.config = config
        self._least_grad_norm = max_grad_norm if math.isfinite(max_grad_norm) else 0.0
        self.num_skipped = 0
        """updates skipped since the run began"""
        self._in_a_row = 0
        self._losses: deque[float] = deque(maxlen=config.window)
        self._grad_norms: deque[float] = deque(maxlen=config.window)

    def limits(self) -> UpdateLimits:
        """The limits of the next update."""
        return UpdateLimits(
            loss=self._limit(self._losses, self.config.loss_spike, least=LEAST_LOSS),
            grad_norm=self._limit(self._grad_norms, self.config.grad_norm_spike, least=self._least_grad_norm),
        )

    def note(self, *, loss: float, grad_norm: float, skipped: bool, num_tokens: int) -> str | None:
        """Records an update under `limits()`; returns why it was skipped, None if it was not.

        Raises RunStopped after `max_skipped` in a row: a restart would meet the same batches with the same weights.
        """
        if not skipped:
            self._losses.append(loss)
            self._grad_norms.append(grad_norm)
            self._in_a_row = 0
            return None
        reason = self._reason(loss, grad_norm) if num_tokens else "no token of the batch is trained"
        self.num_skipped += 1
        self._in_a_row += 1
        if self._in_a_row >= self.config.max_skipped:
            raise RunStopped(
                f"{self._in_a_row} updates in a row were skipped, the last because {reason}; check the data of these "
                "steps (megacoder data show RUN.toml --step N), then resume with other limits in [guard], or from an "
                "earlier checkpoint without these data (data.skip_steps), or start another run from there (init_from) "
                "with a lower schedule.peak_lr",
                restart_helps=False,
            )
        return reason

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint: plain JSON values."""
        return {
            "num_skipped": self.num_skipped, "in_a_row": self._in_a_row,
            "losses": list(self._losses), "grad_norms": list(self._grad_norms),
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores the history from a checkpoint."""
        self.num_skipped, self._in_a_row = state["num_skipped"], state["in_a_row"]
        self._losses = deque(state["losses"], maxlen=self.config.window)
        self._grad_norms = deque(state["grad_norms"], maxlen=self.config.window)

    def _limit(self, values: deque[float], factor: float, *, least: float) -> float:
        if factor == 0 or len(values) < max(1, self.config.window // 4):
            return sys.float_info.max
        return max(least, factor * statistics.median(values))

    def _reason(self, loss: float, grad_norm: float) -> str:
        limits = self.limits()
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if not math.isfinite(grad_norm):
            return "the gradient is not finite"
        if loss > limits.loss:
            median = statistics.median(self._losses)
            return (
                f"the loss {loss:.4g} is above guard.loss_spike = {self.config.loss_spike:g} x its median {median:.4g}"
            )
        median = statistics.median(self._grad_norms)
        return (
            f"the gradient norm {grad_norm:.4g} is above guard.grad_norm_spike = {self.config.grad_norm_spike:g} x "
            f"its median {median:.4g}"
        )
