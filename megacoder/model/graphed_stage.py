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

import torch
from torch import Tensor

from megacoder.model.stage import Microbatch, SavedStage, Stage
from megacoder.ops.cross_entropy import LossSum

__all__ = ["GraphedStage"]

WARM_UP = 2
"""Microbatches that run as ever, so that kernels are compiled and libraries have chosen theirs before the recording."""


@dataclass(kw_only=True)
class GraphedStage:
    """`stage`, the whole model, as the runner calls it; the replay of a forward is the backward's, too."""

    stage: Stage
    _num_run: int = field(default=0, init=False)
    _recorded: "_Recorded | None" = field(default=None, init=False)

    def new_boundary(self, microbatch: Microbatch) -> Tensor:
        """See `ModelStage`."""
        return self.stage.new_boundary(microbatch)

    def forward(self, x_TD: Tensor | None, microbatch: Microbatch) -> tuple[Tensor | LossSum, SavedStage | None]:
        """(loss, None) once gradients have been added, too; while warming up what `Stage.forward` returns."""
        if self._num_run < WARM_UP:
            self._num_run += 1
            return self.stage.forward(x_TD, microbatch)
        if self._recorded is None:
            self._recorded = _Recorded(self.stage, microbatch)
        return self._recorded.replay(microbatch), None

    def backward(self, grad_TD: Tensor | None, saved: SavedStage | None) -> Tensor | None:
        """Nothing where `forward` has done it."""
        return None if saved is None else self.stage.backward(grad_TD, saved)

    def backward_input(
        self, grad_TD: Tensor | None, saved: SavedStage | None
    ) -> tuple[Tensor | None, Callable[[], None]]:
        """As `backward`, which leaves nothing for later."""
        return self.backward(grad_TD, saved), _nothing


class _Recorded:
    """The graph, and the tensors through which it is given a microbatch and returns its loss."""

    def __init__(self, stage: Stage, microbatch: Microbatch) -> None:
        self._entering = replace(
            microbatch, tokens_BS=microbatch.tokens_BS.clone(), labels_BS=microbatch.labels_BS.clone()
        )
        self._total = torch.empty(0)

        def step() -> None:
            loss, saved = stage.forward(None, self._entering)
            stage.backward(None, saved)
            assert isinstance(loss, LossSum)
            self._total = loss.total

        self._run = record(step)

    def replay(self, microbatch: Microbatch) -> LossSum:
        """Its loss; ValueError for what the graph was not recorded for."""
        if microbatch.tokens_BS.shape != self._entering.tokens_BS.shape or microbatch.num_labels is None:
            raise ValueError(
                f"the graph is of microbatches of {list(self._entering.tokens_BS.shape)} tokens whose labels are "
                f"counted; got {list(microbatch.tokens_BS.shape)}, num_labels = {microbatch.num_labels}"
            )
        self._entering.tokens_BS.copy_(microbatch.tokens_BS)
        self._entering.labels_BS.copy_(microbatch.labels_BS)
        self._run()
        return LossSum(self._total.clone(), microbatch.num_labels)


def record(step: Callable[[], None]) -> Callable[[], None]:
    """What replays the kernels that `step` launches; recording runs none of them."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()  # the graph has memory of its own: what the warm-up has cached would lie idle beside it
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # the prefetcher's thread may call CUDA meanwhile
        step()
    return graph.replay


def _nothing() -> None:
    pass
