"""One update of training, which its profile runs too.

The loop puts checkpoints, logs and signals around the update, the profile a clock. Neither has a step of its own, so
that what is measured is what trains.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from megacoder.data.stream import Batch
from megacoder.parallel.journal import DATA, UPDATE
from megacoder.train.config import RunConfig
from megacoder.train.engine import Engine
from megacoder.train.guard import Limits
from megacoder.train.pace import Pace
from megacoder.train.replicas import ReplicaCheck

__all__ = ["Batches", "StepResult", "run_step"]


class Batches(Protocol):
    """Where a step's sequences come from."""

    def next_batch(self) -> Batch:
        """This data-parallel rank's part of the next global batch."""


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What one update did, the same on every rank."""

    loss: float
    """mean over the global batch's trained tokens, nats"""
    num_tokens: int
    """trained tokens of the global batch"""
    grad_norm: float
    """before clipping; inf where it is not finite"""
    skipped: bool
    """whether the update was skipped"""
    stop: bool
    """a rank was asked to stop"""
    saves: bool
    """a checkpoint is to follow"""
    seconds: tuple[float, ...]
    """of every rank in the step before, without waiting, if that was measured (see `megacoder.train.pace`)"""


def run_step(
    engine: Engine,
    batches: Batches,
    config: RunConfig,
    number: int,
    *,
    limits: Limits = Limits(),  # noqa: B008, it is frozen
    replicas: ReplicaCheck | None = None,
    stop_asked: Callable[[], bool] = lambda: False,
    save_is_due: Callable[[], bool] = lambda: False,
    pace: Pace | None = None,
) -> StepResult:
    """Step `number`, from 1: one global batch and one optimizer update, which every rank skips beyond `limits`.

    `replicas` are compared when they are due, and if the step ends with a checkpoint, as it does when `stop_asked` or
    `save_is_due` says so on any rank. They are called as late as ranks can still agree on the answer, which travels
    with the loss, so that a signal costs no further step.
    """
    journal = engine.mesh.world.journal
    journal.begin_step(number)
    if pace is not None:
        pace.begin(number)
    journal.at(DATA)
    microbatches = engine.microbatches(batches.next_batch(), config.micro_batch_size)
    part = engine.forward_backward(microbatches)
    if pace is not None:
        pace.computed()
    journal.at(UPDATE)
    others = [] if pace is None else pace.report()
    loss_sum, counted, stop, save, *seconds = engine.sum_losses(part, stop_asked(), save_is_due(), *others)
    if pace is not None:
        pace.read()
    saves = stop > 0 or save > 0 or config.ends_with_checkpoint(number)
    if replicas is not None:
        replicas.maybe_compare(number, saves=saves)
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
        loss=loss, num_tokens=int(counted), grad_norm=grad_norm,
        skipped=engine.optimizer.num_updates == num_updates, stop=stop > 0, saves=saves,
        seconds=tuple(seconds),
    )  # fmt: skip
