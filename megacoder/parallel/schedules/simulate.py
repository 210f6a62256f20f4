"""When everything happens: a schedule plus the time of each stage gives the start and end of every action.

The lists fix the order, so no decision is left: an action starts when its rank is free and its tensor has arrived.
Sends cost the sender nothing and take `latency`; links are never congested.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from megacoder.core.errors import ConfigError
from megacoder.parallel.schedules.schedule import Action, Schedule, ScheduleError, StageTensor
from megacoder.parallel.schedules.validate import execution_order

__all__ = ["Costs", "Timeline", "makespan", "simulate"]


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Time of one microbatch in each stage, in any unit; B takes as long as I and W together."""

    forward: tuple[float, ...]
    """F, by stage"""
    input_grad: tuple[float, ...]
    """I, by stage"""
    weight_grad: tuple[float, ...]
    """W, by stage"""
    latency: float = 0.0
    """from the end of an action on one rank until its tensor can be used on another"""

    def __post_init__(self) -> None:
        if not len(self.forward) == len(self.input_grad) == len(self.weight_grad):
            raise ConfigError(
                f"costs of {len(self.forward)} forwards, {len(self.input_grad)} I and {len(self.weight_grad)} W: "
                "needs one of each per stage"
            )
        for stage, times in enumerate(zip(self.forward, self.input_grad, self.weight_grad, strict=True)):
            if not min(times) > 0:
                raise ConfigError(f"costs of stage {stage} are F, I, W = {times}: needs times above 0")
        if not self.latency >= 0:
            raise ConfigError(f"latency {self.latency}: needs 0 or more")

    @classmethod
    def uniform(
        cls,
        num_stages: int,
        *,
        forward: float = 1.0,
        input_grad: float = 1.0,
        weight_grad: float = 1.0,
        latency: float = 0.0,
    ) -> "Costs":
        """The same times for every stage."""
        return cls(
            forward=(forward,) * num_stages,
            input_grad=(input_grad,) * num_stages,
            weight_grad=(weight_grad,) * num_stages,
            latency=latency,
        )

    def of(self, action: Action, stage: int) -> float:
        """How long `action` takes in `stage`."""
        match action.op:
            case "F":
                return self.forward[stage]
            case "I":
                return self.input_grad[stage]
            case "W":
                return self.weight_grad[stage]
            case "B":
                return self.input_grad[stage] + self.weight_grad[stage]


@dataclass(frozen=True, kw_only=True)
class Timeline:
    """A schedule with the times of its actions, `start[rank][i]` to `end[rank][i]`; 0 is the first start."""

    schedule: Schedule
    start: tuple[tuple[float, ...], ...]
    end: tuple[tuple[float, ...], ...]

    @property
    def makespan(self) -> float:
        """When the last rank is done."""
        return max(ends[-1] for ends in self.end)

    def busy(self, rank: int) -> float:
        """Time in which `rank` computes."""
        return sum(end - start for start, end in zip(self.start[rank], self.end[rank], strict=True))

    def idle(self, rank: int) -> float:
        """Time in which `rank` does not compute, in a step that all ranks end together."""
        return self.makespan - self.busy(rank)

    def bubble(self, rank: int) -> float:
        """Idle time between the first and the last action of `rank`.

        What Qi et al. count (arXiv:2401.10241, section 5): it is all that is lost if ranks need not end together.
        """
        return self.end[rank][-1] - self.start[rank][0] - self.busy(rank)


def simulate(schedule: Schedule, costs: Costs) -> Timeline:
    """The timeline of `schedule`; ScheduleError if it deadlocks."""
    stage_map = schedule.stage_map
    if len(costs.forward) != stage_map.num_stages:
        raise ConfigError(f"costs of {len(costs.forward)} stages for a schedule of {stage_map.num_stages}")
    start: list[list[float]] = [[] for _ in range(schedule.num_ranks)]
    end: list[list[float]] = [[] for _ in range(schedule.num_ranks)]
    free = [0.0] * schedule.num_ranks
    arrival: dict[StageTensor, float] = {}
    for rank, action, consumed, produced in execution_order(schedule):
        began = free[rank] if consumed is None else max(free[rank], arrival.pop(consumed))
        free[rank] = began + costs.of(action, stage_map.stages[rank][action.chunk])
        start[rank].append(began)
        end[rank].append(free[rank])
        if produced is not None:
            crosses = stage_map.home[produced.stage][0] != rank
            arrival[produced] = free[rank] + (costs.latency if crosses else 0.0)
    return Timeline(schedule=schedule, start=_freeze(start), end=_freeze(end))


def makespan(schedule: Schedule, costs: Costs) -> float:
    """`simulate(schedule, costs).makespan` alone, three times as fast: for callers that compare many schedules.

    It makes no tensor and no timeline: the dependencies are those of `Schedule.consumes` and `produces`, in arithmetic.
    """
    stage_map, m = schedule.stage_map, schedule.num_microbatches
    last, home = stage_map.num_stages - 1, stage_map.home
    both = tuple(map(sum, zip(costs.input_grad, costs.weight_grad, strict=True)))
    arrived: dict[tuple[bool, int], float] = {}  # (is it an activation, stage * m + microbatch)
    waiting: dict[tuple[bool, int], int] = {}
    free, position = [0.0] * schedule.num_ranks, [0] * schedule.num_ranks
    runnable = list(range(schedule.num_ranks))
    while runnable:
        rank = runnable.pop()
        now, stages, actions = free[rank], stage_map.stages[rank], schedule.ranks[rank]
        for index in range(position[rank], len(actions)):
            op, microbatch, chunk = actions[index]
            stage = stages[chunk]
            if op == "W":
                now += costs.weight_grad[stage]
                continue
            is_forward = op == "F"
            if stage != (0 if is_forward else last):
                key = (is_forward, stage * m + microbatch)
                if key not in arrived:
                    waiting[key], position[rank] = rank, index
                    break
                now = max(now, arrived.pop(key))
            now += costs.forward[stage] if is_forward else both[stage] if op == "B" else costs.input_grad[stage]
            receiver = stage + 1 if is_forward else stage - 1
            if 0 <= receiver <= last:
                key = (is_forward, receiver * m + microbatch)
                arrived[key] = now + (costs.latency if home[receiver][0] != rank else 0.0)
                if key in waiting:
                    runnable.append(waiting.pop(key))
        else:
            position[rank] = len(actions)
        free[rank] = now
    if waiting:
        raise ScheduleError(f"{schedule.name}: deadlock; check_schedule says where")
    return max(free)


def _freeze(rows: Sequence[Sequence[float]]) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(row) for row in rows)
