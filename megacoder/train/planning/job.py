"""What is to be planned, and one way to lay it out: the two records that everything else here works on."""

from dataclasses import dataclass
from typing import Self

from megacoder.core.errors import ConfigError
from megacoder.model.config import ModelConfig
from megacoder.model.kept import Recompute
from megacoder.parallel.dims import ParallelDims
from megacoder.parallel.flat import BUCKET_ELEMENTS
from megacoder.parallel.schedules.generators import build_schedule
from megacoder.parallel.tensor import TensorParallel
from megacoder.train.layout import LayoutRequest

__all__ = ["Job", "Variant"]


@dataclass(frozen=True, kw_only=True)
class Job:
    """A run, whatever its layout."""

    model: ModelConfig
    seq_length: int
    """tokens of a sequence"""
    global_batch_size: int
    """sequences of an update"""
    itemsize: int = 2
    """bytes of a weight and of an activation's element: bf16, or 4 for fp32"""

    def __post_init__(self) -> None:
        for name in ("seq_length", "global_batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} = {getattr(self, name)}: must be at least 1")
        if self.seq_length > self.model.max_position_embeddings:
            raise ConfigError(
                f"seq_length = {self.seq_length} exceeds the model's {self.model.max_position_embeddings} positions"
                f"{self.model.positions_advice}"
            )

    @property
    def tokens_per_step(self) -> int:
        return self.global_batch_size * self.seq_length


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A layout and how its ranks run."""

    dims: ParallelDims
    schedule: str = "1f1b"
    chunks: int = 1
    """stages per pipeline rank"""
    micro_batch_size: int = 1
    recompute: Recompute = "none"
    fp8: bool = False
    sequence_parallel: bool = True
    overlaps_exchange: bool = False
    """whether the forward's tensor parallel exchanges run beside products (this library's do not)"""
    stage_per_node: bool = False
    """whether a node's devices hold one pipeline stage of several replicas (this library's hold one replica's ranks)"""
    bucket_elements: int = BUCKET_ELEMENTS
    layers_per_stage: tuple[int, ...] | None = None
    """if unset, placed by cost"""

    @classmethod
    def of(cls, request: LayoutRequest, dims: ParallelDims) -> Self:
        """As a run asks for it; `dims` are those that `request.check` returned."""
        parallel, execution = request.parallel, request.execution
        schedule = build_schedule(parallel.schedule, num_ranks=1, num_microbatches=1, num_chunks=parallel.chunks)
        return cls(
            dims=dims, schedule=parallel.schedule, chunks=schedule.num_chunks,
            micro_batch_size=request.micro_batch_size, recompute=execution.recompute, fp8=execution.fp8,
            sequence_parallel=parallel.sequence_parallel, bucket_elements=parallel.bucket_elements,
            layers_per_stage=parallel.layers_per_stage,
        )  # fmt: skip

    @property
    def tp(self) -> TensorParallel:
        """As the layers' arithmetic takes it; no rank computes with it."""
        return TensorParallel(size=self.dims.tp, sequence_parallel=self.sequence_parallel)

    def microbatches(self, job: Job) -> int:
        """Of a step, on one replica."""
        return job.global_batch_size // (self.dims.dp * self.micro_batch_size)

    def tokens(self, job: Job) -> int:
        """T: of a microbatch, on a context parallel rank."""
        return self.micro_batch_size * job.seq_length // self.dims.cp

    def rows(self, job: Job) -> int:
        """N: those of the residual stream on one tensor parallel rank."""
        return self.tokens(job) // (self.dims.tp if self.sequence_parallel else 1)

    def __str__(self) -> str:
        chunks = f" x{self.chunks}" if self.schedule == "interleaved" else ""
        return f"{self.dims} {self.schedule}{chunks}, micro batch {self.micro_batch_size}, recompute {self.recompute}"
