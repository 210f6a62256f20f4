"""Pipeline schedules of any length, planned in milliseconds: simulated at a few microbatches, then extrapolated.

After its warm-up a schedule repeats itself every p microbatches (a round), both in time and in what it holds. So the
lists that the runner would execute are simulated twice: at few microbatches, with the same remainder after the last
whole round, and with one more round. The difference is what every further round takes. By then every rank has reached
its peak.

What a rank holds is read off the very program that the run would execute, transfers included.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

from megacoder.model.config import ModelConfig
from megacoder.parallel.dims import ParallelDims
from megacoder.parallel.pipeline import confirmations
from megacoder.parallel.schedules.generators import build_schedule
from megacoder.parallel.schedules.placement import Placement
from megacoder.parallel.schedules.program import Exchange, Program, Send
from megacoder.parallel.schedules.schedule import Op, Schedule, StageTensor
from megacoder.parallel.schedules.simulate import Costs, makespan
from megacoder.train.layout import Layout, lay_out

__all__ = ["Held", "Pipeline", "pipeline"]

_ROUNDS = 3
"""of p microbatches each, after which a schedule is in its steady state"""


class Held(NamedTuple):
    """What a rank holds when an action begins, in layers of one microbatch."""

    op: Op
    stage: int
    whole: int
    """layers between F and the end of B or I"""
    waiting: int
    """layers between I and the end of W"""
    heads: int
    """microbatches whose loss is computed and whose backward is not"""
    boundaries: int
    """tensors that cross stages: arrived or about to, made, or sent and not yet known to be read. The input of B and I
    is one of them; that of F is not, since it is the first thing that F keeps"""


@dataclass(frozen=True)
class Pipeline:
    """A schedule for some microbatches with the layers of its stages."""

    layout: Layout
    """of the pipeline alone"""
    longer: "Pipeline | None" = None
    """the same with one more round, if rounds are left out"""
    rounds_left_out: int = 0

    @property
    def schedule(self) -> Schedule:
        return self.layout.schedule

    @property
    def placement(self) -> Placement:
        return self.layout.placement

    @cached_property
    def held(self) -> tuple[tuple[Held, ...], ...]:
        """By rank: the moments at which it may hold most."""
        program, confirmed_by = self.layout.program, confirmations(self.schedule)
        return tuple(
            _most_held(_instants(program, self.placement, rank, confirmed_by[rank]))
            for rank in range(self.schedule.num_ranks)
        )

    def seconds(self, costs: Costs) -> float:
        """Of a step's forwards and backwards, from the first rank's start to the last one's end."""
        if self.schedule.num_ranks == 1:  # nobody to wait for
            microbatches = self.schedule.num_microbatches + self.rounds_left_out
            return microbatches * sum(map(sum, (costs.forward, costs.input_grad, costs.weight_grad)))
        short = makespan(self.schedule, costs)
        if self.longer is None:
            return short
        return short + self.rounds_left_out * (makespan(self.longer.schedule, costs) - short)


@lru_cache(maxsize=4096)
def pipeline(
    name: str,
    *,
    ranks: int,
    chunks: int,
    microbatches: int,
    model: ModelConfig,
    seq_length: int,
    limited_share: float | None = None,
    layers_per_stage: tuple[int, ...] | None = None,
) -> Pipeline:
    """The pipeline of `microbatches`; ConfigError if its stages cannot hold the layers.

    `limited_share` is that of `megacoder.train.layout`.
    """
    left_out = max(0, microbatches // ranks - (_ROUNDS if ranks > 1 else 1))
    if name == "gpipe":  # which holds more with every microbatch
        left_out = 0
    few = microbatches - left_out * ranks
    short = _build(name, ranks, chunks, few, model, seq_length, limited_share, layers_per_stage)
    if not left_out:
        return short
    longer = _build(name, ranks, chunks, few + ranks, model, seq_length, limited_share, layers_per_stage)
    return Pipeline(short.layout, longer, left_out)


@lru_cache(maxsize=4096)
def _build(
    name: str,
    ranks: int,
    chunks: int,
    microbatches: int,
    model: ModelConfig,
    seq_length: int,
    limited_share: float | None,
    layers_per_stage: tuple[int, ...] | None,
) -> Pipeline:
    schedule = build_schedule(name, num_ranks=ranks, num_microbatches=microbatches, num_chunks=chunks)
    layout = lay_out(
        schedule, ParallelDims(pp=ranks), model,
        seq_length=seq_length, layers_per_stage=layers_per_stage, limited_share=limited_share,
    )  # fmt: skip
    return Pipeline(layout)


def _most_held(moments: Iterable[Held]) -> tuple[Held, ...]:
    """Of moments that differ only in `whole`, the one with the most."""
    most: dict[tuple[object, ...], Held] = {}
    for held in moments:
        alike = (held.op, held.stage, held.waiting, held.heads, held.boundaries)
        if alike not in most or most[alike].whole < held.whole:
            most[alike] = held
    return tuple(most.values())


def _instants(
    program: Program, placement: Placement, rank: int, confirmed_by: Mapping[StageTensor, Iterable[StageTensor]]
) -> Iterator[Held]:
    """Where each action begins, as `megacoder.parallel.pipeline` executes them."""
    schedule = program.schedule
    whole = waiting = heads = 0
    crossing, leaving = set[StageTensor](), set[StageTensor]()
    for instruction in program.ranks[rank]:
        if isinstance(instruction, Exchange):
            for transfer in instruction.transfers:
                if isinstance(transfer, Send):
                    crossing.remove(transfer.tensor)
                    leaving.add(transfer.tensor)
                else:
                    crossing.add(transfer.tensor)
            continue
        op, _, chunk = instruction
        stage = schedule.stage_map.stages[rank][chunk]
        layers, has_head = len(placement.layers(stage)), int(placement.has_head(stage))
        consumed, produced = schedule.consumes(rank, instruction), schedule.produces(rank, instruction)
        if consumed is not None:
            crossing.remove(consumed)
            leaving.difference_update(confirmed_by.get(consumed, ()))
        given = int(consumed is not None and op != "F")
        yield Held(op, stage, whole, waiting, heads, len(crossing) + len(leaving) + given)
        if op == "F":
            whole, heads = whole + layers, heads + has_head
        elif op == "W":
            waiting -= layers
        else:
            whole, heads, waiting = whole - layers, heads - has_head, waiting + (layers if op == "I" else 0)
        if produced is not None:
            crossing.add(produced)
