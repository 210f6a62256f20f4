"""A whole model's microbatch, forward and backward, as one CUDA graph: recorded once, then replayed.

A layer's step is some thirty kernels. Where they are short (small models, short microbatches) a GPU waits for the host
to launch the next one; a graph launches them all at once. A graph needs fixed addresses (parameters and gradients lie
in flat buffers, tokens and labels are copied into the graph's own tensors), fixed shapes (which rules out the masks of
packed documents: every microbatch has a different number of documents), and a step in which the host never waits for
the device (see `Microbatch.num_labels`).

The graph holds no collective: one rank holds the whole model, and data-parallel ranks reduce gradients only at the end
of the step, since a replay does not report finished layers. Not yet run on a GPU.
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
"""Microbatches that run without a graph first, so that kernels are compiled and chosen before the recording."""


@dataclass(kw_only=True)
class GraphedStage:
    """`stage`, the whole model, with the interface that the runner calls; `forward` runs the backward too."""

    stage: Stage
    _num_run: int = field(default=0, init=False)
    _recorded: "_Recorded | None" = field(default=None, init=False)

    def new_boundary(self, microbatch: Microbatch) -> Tensor:
        """See `ModelStage`."""
        return self.stage.new_boundary(microbatch)

    def forward(self, x_TD: Tensor | None, microbatch: Microbatch) -> tuple[Tensor | LossSum, None]:
        """The loss; gradients are already accumulated. ValueError for a microbatch that the graph cannot run."""
        if microbatch.num_labels is None or microbatch.places is None or microbatch.places.documents is not None:
            raise ValueError("a CUDA graph needs microbatches with places, counted labels and no document mask")
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
        return None, lambda: None


def _forward_backward(stage: Stage, microbatch: Microbatch) -> LossSum:
    loss, saved = stage.forward(None, microbatch)
    stage.backward(None, saved)
    assert isinstance(loss, LossSum)
    return loss


class _Recorded:
    """The graph, and the tensors through which a microbatch enters it and its loss leaves."""

    def __init__(self, stage: Stage, microbatch: Microbatch) -> None:
        self._entering = replace(
            microbatch, tokens_BS=microbatch.tokens_BS.clone(), labels_BS=microbatch.labels_BS.clone()
        )
        self._total = torch.empty(0)

        def step() -> None:
            self._total = _forward_backward(stage, self._entering).total

        self._run = record(step)

    def replay(self, microbatch: Microbatch, num_labels: int) -> LossSum:
        """The microbatch's loss; ValueError where its tokens have a different shape than the recorded ones."""
        shape, recorded = microbatch.tokens_BS.shape, self._entering.tokens_BS.shape
        if shape != recorded:
            raise ValueError(f"the graph was recorded for {list(recorded)} tokens; this microbatch has {list(shape)}")
        self._entering.tokens_BS.copy_(microbatch.tokens_BS)
        self._entering.labels_BS.copy_(microbatch.labels_BS)
        self._run()
        return LossSum(self._total.clone(), num_labels)


def record(step: Callable[[], None]) -> Callable[[], None]:
    """Records the kernels that `step` launches, without running them; returns what replays them."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # NCCL's own thread may call CUDA meanwhile
        step()
    return graph.replay
