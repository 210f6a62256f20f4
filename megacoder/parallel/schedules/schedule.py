"""A pipeline schedule is data: for every rank, the ordered list of what it computes.

Legend: p pipeline ranks, m microbatches, v chunks per rank. A *stage* is one of the p*v consecutive slices of the
model; a *chunk* is a stage as seen from the rank that holds it. Letters follow Qi et al. (arXiv:2401.10241), with
I for what that paper calls B, because here B is the usual whole backward:

    F  forward        I  backward for the input (dgrad)
    B  I and W fused  W  backward for the weights (wgrad)

The dependencies of the whole library are the two methods `consumes` and `produces`: activations flow one stage up,
gradients one stage down. The validator, the simulator, the communication plan and the picture are all derived from
them, so a schedule is right or wrong in one place; only the planner's quick `makespan` has them a second time, and
tests hold it against the simulator. There is no time in a schedule; time comes from costs.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, NamedTuple

from megacoder.core.errors import MegacoderError

__all__ = ["Action", "Op", "Schedule", "ScheduleError", "StageMap", "StageTensor", "deadlock", "forwards_only"]

Op = Literal["F", "B", "I", "W"]


class ScheduleError(MegacoderError):
    """A list of actions that cannot train: wrong order, something missing or duplicate, or a deadlock."""


def deadlock(what: str, blocked: list[str]) -> ScheduleError:
    """The error for ranks that wait for each other; names the first four of them."""
    more = f"; and {len(blocked) - 4} more" if len(blocked) > 4 else ""
    return ScheduleError(f"{what}: {'; '.join(blocked[:4])}{more}")


class Action(NamedTuple):
    """One step of computation on one rank; prints as `F3.1`: forward of microbatch 3 through chunk 1."""

    op: Op
    microbatch: int
    chunk: int = 0

    def __str__(self) -> str:
        return f"{self.op}{self.microbatch}.{self.chunk}"


class StageTensor(NamedTuple):
    """What travels between neighbouring stages: the activation that enters `stage`, or the gradient that does."""

    kind: Literal["activation", "gradient"]
    microbatch: int
    stage: int


@dataclass(frozen=True)
class StageMap:
    """Which rank holds which stage; every rank holds the same number."""

    stages: tuple[tuple[int, ...], ...]
    """`stages[rank][chunk]`: a permutation of 0 .. p*v - 1"""

    def __post_init__(self) -> None:
        held = sorted(stage for row in self.stages for stage in row)
        if not held or held != list(range(len(held))) or len({len(row) for row in self.stages}) != 1:
            raise ScheduleError(f"stages {self.stages}: ranks must hold equally many, and each stage exactly once")

    @classmethod
    def loop(cls, num_ranks: int, num_chunks: int = 1) -> "StageMap":
        """Round-robin: chunk c of rank r is stage c*p + r (Narayanan et al., arXiv:2104.04473)."""
        return cls(tuple(tuple(chunk * num_ranks + rank for chunk in range(num_chunks)) for rank in range(num_ranks)))

    @classmethod
    def vee(cls, num_ranks: int) -> "StageMap":
        """Down and back up: rank r holds stages r and 2p-1-r, so rank 0 has both the embedding and the loss."""
        return cls(tuple((rank, 2 * num_ranks - 1 - rank) for rank in range(num_ranks)))

    @property
    def num_ranks(self) -> int:
        return len(self.stages)

    @property
    def num_chunks(self) -> int:
        return len(self.stages[0])

    @cached_property
    def num_stages(self) -> int:
        return self.num_ranks * self.num_chunks

    @cached_property
    def home(self) -> tuple[tuple[int, int], ...]:
        """(rank, chunk) of every stage."""
        places = {stage: (rank, chunk) for rank, row in enumerate(self.stages) for chunk, stage in enumerate(row)}
        return tuple(places[stage] for stage in range(self.num_stages))


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """What every pipeline rank computes in one training step, in order."""

    name: str
    """as `build_schedule` knows it"""
    num_microbatches: int
    """microbatches in a step"""
    stage_map: StageMap
    """where the stages live"""
    ranks: tuple[tuple[Action, ...], ...]
    """`ranks[rank]`: that rank's actions in the order of execution"""

    @property
    def num_ranks(self) -> int:
        return self.stage_map.num_ranks

    @property
    def num_chunks(self) -> int:
        return self.stage_map.num_chunks

    def consumes(self, rank: int, action: Action) -> StageTensor | None:
        """What a neighbouring stage must have made first; None at the ends of the model and for W.

        The forward that a B or I reads on its own stage is not listed: both run on this rank, so that list order
        alone decides, which `check_schedule` proves.
        """
        op, microbatch, chunk = action
        stage = self.stage_map.stages[rank][chunk]
        if op == "F":
            return StageTensor("activation", microbatch, stage) if stage > 0 else None
        if op == "W" or stage == self.stage_map.num_stages - 1:
            return None
        return StageTensor("gradient", microbatch, stage)

    def produces(self, rank: int, action: Action) -> StageTensor | None:
        """What a neighbouring stage waits for; None at the ends of the model and for W."""
        op, microbatch, chunk = action
        stage = self.stage_map.stages[rank][chunk]
        if op == "F":
            return StageTensor("activation", microbatch, stage + 1) if stage < self.stage_map.num_stages - 1 else None
        if op == "W" or stage == 0:
            return None
        return StageTensor("gradient", microbatch, stage - 1)


def forwards_only(schedule: Schedule) -> Schedule:
    """The forwards of `schedule` in their order, for evaluation: it trains nothing and holds nothing."""
    ranks = tuple(tuple(action for action in actions if action.op == "F") for actions in schedule.ranks)
    return replace(schedule, ranks=ranks)
