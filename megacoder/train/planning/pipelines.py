"""Pipeline schedules of any length in milliseconds: simulated at a few microbatches, carried on by their period.

After its warm-up a schedule repeats itself every p microbatches, in time as in what it holds. So the lists that the
runner would execute are simulated at few microbatches, with the same number left over after the last whole round, and
one more round, whose difference is what every further round takes. What a rank holds at its most is reached by then.
"""

from dataclasses import dataclass
from functools import lru_cache

from megacoder.model.config import ModelConfig
from megacoder.parallel.schedules import Costs, Placement, Schedule, StageMap, build_schedule, makespan, place_by_cost
from megacoder.train.layout import layer_costs

__all__ = ["Held", "Pipeline", "pipeline"]

_ROUNDS = 3
"""of p microbatches each, after which a schedule is in its stride"""


@dataclass(frozen=True)
class Held:
    """What a rank holds at one moment, in layers of one microbatch."""

    whole: int
    """between F and the end of B or I"""
    waiting: int
    """between I and the end of W"""
    heads: int
    """microbatches whose loss is computed and whose backward is not"""


@dataclass(frozen=True)
class Pipeline:
    """A schedule for some microbatches with the layers of its stages."""

    schedule: Schedule
    placement: Placement
    held: tuple[tuple[Held, ...], ...]
    """by rank: the moments at which it may hold most"""
    longer: "Pipeline | None" = None
    """the same with a round more, where rounds are left out"""
    rounds_left_out: int = 0

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
def pipeline(name: str, *, ranks: int, chunks: int, microbatches: int, model: ModelConfig, seq_length: int) -> Pipeline:
    """The pipeline of `microbatches`; ConfigError where there are more stages than layers for them."""
    left_out = max(0, microbatches // ranks - (_ROUNDS if ranks > 1 else 1))
    few = microbatches - left_out * ranks
    short = _build(name, ranks, chunks, few, model, seq_length)
    if not left_out:
        return short
    longer = _build(name, ranks, chunks, few + ranks, model, seq_length)
    return Pipeline(short.schedule, short.placement, short.held, longer, left_out)


@lru_cache(maxsize=4096)
def _build(name: str, ranks: int, chunks: int, microbatches: int, model: ModelConfig, seq_length: int) -> Pipeline:
    schedule = build_schedule(name, num_ranks=ranks, num_microbatches=microbatches, num_chunks=chunks)
    placement = _place(schedule.stage_map, model, seq_length)
    held = tuple(_most_held(schedule, placement, rank) for rank in range(ranks))
    return Pipeline(schedule, placement, held)


@lru_cache(maxsize=4096)
def _place(stage_map: StageMap, model: ModelConfig, seq_length: int) -> Placement:
    return place_by_cost(model.num_hidden_layers, stage_map, costs=layer_costs(model, seq_length))


def _most_held(schedule: Schedule, placement: Placement, rank: int) -> tuple[Held, ...]:
    stages = schedule.stage_map.stages[rank]
    layers = [len(placement.layers(stage)) for stage in stages]
    heads = [int(placement.has_head(stage)) for stage in stages]
    whole = waiting = head = 0
    most: dict[tuple[int, int], int] = {}  # (waiting, heads) -> whole
    for op, _, chunk in schedule.ranks[rank]:
        if op == "W":
            waiting -= layers[chunk]
            continue
        if op == "F":
            whole, head = whole + layers[chunk], head + heads[chunk]
        else:
            whole, head = whole - layers[chunk], head - heads[chunk]
            waiting += layers[chunk] if op == "I" else 0
        most[waiting, head] = max(most.get((waiting, head), 0), whole)
    return tuple(Held(whole, waiting, heads) for (waiting, heads), whole in most.items())
