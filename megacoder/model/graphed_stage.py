"""A whole model's microbatch, forward and backward, as one CUDA graph: recorded once, then replayed.

A layer's step is some thirty kernels. Where they are short (small models, short microbatches) a GPU waits for the host
to launch the next one; of a graph it has them all. What a graph needs is given here: addresses that stay (parameters
and gradients lie in flat buffers, tokens and labels are copied into tensors of the graph's own), shapes that stay
(masks of packed documents do not: each microbatch has its own number of them), and a step in which the host asks
nothing of the device (see `Microbatch.num_labels`).

The graph holds no collective: one rank holds the whole model, and sums over data-parallel ranks wait for the step's
end, since a replay reports to no one. Not yet run on a GPU.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from megacoder.model.stage import Microbatch, Stage
from megacoder.ops.cross_entropy import LossSum

__all__ = ["GraphedStage"]

WARM_UP = 2
"""Microbatches that run as ever, so that kernels are compiled and libraries have chosen theirs before the recording."""


@dataclass(kw_only=True)
class GraphedStage:
    """`stage`, the whole model, as the runner calls it: its forward does the backward's work, too."""

    stage: Stage
    _num_run: int = field(default=0, init=False)
    _recorded: "_Recorded | None" = field(default=None, init=False)

    def new_boundary(self, microbatch: Microbatch) -> Tensor:
        """See `ModelStage`."""
        return self.stage.new_boundary(microbatch)

    def forward(self, x_TD: Tensor | None, microbatch: Microbatch) -> tuple[Tensor | LossSum, None]:
        """The loss, once gradients have been added; ValueError for what a graph cannot hold, or this one does not."""
        if microbatch.num_labels is None or microbatch.places is None or microbatch.places.documents is not None:
            raise ValueError("a graph is of whole sequences with places, not masked, whose labels have been counted")
        if self._num_run < WARM_UP:
            self._num_run += 1
            return _forward_backward(self.stage, microbatch), None
        if self._recorded is None:
            self._recorded = _Recorded(self.stage, microbatch)
        return self._recorded.replay(microbatch, microbatch.num_labels), None

    def backward(self, grad_TD: Tensor | None, saved: Any) -> Tensor | None:
        """Nothing: `forward` has done it."""
        return None

    def backward_input(self, grad_TD: Tensor | None, saved: Any) -> tuple[Tensor | None, Callable[[], None]]:
        """Nothing now, and nothing later."""
        return None, _nothing


def _forward_backward(stage: Stage, microbatch: Microbatch) -> LossSum:
    loss, saved = stage.forward(None, microbatch)
    stage.backward(None, saved)
    assert isinstance(loss, LossSum)
    return loss


class _Recorded:
    """The graph, and the tensors through which it is given a microbatch and returns its loss."""

    def __init__(self, stage: Stage, microbatch: Microbatch) -> None:
        self._entering = replace(
            microbatch, tokens_BS=microbatch.tokens_BS.clone(), labels_BS=microbatch.labels_BS.clone()
        )
        self._total = torch.empty(0)

        def step() -> None:
            self._total = _forward_backward(stage, self._entering).total

        self._run = record(step)

    def replay(self, microbatch: Microbatch, num_labels: int) -> LossSum:
        """Its loss; ValueError for tokens of another shape."""
        shape, recorded = microbatch.tokens_BS.shape, self._entering.tokens_BS.shape
        if shape != recorded:
            raise ValueError(f"the graph is of microbatches of {list(recorded)} tokens; this one has {list(shape)}")
        self._entering.tokens_BS.copy_(microbatch.tokens_BS)
        self._entering.labels_BS.copy_(microbatch.labels_BS)
        self._run()
        return LossSum(self._total.clone(), num_labels)


def record(step: Callable[[], None]) -> Callable[[], None]:
    """What replays the kernels that `step` launches; recording runs none of them."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # NCCL's own thread may call CUDA meanwhile
        step()
    return graph.replay


def _nothing() -> None:
    pass
