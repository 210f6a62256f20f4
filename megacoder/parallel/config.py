"""How a run is laid out over its ranks: the sizes of the axes, and how each kind of parallelism works."""

from dataclasses import dataclass
from typing import Literal

from megacoder.core.config import check_at_least
from megacoder.parallel.dims import ParallelDims
from megacoder.parallel.flat import BUCKET_ELEMENTS

__all__ = ["ParallelConfig"]


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """Losses, gradients and weights are the same for every choice, up to rounding; time and memory are not."""

    tp: int = 1
    """tensor-parallel ranks, which share every layer"""
    cp: int = 1
    """context-parallel ranks, which share every sequence"""
    pp: int = 1
    """pipeline-parallel ranks, each with some of the layers"""
    dp: int | None = None
    """data-parallel replicas; if unset, the number of ranks / (tp * cp * pp)"""
    sequence_parallel: bool = True
    """the tp ranks also split the tokens of norms and residual stream: same traffic, less memory"""
    schedule: Literal["gpipe", "1f1b", "interleaved", "zb-h1", "zbv", "dualpipev"] = "1f1b"
    """pipeline schedule; `megacoder plan --schedule NAME` shows what it computes when"""
    chunks: int | None = None
    """stages per pipeline rank; a choice for interleaved only, 2 if unset"""
    layers_per_stage: tuple[int, ...] | None = None
    """number of layers of each stage, first to last; if unset, stages take equal time, the head counted"""
    bucket_elements: int = BUCKET_ELEMENTS
    """gradient elements sent together; smaller buckets are sent earlier, larger ones use the network better"""
    shared_memory: bool = True
    """CPU ranks of one host exchange tensors through shared memory; if off, through sockets, as between hosts"""

    def __post_init__(self) -> None:
        check_at_least(self, 1, "tp", "cp", "pp", "dp", "bucket_elements", prefix="parallel.")

    def dims(self, world_size: int) -> ParallelDims:
        """The layout of `world_size` ranks, dp filled in where it may be; its product may still be another number."""
        dp = self.dp or max(1, world_size // (self.tp * self.cp * self.pp))
        return ParallelDims(tp=self.tp, cp=self.cp, pp=self.pp, dp=dp)
