"""Why an update was skipped: the windows of its batch with the highest loss, the weights with the largest gradients.

A skipped update leaves the weights as they were, so its step can be computed once more: forward, a window at a time,
then forward and backward. That takes about four thirds of a step, and nothing while no update is skipped. What does
not happen again was not in the data: a device or a link has failed for a moment, which nothing else would show.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TypeVar

from megacoder.checkpoint.folders import CHECKPOINTS, step_folders
from megacoder.data.stream import Batch
from megacoder.parallel.world import gather_json
from megacoder.train.config import RUN_TOML, RunConfig
from megacoder.train.engine import Engine
from megacoder.train.guard import UpdateLimits

__all__ = ["describe_causes"]

K = TypeVar("K", int, str)

_SHOWN = 3
"""Windows and weights that are named."""
_CLEARLY = 0.9
"""Of a limit: below it, more than rounding has changed, which on a GPU is not the same every time."""


def describe_causes(
    engine: Engine, batch: Batch, config: RunConfig, limits: UpdateLimits, *, step: int, windows_before: int
) -> str:
    """A line, the same on every rank, about `step`, whose update has just been skipped under `limits`.

    `batch` is this rank's, with labels on some rank, and `windows_before` is how many windows all ranks were served
    before it. All ranks call this at once. Weights, optimizer and data stay as they are.
    """
    engine.mesh.world.journal.at("examining a skipped update")
    losses = _loss_by_window(engine, batch, config.micro_batch_size, windows_before)
    part = engine.forward_backward(engine.microbatches(batch, config.micro_batch_size))
    loss_sum, num_tokens = engine.sum_losses(part)
    squares = _squares_by_weight(engine)
    engine.optimizer.drop_gradients()
    loss, norm = loss_sum / num_tokens, math.sqrt(sum(squares.values())) / num_tokens
    found = f"computed again, loss {loss:.4g} and gradient norm {norm:.4g}"
    if loss <= _CLEARLY * limits.loss and norm <= _CLEARLY * limits.grad_norm:
        return f"{found}, which are within the limits: for a moment a device, its memory or a link has failed"
    highest = _largest(losses)
    shown = _how_to_show(config, step, highest)
    return f"{found}; {_describe_losses(losses, highest)} ({shown}); {_describe_gradients(squares, num_tokens)}"


def _loss_by_window(engine: Engine, batch: Batch, micro_batch_size: int, windows_before: int) -> dict[int, float]:
    """Nats per token of every window with labels, by its number in the step, from 1."""
    mesh, starts = engine.mesh, batch.starts
    first = (mesh.place.dp - windows_before) % mesh.dims.dp  # as streams deal windows to ranks
    ours: list[tuple[int, float, int]] = []
    for place in range(micro_batch_size):  # as many microbatches as the pipeline's program has
        rows = slice(place, None, micro_batch_size)
        windows = Batch(
            tokens=batch.tokens[rows], labels=batch.labels[rows], starts=None if starts is None else starts[rows]
        )
        for number, loss in enumerate(engine.losses(engine.microbatches(windows, 1))):
            row = number * micro_batch_size + place
            ours.append((first + row * mesh.dims.dp + 1, loss.total.item(), loss.num_tokens))
    totals, tokens = defaultdict[int, float](float), defaultdict[int, int](int)
    for of_rank in gather_json(ours, mesh.world):  # context-parallel ranks have a part of each window
        for window, total, count in of_rank:
            totals[window] += total
            tokens[window] += count
    return {window: totals[window] / tokens[window] for window in sorted(totals) if tokens[window]}


def _squares_by_weight(engine: Engine) -> dict[str, float]:
    """Sums of squares of the gradient sums of all ranks, in the order in which a forward reads the weights."""
    sums = defaultdict[str, float](float)
    for of_rank in gather_json(engine.optimizer.squares_by_parameter(), engine.mesh.world):
        for name, value in of_rank.items():
            sums[name] += value
    return {name: sums[name] for name in sorted(sums, key=_place_in_model)}


def _place_in_model(name: str) -> tuple[int, int]:
    first, *rest = name.split(".")
    return (1, int(rest[0])) if first == "layers" else (0 if first == "embed_tokens" else 2, 0)


def _how_to_show(config: RunConfig, step: int, windows: Sequence[int]) -> str:
    words = ["megacoder data show", config.output / RUN_TOML, "--step", step, "--windows", *windows]
    if saved := step_folders(config.output / CHECKPOINTS):  # else the data are read from their beginning
        words += ["--checkpoint", saved[-1][1]]
    return " ".join(map(str, words))


def _describe_losses(losses: Mapping[int, float], highest: Sequence[int]) -> str:
    bad, shown = sum(not math.isfinite(loss) for loss in losses.values()), _listed(losses, highest)
    if bad:
        return f"{bad} of {len(losses)} windows have no finite loss, such as {shown}"
    return f"of {len(losses)} windows the loss is highest in {shown}"


def _describe_gradients(squares: Mapping[str, float], num_tokens: float) -> str:
    """Gradients flow from the model's end to its beginning, and so does what is not finite in them."""
    bad = [name for name, square in squares.items() if not math.isfinite(square)]
    if bad:
        return f"the gradients of {len(bad)} of {len(squares)} weights are not finite, from {bad[-1]} back"
    norms = {name: math.sqrt(square) / num_tokens for name, square in squares.items()}
    return f"the gradient is largest of {_listed(norms, _largest(norms))}"


def _listed(values: Mapping[K, float], keys: Sequence[K]) -> str:
    return ", ".join(f"{key} ({values[key]:.4g})" for key in keys)


def _largest(values: Mapping[K, float]) -> list[K]:
    """The keys of the largest values, those that are not finite first."""
    order = sorted(values, key=lambda key: values[key] if math.isfinite(values[key]) else math.inf, reverse=True)
    return order[:_SHOWN]
