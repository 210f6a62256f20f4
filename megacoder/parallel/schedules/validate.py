"""Proves that a schedule trains: right order, nothing missing or duplicate, no deadlock. Counts the memory it holds.

The proof has two parts. On one rank the list itself is the order, so a walk with one small state per (microbatch,
chunk) checks it. Across ranks the lists are run without time: a rank runs until its next action needs a tensor that no
neighbor has made yet. The result does not depend on which rank goes first: if this run ends, every run with buffered
sends ends; if it gets stuck, the actions at which the ranks wait are the deadlock. `check_program` proves it for sends
that are not buffered.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from megacoder.parallel.schedules.schedule import Action, Schedule, ScheduleError, StageTensor, deadlock

__all__ = ["Live", "Step", "check_schedule", "execution_order", "live_activations", "peak_live"]


class Step(NamedTuple):
    """One action of an execution, with the tensors that tie it to other stages."""

    rank: int
    action: Action
    consumed: StageTensor | None
    produced: StageTensor | None


class Live(NamedTuple):
    """Activations that a rank holds while an action runs, in chunks of one microbatch."""

    whole: int
    """between F and the end of B or I: everything that the backward reads"""
    waiting: int
    """between I and the end of W: the inputs of the linears and their output gradients"""


_NEXT_STATE = {("", "F"): "F", ("F", "B"): "done", ("F", "I"): "I", ("I", "W"): "done"}


def check_schedule(schedule: Schedule) -> None:
    """Raises ScheduleError, one line that names rank and action, unless every rank can run its list to the end.

    Proved: every microbatch passes every stage forward once and backward once (B, or I and later W), in this order;
    no rank waits forever.
    """
    if len(schedule.ranks) != schedule.num_ranks:
        raise ScheduleError(
            f"{schedule.name}: {len(schedule.ranks)} lists of actions for {schedule.num_ranks} pipeline ranks"
        )
    for rank, actions in enumerate(schedule.ranks):
        _check_rank(schedule, rank, actions)
    for _ in execution_order(schedule):
        pass


def execution_order(schedule: Schedule) -> Iterator[Step]:
    """Every action of every rank, each after what it consumes; ScheduleError where the ranks block each other."""
    made: set[StageTensor] = set()
    waiting: dict[StageTensor, int] = {}
    position = [0] * schedule.num_ranks
    runnable = deque(range(schedule.num_ranks))
    while runnable:
        rank = runnable.popleft()
        actions = schedule.ranks[rank]
        while position[rank] < len(actions):
            action = actions[position[rank]]
            consumed = schedule.consumes(rank, action)
            if consumed is not None and consumed not in made:
                waiting[consumed] = rank
                break
            produced = schedule.produces(rank, action)
            yield Step(rank, action, consumed, produced)
            position[rank] += 1
            if produced is not None:
                made.add(produced)
                if produced in waiting:
                    runnable.append(waiting.pop(produced))
    if waiting:
        frontier = [
            f"rank {rank} at {schedule.ranks[rank][position[rank]]} waits for the {tensor.kind} of microbatch "
            f"{tensor.microbatch} into stage {tensor.stage}"
            for tensor, rank in sorted(waiting.items(), key=lambda item: item[1])
        ]
        raise deadlock(f"{schedule.name}: deadlock", frontier)


def live_activations(actions: Sequence[Action]) -> Iterator[Live]:
    """What one rank holds while each of its actions runs."""
    whole = waiting = 0
    for action in actions:
        whole += action.op == "F"
        yield Live(whole, waiting)
        whole -= action.op in ("B", "I")
        waiting += (action.op == "I") - (action.op == "W")


def peak_live(actions: Sequence[Action], *, waiting_share: float = 1.0) -> float:
    """The most that one rank holds at a time, in chunks of one microbatch.

    `waiting_share` is the part of a chunk's activations that W still needs once I is done (1 is the upper bound;
    arXiv:2401.10241 calls the two parts M_B and M_W).
    """
    return max((live.whole + waiting_share * live.waiting for live in live_activations(actions)), default=0)


def _check_rank(schedule: Schedule, rank: int, actions: Sequence[Action]) -> None:
    size = schedule.num_microbatches * schedule.num_chunks
    state: dict[tuple[int, int], str] = {}
    for index, action in enumerate(actions):
        op, microbatch, chunk = action
        where = f"{schedule.name}: rank {rank}, action {index}, {action}"
        if not (0 <= microbatch < schedule.num_microbatches and 0 <= chunk < schedule.num_chunks):
            raise ScheduleError(
                f"{where}: outside {schedule.num_microbatches} microbatches and {schedule.num_chunks} chunks"
            )
        before = state.get((microbatch, chunk), "")
        after = _NEXT_STATE.get((before, op))
        if after is None:
            raise ScheduleError(f"{where}: {_why_not(op, before)}")
        state[microbatch, chunk] = after
    if len(state) < size or any(end != "done" for end in state.values()):
        missing = next(
            (microbatch, chunk)
            for chunk in range(schedule.num_chunks)
            for microbatch in range(schedule.num_microbatches)
            if state.get((microbatch, chunk)) != "done"
        )
        lacks = {"": "F", "F": "B, or I and W", "I": "W"}[state.get(missing, "")]
        raise ScheduleError(
            f"{schedule.name}: rank {rank} never runs {lacks} of microbatch {missing[0]}, chunk {missing[1]}"
        )


def _why_not(op: str, before: str) -> str:
    if op == "F":
        return "this forward has been run already"
    if before == "":
        return "comes before its forward"
    if op == "W" and before == "F":
        return "comes before its I"
    return "this backward has been run already"
