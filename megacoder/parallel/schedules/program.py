"""What each rank executes: its actions with the sends and receives between them, in an order that cannot deadlock.

The order comes from one global sequence. The simulated timeline puts all actions of all ranks in one sequence by their
start; every tensor that crosses ranks is placed where its producer ends. Each rank's program is the part of that
sequence that involves it, so that any two ranks see their common transfers in the same order, and the first transfer
not yet done is always the next one of both its ranks. Hence the program runs to its end even if every send blocks
until its receive is posted, which is what NCCL does on one communicator, and all the more if receives are posted
early, sends are buffered, or an `Exchange` is run as one batch (each only lets a transfer begin sooner). Wrong costs
cost time, never a deadlock; but all ranks must use the same costs.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from typing import NamedTuple

from megacoder.parallel.schedules.schedule import Action, Schedule, ScheduleError, StageTensor, deadlock
from megacoder.parallel.schedules.simulate import Costs, Timeline, simulate

__all__ = ["Exchange", "Instruction", "Program", "Recv", "Send", "build_program", "check_program"]


class Send(NamedTuple):
    """Sends `tensor`, made here, to rank `peer`."""

    tensor: StageTensor
    peer: int


class Recv(NamedTuple):
    """Receives `tensor`, which a later action consumes, from rank `peer`."""

    tensor: StageTensor
    peer: int


class Exchange(NamedTuple):
    """Transfers with no action between them: one batch, or one after the other in this order."""

    transfers: tuple[Send | Recv, ...]


Instruction = Action | Exchange


@dataclass(frozen=True, kw_only=True)
class Program:
    """What a runner executes, literally.

    A runner keys what it holds by `StageTensor`: an action's input is `schedule.consumes(rank, action)` and its output
    `schedule.produces(rank, action)`. An output whose next stage lives on the same rank is never sent.
    """

    schedule: Schedule
    """whose actions these are"""
    ranks: tuple[tuple[Instruction, ...], ...]
    """`ranks[rank]`: in the order of execution"""


def build_program(schedule: Schedule, costs: Costs | None = None) -> Program:
    """Places the transfers of a valid schedule by the timeline that `costs` (all equal unless given) predict."""
    timeline = simulate(schedule, costs or Costs.uniform(schedule.stage_map.num_stages))
    ranks: list[list[Action | Send | Recv]] = [[] for _ in range(schedule.num_ranks)]
    for rank, item in _global_sequence(timeline):
        if isinstance(item, Action):
            ranks[rank].append(item)
        else:
            peer = schedule.stage_map.home[item.stage][0]
            ranks[rank].append(Send(item, peer))
            ranks[peer].append(Recv(item, rank))
    return Program(schedule=schedule, ranks=tuple(tuple(_batch(instructions)) for instructions in ranks))


def check_program(program: Program) -> None:
    """Raises ScheduleError, one line, unless the program runs to its end with sends that block until received.

    Proved besides: the actions are those of the schedule, in order; a rank sends only what it has made and computes
    only on what it has; every send meets a receive of the same tensor.
    """
    name = program.schedule.name
    for rank, (instructions, actions) in enumerate(zip(program.ranks, program.schedule.ranks, strict=True)):
        if tuple(item for item in instructions if isinstance(item, Action)) != actions:
            raise ScheduleError(
                f"{name}: the program of rank {rank} does not hold the actions of its schedule in order"
            )
    heads = [_Head(program.schedule, rank, instructions) for rank, instructions in enumerate(program.ranks)]
    runnable = deque(heads)
    while runnable:
        head = runnable.popleft()
        transfer = head.run_actions()
        if transfer is None:
            continue
        peer = heads[transfer.peer]
        if peer.transfer is None or peer.transfer.peer != head.rank:
            continue  # the peer comes back here when it arrives
        if peer.transfer.tensor != transfer.tensor or type(peer.transfer) is type(transfer):
            raise ScheduleError(f"{name}: rank {head.rank} at {transfer} meets rank {peer.rank} at {peer.transfer}")
        head.finish_transfer()
        peer.finish_transfer()
        runnable += [head, peer]
    blocked = [f"rank {head.rank} at {head.transfer}" for head in heads if head.transfer is not None]
    if blocked:
        raise deadlock(f"{name}: deadlock of transfers", blocked)


def _global_sequence(timeline: Timeline) -> list[tuple[int, Action | StageTensor]]:
    """(rank, item): an action is at its start, a tensor at its producer's end, before all actions of that time."""
    schedule = timeline.schedule
    events: list[tuple[float, bool, int, Action | StageTensor]] = []
    for rank, actions in enumerate(schedule.ranks):
        for action, start, end in zip(actions, timeline.start[rank], timeline.end[rank], strict=True):
            events.append((start, True, rank, action))
            produced = schedule.produces(rank, action)
            if produced is not None and schedule.stage_map.home[produced.stage][0] != rank:
                events.append((end, False, rank, produced))
    events.sort(key=itemgetter(0, 1))  # stable: a rank's own events keep their order
    return [(rank, item) for _, _, rank, item in events]


def _batch(instructions: Iterable[Action | Send | Recv]) -> Iterable[Instruction]:
    for is_action, run in groupby(instructions, key=lambda item: isinstance(item, Action)):
        if is_action:
            yield from run  # type: ignore[misc]
        else:
            yield Exchange(tuple(run))  # type: ignore[arg-type]


class _Head:
    """One rank in the proof: it runs actions until it reaches a transfer."""

    def __init__(self, schedule: Schedule, rank: int, instructions: Iterable[Instruction]) -> None:
        self.schedule, self.rank = schedule, rank
        self.rest = iter([item for x in instructions for item in (x.transfers if isinstance(x, Exchange) else (x,))])
        self.held: set[StageTensor] = set()
        self.transfer: Send | Recv | None = None

    def run_actions(self) -> Send | Recv | None:
        """Runs up to the next transfer, and returns it; None at the end."""
        if self.transfer is None:
            for item in self.rest:
                if not isinstance(item, Action):
                    self.transfer = item
                    break
                self._run(item)
        if isinstance(self.transfer, Send) and self.transfer.tensor not in self.held:
            raise ScheduleError(
                f"{self.schedule.name}: rank {self.rank} sends {self.transfer.tensor} before it made it"
            )
        return self.transfer

    def finish_transfer(self) -> None:
        assert self.transfer is not None
        if isinstance(self.transfer, Recv):
            self.held.add(self.transfer.tensor)
        else:
            self.held.remove(self.transfer.tensor)
        self.transfer = None

    def _run(self, action: Action) -> None:
        consumed = self.schedule.consumes(self.rank, action)
        if consumed is not None:
            if consumed not in self.held:
                raise ScheduleError(
                    f"{self.schedule.name}: rank {self.rank} runs {action} before it received its {consumed.kind}"
                )
            self.held.remove(consumed)
        produced = self.schedule.produces(self.rank, action)
        if produced is not None:
            self.held.add(produced)
