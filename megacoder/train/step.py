"""One update of training, which its profile runs too.

The loop puts checkpoints, logs and signals around the update, the profile a clock. Neither has a step of its own, so
that what is measured is what trains.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from megacoder.data.stream import Batch, Batches
from megacoder.parallel.journal import DATA, UPDATE
from megacoder.train.config import RunConfig
from megacoder.train.engine import Engine
from megacoder.train.guard import UpdateLimits
from megacoder.train.pace import NO_PACE, StepPace
from megacoder.train.replicas import ReplicaCheck

__all__ = ["Oversight", "StepResult", "run_step"]


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What one update did; the same on every rank but for `batch`."""

    loss: float
    """mean over the global batch's trained tokens, nats"""
    num_tokens: int
    """trained tokens of the global batch"""
    batch: Batch
    """this rank's part of it"""
    grad_norm: float
    """before clipping; inf where it is not finite"""
    skipped: bool
    """whether the update was skipped"""
    stop: bool
    """a rank was asked to stop"""
    saves: bool
    """a checkpoint is to follow"""
    seconds: tuple[float, ...]
    """of every rank in the step before, if that was measured (see `megacoder.train.pace`)"""


@dataclass(frozen=True, kw_only=True)
class Oversight:
    """What training watches in its steps, and a profile does not."""

    limits: UpdateLimits = field(default_factory=UpdateLimits)
    """beyond which every rank skips the update"""
    replicas: ReplicaCheck | None = None
    """compared when they are due, and if the step ends with a checkpoint"""
    stop_asked: Callable[[], bool] = lambda: False
    """on any rank: the step ends with a checkpoint, after which the run stops. Called as late as ranks can still agree
    on the answer, which travels with the loss, so that a signal costs no further step"""
    save_is_due: Callable[[], bool] = lambda: False
    """on any rank: the step ends with a checkpoint. Called when `stop_asked` is"""
    pace: StepPace = NO_PACE
    """told how far the step is; what it reports is summed over ranks with the loss"""


_UNWATCHED = Oversight()


def run_step(
    engine: Engine, batches: Batches, config: RunConfig, number: int, *, oversight: Oversight = _UNWATCHED
) -> StepResult:
    """Step `number`, from 1: one global batch and one optimizer update."""
    journal, pace, limits = engine.mesh.world.journal, oversight.pace, oversight.limits
    journal.begin_step(number)
    pace.begin(number)
    journal.at(DATA)
    batch = batches.next_batch()
    pace.got_data()
    microbatches = engine.microbatches(batch, config.micro_batch_size)
    part = engine.forward_backward(microbatches)
    pace.computed()
    journal.at(UPDATE)
    loss_sum, counted, stop, save, *seconds = engine.sum_losses(
        part, oversight.stop_asked(), oversight.save_is_due(), *pace.report()
    )
    pace.read()
    saves = stop > 0 or save > 0 or config.ends_with_checkpoint(number)
    if oversight.replicas is not None:
        oversight.replicas.maybe_compare(number, saves=saves)
        journal.at(UPDATE)
    loss = loss_sum / counted if counted else math.nan  # no token is trained: the update is skipped
    num_updates = engine.optimizer.num_updates
    grad_norm = engine.update(
        lr=config.learning_rate(number),
        num_tokens=max(1, int(counted)),
        max_grad_norm=config.clip_norm,
        skip_above=limits.grad_norm if loss <= limits.loss else -1.0,  # NaN counts as above
    )
    return StepResult(
        loss=loss, num_tokens=int(counted), batch=batch, grad_norm=grad_norm,
        skipped=engine.optimizer.num_updates == num_updates, stop=stop > 0, saves=saves,
        seconds=tuple(seconds),
    )  # fmt: skip
