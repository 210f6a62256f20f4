"""Which layers each stage gets. A model is a row of slots: embedding, layers, head; stages cut it into runs.

The embedding opens the first stage and the head closes the last; no stage is empty, but the first may hold the
embedding alone and the last the head alone. So S stages need at least S - 2 layers.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from megacoder.core.errors import ConfigError
from megacoder.parallel.schedules.schedule import StageMap

__all__ = ["LayerCosts", "Placement", "place_by_cost", "place_evenly", "place_explicitly"]


@dataclass(frozen=True, kw_only=True)
class LayerCosts:
    """Cost of each kind of slot, in any unit (measured time or FLOPs); with a large vocabulary the head costs most."""

    embedding: float
    """a lookup: usually close to 0"""
    layer: float
    """one transformer layer"""
    head: float
    """the final norm, the projection to the vocabulary and the loss"""

    def __post_init__(self) -> None:
        if not (self.embedding >= 0 and self.layer > 0 and self.head >= 0):
            raise ConfigError(f"{self}: the layer's cost must be above 0, the others at least 0")


@dataclass(frozen=True)
class Placement:
    """How many layers each stage holds, first stage first."""

    layers_per_stage: tuple[int, ...]

    @property
    def num_stages(self) -> int:
        return len(self.layers_per_stage)

    def layers(self, stage: int) -> range:
        """The layers of `stage`, by their index in the model."""
        first = sum(self.layers_per_stage[:stage])
        return range(first, first + self.layers_per_stage[stage])

    def has_embedding(self, stage: int) -> bool:
        return stage == 0

    def has_head(self, stage: int) -> bool:
        return stage == self.num_stages - 1

    def stage_costs(self, costs: LayerCosts) -> tuple[float, ...]:
        """Time of each stage."""
        return tuple(
            count * costs.layer + self.has_embedding(stage) * costs.embedding + self.has_head(stage) * costs.head
            for stage, count in enumerate(self.layers_per_stage)
        )


def place_evenly(num_layers: int, num_stages: int) -> Placement:
    """Equal numbers of layers; the remainder goes to the middle, since the ends have embedding and head.

    DeepSeek-Coder 33B in 16 stages: 62 layers as 3, fourteen times 4, 3, so that each stage has 4 of the 64 slots.
    """
    _check_fit(num_layers, num_stages)
    base, extra = divmod(num_layers, num_stages)
    # later stages first: in 1F1B-like schedules they hold fewer live activations; the head's stage last of all
    takers = [*reversed(range(1, num_stages - 1)), 0, num_stages - 1][:extra]
    return Placement(tuple(base + (stage in takers) for stage in range(num_stages)))


def place_explicitly(num_layers: int, layers_per_stage: Sequence[int], *, num_stages: int) -> Placement:
    """The numbers given, if they are a placement of `num_layers` in `num_stages`; else ConfigError with the nearest."""
    counts = list(layers_per_stage)
    where = f"parallel.layers_per_stage = {counts}"
    _check_fit(num_layers, num_stages)
    nearest = f"nearest that works: {list(place_evenly(num_layers, num_stages).layers_per_stage)}"
    if len(counts) != num_stages:
        raise ConfigError(f"{where}: {len(counts)} numbers for {num_stages} stages; {nearest}")
    if any(count < 0 for count in counts) or 0 in counts[1:-1]:
        raise ConfigError(f"{where}: only the first and the last stage can be without layers; {nearest}")
    if sum(counts) != num_layers:
        raise ConfigError(f"{where}: places {sum(counts)} layers of {num_layers}; {nearest}")
    return Placement(tuple(counts))


def place_by_cost(num_layers: int, stage_map: StageMap, *, costs: LayerCosts) -> Placement:
    """The placement that minimizes the slowest rank's time; other ranks, and each rank's stages, as even as possible.

    The slowest rank sets the pace of a pipeline: every other one waits for it once per microbatch. As all layers cost
    the same, it is optimal to add each where the resulting cost is lowest: O(num_layers * num_stages).
    """
    num_stages = stage_map.num_stages
    _check_fit(num_layers, num_stages)
    counts = [int(0 < stage < num_stages - 1) for stage in range(num_stages)]  # only the ends can be without layers
    fixed = Placement((0,) * num_stages).stage_costs(costs)

    def cost(stage: int) -> float:
        return fixed[stage] + counts[stage] * costs.layer

    def makes(stage: int) -> tuple[float, float, int]:
        """Costs of its rank, then of itself, with one more layer; then later stages, with fewer live activations."""
        rank, _ = stage_map.home[stage]
        return sum(map(cost, stage_map.stages[rank])), cost(stage), -stage

    for _ in range(num_layers - sum(counts)):
        counts[min(range(num_stages), key=makes)] += 1
    return Placement(tuple(counts))


def _check_fit(num_layers: int, num_stages: int) -> None:
    if num_layers < 1 or num_stages < 1:
        raise ConfigError(f"{num_layers} layers in {num_stages} stages: needs at least 1 of each")
    if num_stages > num_layers + 2:
        raise ConfigError(
            f"{num_stages} stages for {num_layers} layers: embedding, layers and head fill at most {num_layers + 2}; "
            f"nearest that works: {num_layers + 2} stages, one layer each"
        )
