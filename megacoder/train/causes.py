"""Why an update was skipped: the windows of its batch with the highest loss, the weights with the largest gradients.

A skipped update leaves the weights as they were, so its step can be computed once more, which costs nothing while no
update is skipped. What does not happen again was not in the data: a device, its memory or a link may have failed for a
moment, which nothing else would show.
"""

import math
import shlex
from collections import defaultdict
from collections.abc import Mapping
from typing import TypeVar

from megacoder.checkpoint.folders import CHECKPOINTS, step_folders
from megacoder.data.stream import Batch
from megacoder.parallel.world import gather_json
from megacoder.train.config import RUN_TOML, RunConfig
from megacoder.train.engine import Engine
from megacoder.train.guard import UpdateLimits

__all__ = ["describe_causes"]

_SHOWN = 3
"""Microbatches and weights that are named."""
_CLEARLY = 0.9
"""Of a limit: below it, more than rounding has changed, which on a GPU is not the same every time."""

Windows = tuple[int, ...]
"""Of a microbatch, by their numbers in the step, from 1."""
Key = TypeVar("Key", Windows, str)


def describe_causes(
    engine: Engine, batch: Batch, config: RunConfig, limits: UpdateLimits, *, step: int, windows_before: int
) -> str:
    """A line about `step`, whose update has just been skipped under `limits`; all ranks call this at once.

    `batch` is this rank's, with labels on some rank, and `windows_before` is how many windows all ranks were served
    before it. Weights, optimizer and data stay as they are.
    """
    engine.mesh.world.journal.at("examining a skipped update")
    losses = _compute_again(engine, batch, config.micro_batch_size, windows_before)
    squares = _squares_by_weight(engine)
    engine.optimizer.drop_gradients()
    num_tokens = sum(tokens for _, tokens in losses.values())
    loss = sum(total for total, _ in losses.values()) / num_tokens
    norm = math.sqrt(sum(squares.values())) / num_tokens
    found = f"computed again, loss {loss:.4g} and gradient norm {norm:.4g}"
    if loss <= _CLEARLY * limits.loss and norm <= _CLEARLY * limits.grad_norm:
        return (
            f"{found}, which are within the limits: this was no fault of the data; for a moment a device, its memory "
            "or a link may have failed"
        )
    means = {windows: total / tokens for windows, (total, tokens) in losses.items() if tokens}
    norms = {name: math.sqrt(square) / num_tokens for name, square in squares.items()}
    return f"{found}; {_describe_losses(means)} ({_how_to_show(config, step, means)}); {_describe_gradients(norms)}"


def _compute_again(
    engine: Engine, batch: Batch, micro_batch_size: int, windows_before: int
) -> dict[Windows, tuple[float, int]]:
    """Adds the step's gradients; (loss sum, tokens) of every rank's microbatches."""
    mesh = engine.mesh
    first = (mesh.place.dp - windows_before) % mesh.dims.dp  # as streams deal windows to ranks
    ours: list[tuple[Windows, float, int]] = []
    for number, loss in enumerate(engine.forward_backward_each(engine.microbatches(batch, micro_batch_size))):
        rows = range(number * micro_batch_size, (number + 1) * micro_batch_size)
        windows = tuple(first + row * mesh.dims.dp + 1 for row in rows)
        ours.append((windows, loss.total.item(), loss.num_tokens))
    sums: dict[Windows, tuple[float, int]] = defaultdict(lambda: (0.0, 0))
    for of_rank in gather_json(ours, mesh.world):  # context-parallel ranks have a part of each window
        for key, total, tokens in of_rank:
            before = sums[tuple(key)]
            sums[tuple(key)] = before[0] + total, before[1] + tokens
    return dict(sorted(sums.items()))


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


def _how_to_show(config: RunConfig, step: int, losses: Mapping[Windows, float]) -> str:
    windows = [window for key in _largest(losses) for window in key]
    words = ["megacoder data show", config.output / RUN_TOML, "--step", step, "--windows", *windows]
    saved = [folder for at, folder in step_folders(config.output / CHECKPOINTS) if at < step]
    if saved:  # else the data are read from their beginning
        words += ["--checkpoint", saved[-1]]
    command, *others = map(str, words)
    return f"{command} {shlex.join(others)}"


def _describe_losses(losses: Mapping[Windows, float]) -> str:
    shown = ", ".join(f"{' '.join(map(str, key))} ({losses[key]:.4g})" for key in _largest(losses))
    if bad := sum(not math.isfinite(loss) for loss in losses.values()):
        return f"the loss of {bad} of {len(losses)} microbatches is not finite, such as that of windows {shown}"
    return f"of {len(losses)} microbatches the loss is highest in that of windows {shown}"


def _describe_gradients(norms: Mapping[str, float]) -> str:
    """Gradients flow from the model's end to its beginning, and so does what is not finite in them."""
    bad = [name for name, norm in norms.items() if not math.isfinite(norm)]
    if bad:
        return f"the gradients of {len(bad)} of {len(norms)} weights are not finite, from {bad[-1]} back"
    return f"the gradient is largest of {', '.join(f'{name} ({norms[name]:.4g})' for name in _largest(norms))}"


def _largest(values: Mapping[Key, float]) -> list[Key]:
    """The keys of the largest values, those that are not finite first."""
    order = sorted(values, key=lambda key: values[key] if math.isfinite(values[key]) else math.inf, reverse=True)
    return order[:_SHOWN]
