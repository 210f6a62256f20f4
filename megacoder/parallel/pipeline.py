"""Runs a pipeline program on one rank: the list decides everything, this file only executes it.

The program (see `megacoder.parallel.schedules.program`) is the rank's actions with the sends and receives between
them, in an order proved free of deadlock. The runner starts each transfer where the list has it, waits for a receive
only when the action that reads it is next, and never blocks on a send before the step ends. It knows nothing about the
model: a stage is any object with the four methods of `PipelineStage`.

Memory is freed as early as possible. What a forward kept goes to its backward and nowhere else. A sent tensor is freed
when something arrives that its receiver made after reading it: that send is complete, so waiting for it takes no time,
both on NCCL and on gloo (which cannot be asked whether a send is complete).
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist

from megacoder.parallel.collectives import Pending, group_rank, group_size, journal_of, start_receive, start_send
from megacoder.parallel.journal import Journal
from megacoder.parallel.schedules.program import Exchange, Program, Recv, Send
from megacoder.parallel.schedules.schedule import Action, Schedule, ScheduleError, StageTensor

__all__ = ["ACTIVITIES", "PipelineResult", "PipelineRunner", "PipelineStage", "confirmations"]

ACTIVITIES = {"F": "forward", "B": "backward", "I": "backward of the input", "W": "backward of the weights"}
"""What the journal calls a schedule's operations."""


class PipelineStage(Protocol):
    """What the runner runs; its tensors are those that cross stages, None at the ends of the model."""

    def new_boundary(self, microbatch: Any) -> torch.Tensor:
        """Uninitialized memory for what enters the stage in `microbatch`, or for the gradient of what leaves it."""

    def forward(self, x: torch.Tensor | None, microbatch: Any) -> tuple[Any, Any]:
        """F: (output, what the backward needs); in the last stage the output is the microbatch's result."""

    def backward(self, grad: torch.Tensor | None, saved: Any) -> torch.Tensor | None:
        """B: gradient of the output -> gradient of the input; weight gradients are accumulated."""

    def backward_input(self, grad: torch.Tensor | None, saved: Any) -> tuple[torch.Tensor | None, Callable[[], None]]:
        """I: as B, but weight gradients are left to the returned function, which is W."""


@dataclass(frozen=True, kw_only=True)
class PipelineResult:
    """What a rank has at the end of a step."""

    outputs: tuple[Any, ...]
    """the last stage's result for each microbatch; empty on ranks that do not hold it"""
    peak_live: int
    """most activations held at a time, in chunks of one microbatch, as `schedules.peak_live` predicts"""


class PipelineRunner:
    """Runs one rank's part of `program`, step after step; every rank of `group` has a runner of the same program."""

    def __init__(
        self,
        program: Program,
        stages: Sequence[PipelineStage],
        group: dist.ProcessGroup | None = None,
        *,
        journal: Journal | None = None,
    ) -> None:
        """`stages` are the rank's chunks in order; ScheduleError if their number or that of ranks does not match.

        `journal` is the rank's, which a process alone must pass on; by default the group's.
        """
        self.schedule, self.stages, self.group = program.schedule, stages, group
        self._expect(self.schedule.num_ranks, group_size(group), "pipeline ranks")
        self._expect(self.schedule.num_chunks, len(stages), "chunks per rank")
        self.rank = group_rank(group)
        self.journal = journal or journal_of(group)
        self.instructions = program.ranks[self.rank]
        self.confirmed_by = confirmations(self.schedule)[self.rank]

    def run(self, microbatches: Sequence[Any]) -> PipelineResult:
        """One step; all ranks call it, with microbatches of the same shapes."""
        self._expect(self.schedule.num_microbatches, len(microbatches), "microbatches")
        step = _Step(self, microbatches)
        for instruction in self.instructions:
            if isinstance(instruction, Exchange):
                for transfer in instruction.transfers:
                    step.start(transfer)
            else:
                step.compute(instruction)
        return step.finish()

    def _expect(self, needed: int, given: int, what: str) -> None:
        if needed != given:
            raise ScheduleError(f"{self.schedule.name}: the program is for {needed} {what}; there are {given}")


class _Step:
    """What a rank holds during a step, keyed by the names that the schedule gives to tensors."""

    def __init__(self, runner: PipelineRunner, microbatches: Sequence[Any]) -> None:
        self.runner, self.schedule, self.microbatches = runner, runner.schedule, microbatches
        self.made: dict[StageTensor, torch.Tensor] = {}
        self.arriving: dict[StageTensor, Pending] = {}
        self.leaving: dict[StageTensor, Pending] = {}
        self.saved: dict[tuple[int, int], Any] = {}
        self.weight_gradients: dict[tuple[int, int], Callable[[], None]] = {}
        self.outputs: dict[int, Any] = {}
        self.peak_live = 0

    def start(self, transfer: Send | Recv) -> None:
        tensor, peer = transfer
        group = self.runner.group
        assert group is not None
        if isinstance(transfer, Send):
            self.leaving[tensor] = start_send(self.made.pop(tensor), peer, group)
        else:
            chunk = self.schedule.stage_map.home[tensor.stage][1]
            buffer = self.runner.stages[chunk].new_boundary(self.microbatches[tensor.microbatch])
            self.arriving[tensor] = start_receive(buffer, peer, group)

    def compute(self, action: Action) -> None:
        op, microbatch, chunk = action
        stage, key = self.runner.stages[chunk], (microbatch, chunk)
        self.runner.journal.at(ACTIVITIES[op], microbatch)
        if op == "W":
            self.weight_gradients.pop(key)()
            return
        entering = self._take(self.schedule.consumes(self.runner.rank, action))
        if op == "F":
            result, self.saved[key] = stage.forward(entering, self.microbatches[microbatch])
            # only forwards add to what is held, so the peak is after one of them
            self.peak_live = max(self.peak_live, len(self.saved) + len(self.weight_gradients))
        elif op == "B":
            result = stage.backward(entering, self.saved.pop(key))
        else:
            result, self.weight_gradients[key] = stage.backward_input(entering, self.saved.pop(key))
        produced = self.schedule.produces(self.runner.rank, action)
        if produced is not None:
            self.made[produced] = result
        elif op == "F":
            self.outputs[microbatch] = result

    def finish(self) -> PipelineResult:
        for sent in self.leaving.values():
            sent.wait()
        outputs = tuple(self.outputs[microbatch] for microbatch in sorted(self.outputs))
        return PipelineResult(outputs=outputs, peak_live=self.peak_live)

    def _take(self, tensor: StageTensor | None) -> torch.Tensor | None:
        """The tensor that an action reads; this rank holds it no longer than the action needs it."""
        if tensor is None:
            return None
        if tensor in self.made:
            return self.made.pop(tensor)
        received = self.arriving.pop(tensor).wait()
        for sent in self.runner.confirmed_by.get(tensor, ()):
            self.leaving.pop(sent).wait()
        return received


def confirmations(schedule: Schedule) -> list[dict[StageTensor, list[StageTensor]]]:
    """For each rank: received tensor -> the rank's sent tensors that the sender had read before making it.

    Each sent tensor is listed once, at the first such receive.
    """
    home = schedule.stage_map.home
    confirmed_by: list[dict[StageTensor, list[StageTensor]]] = [{} for _ in schedule.ranks]
    for peer, actions in enumerate(schedule.ranks):
        read = defaultdict[int, list[StageTensor]](list)  # by sender: read by `peer` since it last sent there
        for action in actions:
            consumed, produced = schedule.consumes(peer, action), schedule.produces(peer, action)
            if consumed is not None and (sender := home[_maker(consumed)][0]) != peer:
                read[sender].append(consumed)
            if produced is not None and (reader := home[produced.stage][0]) in read:
                confirmed_by[reader][produced] = read.pop(reader)
    return confirmed_by


def _maker(tensor: StageTensor) -> int:
    """The stage that makes what enters `tensor.stage`."""
    return tensor.stage - 1 if tensor.kind == "activation" else tensor.stage + 1
