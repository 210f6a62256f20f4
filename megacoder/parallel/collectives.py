"""What ranks exchange through torch.distributed: NCCL on GPUs, gloo on CPUs, nothing at all in a world of one.

CPU ranks of one host share memory, and their most frequent operations go through it (`megacoder.parallel.
shared_memory`): all-reduce, all-gather, reduce-scatter, send and receive.

Every collective takes its group as an argument. `group=None` means a world of one: each function is then the identity,
so that callers have a single code path.

Each collective notes its start in the rank's journal (`megacoder.parallel.journal`); a network failure is raised as
RankLost.
"""

import weakref
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from megacoder.parallel.journal import GroupNote, Journal, Operation
from megacoder.parallel.shared_memory import Transfer, add_up

__all__ = [
    "Pending",
    "all_gather_into",
    "all_reduce_sum",
    "barrier",
    "broadcast_from_first",
    "flight_record",
    "gather_bytes",
    "group_rank",
    "group_size",
    "journal_of",
    "note_of",
    "start_all_gather",
    "start_all_reduce_sum",
    "start_receive",
    "start_reduce_scatter_sum",
    "start_send",
    "sum_with_peer",
]


# torch 2.13 deprecates the `_tensor` names, the only ones that 2.11 has.
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

_notes: weakref.WeakKeyDictionary[dist.ProcessGroup, GroupNote] = weakref.WeakKeyDictionary()
"""Would be an attribute of each group, if torch's class allowed attributes."""


class Pending:
    """A tensor still in use by a collective, send or receive in flight; compute meanwhile, then `wait` for it."""

    __slots__ = ("_finish", "_operation", "_result", "_work")

    def __init__(
        self,
        result: Tensor,
        work: dist.Work | Transfer | None = None,
        operation: Operation | None = None,
        finish: Callable[[], None] | None = None,
    ) -> None:
        """`operation` is what `work` does; `finish` is what remains to be computed once it is done."""
        self._result, self._work, self._operation, self._finish = result, work, operation, finish

    def wait(self) -> Tensor:
        """The result; on a GPU the current stream waits, not the host."""
        if self._work is not None:
            assert self._operation is not None
            with self._operation:
                self._work.wait()
            self._work = None
        if self._finish is not None:
            self._finish()
            self._finish = None
        return self._result


def flight_record() -> bytes | None:
    """What torch's flight recorder knows of the last collectives, as JSON; None where it has recorded nothing."""
    for name in ("_dump_nccl_trace_json", "_dump_fr_trace_json"):
        dump = getattr(torch._C._distributed_c10d, name, None)
        if dump is not None and b'"entries":[{' in (record := dump()):
            return bytes(record)
    return None


def journal_of(group: dist.ProcessGroup | None) -> Journal:
    """This rank's journal, one for all groups of the process; `group=None` is a group of this rank alone."""
    if group is not None:
        return note_of(group).journal
    return note_of(dist.group.WORLD).journal if dist.group.WORLD is not None else Journal()


def note_of(group: dist.ProcessGroup) -> GroupNote:
    """What is known of `group`: its ranks, its backend, the memory that they share."""
    note = _notes.get(group)
    if note is None:
        journal = Journal() if group is dist.group.WORLD else journal_of(dist.group.WORLD)
        note = GroupNote(journal, tuple(dist.get_process_group_ranks(group)), dist.get_backend(group))
        _notes[group] = note
    return note


def all_reduce_sum(tensor: Tensor, group: dist.ProcessGroup | None) -> None:
    """Sums `tensor` over the group, in place, the same bits on every rank."""
    start_all_reduce_sum(tensor, group).wait()


def all_gather_into(full: Tensor, shard: Tensor, group: dist.ProcessGroup | None) -> None:
    """full = every rank's `shard` in rank order; `shard` may be this rank's slice of `full`."""
    if group is None:
        if shard.data_ptr() != full.data_ptr():
            full.copy_(shard)
        return
    start_all_gather(full, shard, group).wait()


def start_all_reduce_sum(tensor: Tensor, group: dist.ProcessGroup | None) -> Pending:
    """`all_reduce_sum` without waiting; `tensor` receives the result and is in use until `wait`."""
    if group is None:
        return Pending(tensor)
    note = note_of(group)
    with (operation := Operation("all-reduce", tensor, note)):
        if note.memory is not None and note.memory.takes(tensor):
            return Pending(tensor, note.memory.start_all_reduce(tensor), operation)
        return Pending(tensor, dist.all_reduce(tensor, group=group, async_op=True), operation)


def start_reduce_scatter_sum(shard: Tensor, full: Tensor, group: dist.ProcessGroup) -> Pending:
    """shard = this rank's slice of the sum of every rank's `full`, after `wait`; len(full) = group size * len(shard).

    `shard` may be this rank's slice of `full`, whose other slices are left as they were.
    Over gloo, ranks exchange slices and each adds up its own, in rank order: gloo's reduce-scatter sums everything on
    every rank and takes up to three times as long. As a result bf16 is summed in fp32 and rounded once.
    """
    note = note_of(group)
    with (operation := Operation("reduce-scatter", full, note)):
        if note.memory is not None and note.memory.takes_slices(full, shard):
            return Pending(shard, note.memory.start_reduce_scatter(shard, full), operation)
        if note.backend != "gloo":
            return Pending(shard, _reduce_scatter(shard, full, group=group, async_op=True), operation)
        received = torch.empty_like(full)
        work = dist.all_to_all_single(received, full, group=group, async_op=True)
        rows = received.view(len(note.ranks), shard.numel())
        return Pending(shard, work, operation, lambda: add_up(shard.view(-1), rows.unbind()))


def start_all_gather(full: Tensor, shard: Tensor, group: dist.ProcessGroup) -> Pending:
    """`all_gather_into` without waiting."""
    note = note_of(group)
    with (operation := Operation("all-gather", full, note)):
        if note.memory is not None and note.memory.takes_slices(full, shard):
            return Pending(full, note.memory.start_all_gather(full, shard), operation)
        return Pending(full, _all_gather(full, shard, group=group, async_op=True), operation)


def gather_bytes(data: bytes, group: dist.ProcessGroup) -> list[bytes]:
    """Every rank's `data`, of equal length, in rank order. Through sockets: for what precedes shared memory."""
    own = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    rows = own.new_empty(dist.get_world_size(group), len(data))
    _all_gather(rows.view(-1), own, group=group)
    return [row.numpy().tobytes() for row in rows]


def barrier(group: dist.ProcessGroup | None) -> None:
    """Returns once every rank of the group has called it."""
    if group is not None:
        with Operation("barrier", None, note_of(group)):
            dist.barrier(group=group)


def broadcast_from_first(tensor: Tensor, group: dist.ProcessGroup | None) -> None:
    """Overwrites `tensor` with the first rank's."""
    if group is not None:
        with Operation("broadcast", tensor, note_of(group)):
            dist.broadcast(tensor, group=group, group_src=0)


def group_rank(group: dist.ProcessGroup | None) -> int:
    """This process's place in the group."""
    return 0 if group is None else dist.get_rank(group)


def group_size(group: dist.ProcessGroup | None) -> int:
    """Ranks in the group."""
    return 1 if group is None else dist.get_world_size(group)


def start_send(tensor: Tensor, peer: int, group: dist.ProcessGroup) -> Pending:
    """Begins to send to rank `peer` of the group; two ranks must start their common transfers in the same order."""
    tensor = tensor.contiguous()  # as the receiver's buffer is
    note = note_of(group)
    with (operation := Operation("send", tensor, note, peer)):
        if note.memory is not None and note.memory.takes(tensor):
            return Pending(tensor, note.memory.start_send(tensor, peer), operation)
        work = dist.isend(tensor, group=group, group_dst=peer)
    assert work is not None  # None is for processes outside the group
    return Pending(tensor, work, operation)


def start_receive(buffer: Tensor, peer: int, group: dist.ProcessGroup) -> Pending:
    """Begins to fill `buffer` from rank `peer` of the group."""
    note = note_of(group)
    with (operation := Operation("receive", buffer, note, peer)):
        if note.memory is not None and note.memory.takes(buffer):
            return Pending(buffer, note.memory.start_receive(buffer, peer), operation)
        work = dist.irecv(buffer, group=group, group_src=peer)
    assert work is not None
    return Pending(buffer, work, operation)


def sum_with_peer(tensor: Tensor, peer: int, group: dist.ProcessGroup) -> None:
    """Adds rank `peer`'s tensor in place; both ranks call it and end with the same bits."""
    incoming = torch.empty_like(tensor)
    starts = [lambda: start_send(tensor, peer, group), lambda: start_receive(incoming, peer, group)]
    if group_rank(group) > peer:
        starts.reverse()  # one rank sends first and the other receives, since NCCL runs a pair's transfers in turn
    for transfer in [start() for start in starts]:
        transfer.wait()
    tensor += incoming
