"""What every rank does in a step, decided on paper before any process starts its model.

A layout is refused here, with the reason and the nearest layouts that work, or it runs: heads, vocabulary and hidden
sizes divide over tp, sequences over cp, layers over the pipeline's stages, and the batch over dp.
"""

from dataclasses import dataclass, field
from functools import cached_property, lru_cache

from megacoder.core.console import counted
from megacoder.core.errors import ConfigError
from megacoder.model.config import ModelConfig
from megacoder.model.kept import Recompute, waiting_share
from megacoder.model.partition import ExecutionConfig
from megacoder.parallel.config import ParallelConfig
from megacoder.parallel.context import ContextParallel
from megacoder.parallel.dims import ParallelDims
from megacoder.parallel.schedules.generators import build_schedule
from megacoder.parallel.schedules.placement import LayerCosts, Placement, place_by_cost, place_evenly, place_explicitly
from megacoder.parallel.schedules.program import Program, build_program, check_program
from megacoder.parallel.schedules.schedule import Schedule, forwards_only
from megacoder.parallel.schedules.simulate import Costs
from megacoder.parallel.schedules.validate import check_schedule
from megacoder.parallel.schedules.waiting import limit_waiting
from megacoder.parallel.tensor import TensorParallel

__all__ = ["Layout", "LayoutRequest", "lay_out", "layer_costs", "limited_share"]


@dataclass(frozen=True, kw_only=True)
class LayoutRequest:
    """What a layout depends on."""

    model: ModelConfig
    parallel: ParallelConfig
    seq_length: int
    """tokens of a sequence"""
    global_batch_size: int
    """sequences of an update, over all ranks"""
    micro_batch_size: int
    """sequences of a forward and backward"""
    execution: ExecutionConfig = field(default_factory=ExecutionConfig)
    """how layers run, which not every layout allows"""

    def layout(self, world_size: int) -> "Layout":
        """The layout on `world_size` ranks; ConfigError with the reason and the nearest that work if there is none."""
        needed = self.parallel.dims(world_size).world_size
        if world_size == 1 < needed:
            dims = self.check(needed)
            raise ConfigError(
                f"{dims} needs {needed} ranks, only one was started; start them with --nproc {needed} or torchrun"
            )
        dims = self.check(world_size)
        schedule = self._schedule(dims, self.global_batch_size // (dims.dp * self.micro_batch_size))
        layout = lay_out(
            schedule, dims, self.model, seq_length=self.seq_length, layers_per_stage=self.parallel.layers_per_stage,
            limited_share=self._limited_share(dims),
        )  # fmt: skip
        check_schedule(layout.schedule)
        return layout

    def check(self, world_size: int) -> ParallelDims:
        """The sizes of the axes on `world_size` ranks; ConfigError as of `layout`, which checks the placement, too."""
        dims = self.parallel.dims(world_size)
        self._schedule(dims, 1)  # an error in the schedule, or in the batch alone, is one in every layout
        if self.global_batch_size % self.micro_batch_size:
            raise ConfigError(
                f"global_batch_size = {self.global_batch_size} is not a multiple of micro_batch_size = "
                f"{self.micro_batch_size}"
            )
        try:
            if dims.world_size != world_size:
                there = "is 1" if world_size == 1 else f"are {world_size}"
                raise ConfigError(f"{dims} needs {dims.world_size} ranks, there {there}")
            self._check_sizes(dims)
        except ConfigError as error:
            raise ConfigError(f"{error}; {self._advice(dims, world_size)}") from None
        return dims

    def _limited_share(self, dims: ParallelDims) -> float | None:
        if self.execution.block == "plain":  # nothing waits there
            return None
        tp = TensorParallel(size=dims.tp, sequence_parallel=self.parallel.sequence_parallel)
        return limited_share(self.model, self.execution.recompute, tp=tp, fp8=self.execution.fp8)

    def _schedule(self, dims: ParallelDims, num_microbatches: int) -> Schedule:
        parallel = self.parallel
        return build_schedule(
            parallel.schedule, num_ranks=dims.pp, num_microbatches=num_microbatches, num_chunks=parallel.chunks
        )

    def _check_sizes(self, dims: ParallelDims) -> None:
        """ConfigError with the first reason why `dims` cannot work; cheap, so that many can be tried."""
        self.model.check_tensor_parallel(dims.tp)
        ContextParallel(size=dims.cp).check_length(self.seq_length)
        share = TensorParallel(size=dims.tp, sequence_parallel=self.parallel.sequence_parallel)
        share.check_tokens(self.micro_batch_size, self.seq_length // dims.cp)
        if self.global_batch_size % (dims.dp * self.micro_batch_size):
            raise ConfigError(
                f"global_batch_size = {self.global_batch_size} is not a multiple of dp = {dims.dp} x "
                f"micro_batch_size = {self.micro_batch_size}"
            )
        self.execution.check_sizes(self.model, tp=dims.tp, tokens=self.micro_batch_size * self.seq_length // dims.cp)
        num_stages = self._schedule(dims, 1).stage_map.num_stages
        if self.execution.cuda_graph and (dims.tp, dims.cp, num_stages) != (1, 1, 1):
            raise ConfigError(
                "execution.cuda_graph = true: each rank must hold the whole model and whole sequences; with "
                f"tp = {dims.tp}, cp = {dims.cp} and {num_stages} pipeline stages it does not"
            )
        place_evenly(self.model.num_hidden_layers, num_stages)

    def _works(self, dims: ParallelDims) -> bool:
        try:
            self._check_sizes(dims)
        except ConfigError:
            return False
        given = self.parallel.layers_per_stage
        return given is None or len(given) == self._schedule(dims, 1).stage_map.num_stages

    def _advice(self, dims: ParallelDims, world_size: int) -> str:
        nearest = dims.nearest(world_size, works=self._works)
        if nearest:
            ranks = counted(world_size, "rank", "ranks")
            return f"nearest that work on {ranks}: {'; '.join(map(str, nearest))}"
        try:
            self._check_sizes(ParallelDims())
        except ConfigError:  # what fails on a single rank fails on any number
            return "this does not depend on the number of ranks"
        return f"no layout of {world_size} ranks works; another number of ranks may"


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A layout that works."""

    dims: ParallelDims
    schedule: Schedule
    """what pipeline ranks compute"""
    placement: Placement
    """which layers the stages hold"""
    layer_costs: LayerCosts
    """the predicted time of each kind of layer"""

    @cached_property
    def program(self) -> Program:
        """A pipeline's training step, proved to be free of deadlock."""
        return self._proved(self.schedule)

    @cached_property
    def evaluation_program(self) -> Program:
        """Its forwards alone."""
        return self._proved(forwards_only(self.schedule))

    def _proved(self, schedule: Schedule) -> Program:
        program = build_program(schedule, self._costs)
        check_program(program)
        return program

    @property
    def _costs(self) -> Costs:
        """By stage. The head's gradients are computed in its forward (see `megacoder.model.stage`). Every stage counts
        the embedding's cost, which is next to nothing, since one with no layer still takes time."""
        layers = [
            count * self.layer_costs.layer + self.layer_costs.embedding for count in self.placement.layers_per_stage
        ]
        head = [*[0.0] * (len(layers) - 1), 3 * self.layer_costs.head]
        return Costs(
            forward=tuple(a + b for a, b in zip(layers, head, strict=True)),
            input_grad=tuple(layers), weight_grad=tuple(layers),
        )  # fmt: skip


def lay_out(
    schedule: Schedule,
    dims: ParallelDims,
    model: ModelConfig,
    *,
    seq_length: int,
    layers_per_stage: tuple[int, ...] | None,
    limited_share: float | None,
) -> Layout:
    """`schedule` with the layers of its stages, by cost unless given; ConfigError if those cannot hold the layers."""
    costs = layer_costs(model, seq_length)
    if layers_per_stage is None:
        placement = _place_by_cost(model.num_hidden_layers, schedule.stage_map, costs=costs)
    else:
        num_stages = schedule.stage_map.num_stages
        placement = place_explicitly(model.num_hidden_layers, layers_per_stage, num_stages=num_stages)
    if limited_share is not None:
        schedule = limit_waiting(schedule, layers=placement.layers_per_stage, waiting_share=limited_share)
    return Layout(dims=dims, schedule=schedule, placement=placement, layer_costs=costs)


_place_by_cost = lru_cache(maxsize=4096)(place_by_cost)
"""A search for layouts asks for the same placements again and again."""


def limited_share(model: ModelConfig, recompute: Recompute, *, tp: TensorParallel, fp8: bool) -> float | None:
    """The `waiting_share` within which a schedule's weight gradients are postponed; None: all are, as it says.

    Limited where layers recompute: who recomputes wants memory rather than a shorter bubble.
    """
    return None if recompute == "none" else waiting_share(model, recompute, tp=tp, fp8=fp8)


def layer_costs(model: ModelConfig, seq_length: int) -> LayerCosts:
    """Forward FLOPs per token. An embedding is a lookup and counts as a thousandth of a layer."""
    attention = model.attention_flops_per_token(seq_length, causal=True) / model.num_hidden_layers
    layer = 2.0 * model.num_layer_matmul_params + attention / 3
    return LayerCosts(embedding=layer / 1000, layer=layer, head=2.0 * model.padded_vocab_size * model.hidden_size)
