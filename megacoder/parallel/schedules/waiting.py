"""Weight gradients that wait only where there is room: a zero-bubble schedule within the memory of its forwards.

Between I and W a microbatch keeps what the weight gradients read, the inputs and the output gradients of all linears.
Where layers recompute, that is a multiple of what a forward keeps, and would bring back what recomputation has freed.
So the limit is what the rank that holds most would hold if nothing waited. A weight gradient that does not fit is
computed earlier: those that have waited longest make room, and where that is not enough, I and W become one B, in which
every layer's inputs are freed at once. A delayed W fills a bubble; an early one costs at most that bubble, once per
step, whereas recomputing its inputs a second time would cost every microbatch.

No tensor crosses ranks from or to a W, so the result is as valid as the schedule. Weight gradients are added up in the
same order, so that not a bit changes.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import replace

from megacoder.parallel.schedules.schedule import Action, Schedule

__all__ = ["limit_waiting"]


def limit_waiting(schedule: Schedule, *, layers: Sequence[int], waiting_share: float) -> Schedule:
    """`schedule` with those weight gradients computed early that would raise the peak.

    `layers` are those of each stage; `waiting_share` is what W still needs once I is done, as a share of what a
    forward keeps. The oldest W must come first on every rank, as in all of `generators`.
    """
    sizes = [[layers[stage] for stage in stages] for stages in schedule.stage_map.stages]
    limit = max(map(_most_whole, schedule.ranks, sizes))
    ranks = [_limited(actions, held, waiting_share, limit) for actions, held in zip(schedule.ranks, sizes, strict=True)]
    return replace(schedule, ranks=tuple(ranks))


def _most_whole(actions: Sequence[Action], sizes: Sequence[int]) -> int:
    """The most layers, each of one microbatch, that a rank holds between F and the end of B or I."""
    whole = most = 0
    for op, _, chunk in actions:
        whole += {"F": sizes[chunk], "W": 0}.get(op, -sizes[chunk])
        most = max(most, whole)
    return most


def _limited(actions: Sequence[Action], sizes: Sequence[int], waiting_share: float, limit: int) -> tuple[Action, ...]:
    """One rank's list; `sizes` are the layers of its chunks."""
    whole = waiting = 0
    queue, result = deque[Action](), list[Action]()
    for action in actions:
        op, size = action.op, sizes[action.chunk]
        if op == "W":
            if queue and queue[0] == action:  # else it came early
                result.append(queue.popleft())
                waiting -= size
            continue
        whole += size if op == "F" else -size
        postponed = size if op == "I" else 0
        while queue and whole + waiting_share * (waiting + postponed) > limit:
            result.append(queue.popleft())
            waiting -= sizes[result[-1].chunk]
        if op == "I" and whole + waiting_share * (waiting + postponed) > limit:
            result.append(action._replace(op="B"))
            continue
        result.append(action)
        if op == "I":
            queue.append(action._replace(op="W"))
            waiting += postponed
    return tuple(result)
